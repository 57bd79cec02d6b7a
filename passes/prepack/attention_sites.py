"""The attentions of a program as single sites, also those a model spells out.

    matched:  scaled_dot_product_attention; or product, scale, soft cap, masks, softmax, product ("eager")
    becomes:  one `Attention` per site, whose `mask` is the sum of the masks in order

Nothing is rewritten here but for dead nodes: the sum of several masks is added to the graph, to be
evaluated like any other mask. So the program is a copy where its caller may only look.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import module_fqn, value
from thresher.graph.program import Program
from thresher.graph.sizes import example_of

from ..structure.attention import Core, cores
from ..structure.sdpa import Attention, attention
from ..tokens.axes import TokenAxes

aten = torch.ops.aten


def attention_sites(program: Program) -> dict[fx.Node, Attention]:
    """Each attention by the node that holds its result, [batch, heads, sequence, head_dim]."""
    found = {}
    for core in list(cores(program)):
        if not isinstance(core, Core):
            continue
        site = attention(core.node) if core.spelling == "sdpa" else None
        if core.spelling == "eager":
            site = _spelled_out(program, core)
        if site is not None:
            found[site.node] = site
    return found


def not_understood(program: Program, axes: TokenAxes, before: fx.Node | None = None) -> str | None:
    """Why the first attention of the tokens that is spelled out could not be read, as a sentence; None where all were.

    Tokens cannot be followed past it, so that whatever stops behind it is only a consequence. before: look no further.
    """
    for core in cores(program):
        if isinstance(core, Core):
            if core.node is before:
                return None
            continue
        node, reason = core
        rows, columns = (example_of(n) for n in value(node).shape[-2:])
        squares = rows == axes.sequence and columns >= rows and (value(node).dim() == 4 or columns > 1)
        routes = value(node).dim() == 3 and example_of(value(node).shape[0]) == axes.batch
        if squares and not routes and any(a in axes for a in _reached(node)):
            where = module_fqn(node) or node.name
            return f"The attention in {where} is not one that packing understands. {reason}"
    return None


def _reached(node: fx.Node) -> set[fx.Node]:
    """What a few steps back from a node lie."""
    found, ring = {node}, {node}
    for _ in range(12):
        ring = {a for n in ring for a in n.all_input_nodes} - found
        found |= ring
    return found


def _spelled_out(program: Program, core: Core) -> Attention | None:
    """An eager attention, or None when more than its result is read from it."""
    q, k, v = (_four_dims(n) for n in (core.q, core.k, core.v))
    end: fx.Node | None = core.node
    if value(core.node).dim() == 3:  # [batch * heads, ...] products: the next view separates the two again
        end = next(iter(core.node.users)) if len(core.node.users) == 1 else None
    if end is None or any(n is None or value(n).dim() != 4 for n in (q, k, v, end)):
        return None
    assert q is not None and k is not None and v is not None
    masks = [m for m in (_mask_of_heads(program, m, core, q) for m in core.masks) if m is not None]
    if len(masks) != len(core.masks):
        return None
    inside = _between(end, {q, k, v, *core.masks})
    if any(u not in inside and u is not end for n in inside for u in n.users):
        return None
    mask = masks[0] if masks else None
    for other in masks[1:]:
        mask = program.insert(core.node, aten.add.Tensor, mask, other)
    return Attention(
        end, q, k, v, mask, False, core.scale, core.softcap or 0.0, frozenset(inside), core.sinks
    )


def _four_dims(node: fx.Node) -> fx.Node | None:
    """An operand [batch, heads, sequence, dim], before batch and heads were merged for a batched product."""
    known = value(node)
    if known.dim() == 4:
        return node
    source = node.args[0] if node.target is aten.reshape.default else None
    if (
        isinstance(source, fx.Node)
        and value(source).dim() == 4
        and value(source).shape[-1] == known.shape[-1]
    ):
        return source
    return None


def _mask_of_heads(program: Program, mask: fx.Node, core: Core, q: fx.Node) -> fx.Node | None:
    """A mask [batch or 1, heads or 1, queries or 1, keys]; ALiBi comes as [batch * heads, 1, keys]."""
    known = value(mask)
    if known.dim() == 4:
        return mask
    source: Any = mask.args[0] if mask.target is aten.reshape.default else None
    if (
        known.dim() == 3
        and isinstance(source, fx.Node)
        and value(source).dim() == 3
        and value(source).shape[1] == value(q).shape[1]
        and isinstance(known.shape[1], int)
        and known.shape[1] == 1
    ):
        return program.insert(core.node, aten.unsqueeze.default, source, 2)
    return None


def _between(end: fx.Node, starts: set[fx.Node]) -> set[fx.Node]:
    """The call nodes on the way from `starts` to `end`, without those that merely measure sizes."""
    found: set[fx.Node] = set()
    stack = [a for a in end.all_input_nodes if a not in starts]
    while stack:
        node = stack.pop()
        if node in found or node in starts or node.op != "call_function" or not _depends_on(node, starts):
            continue
        found.add(node)
        stack += node.all_input_nodes
    return found


def _depends_on(node: fx.Node, starts: set[fx.Node]) -> bool:
    stack, seen = [node], set()
    while stack:
        one = stack.pop()
        if one in starts:
            return True
        if one not in seen and one.target is not aten.sym_size.int:
            seen.add(one)
            stack += one.all_input_nodes
    return False
