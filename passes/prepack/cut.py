"""Cuts a program into prologue, packed body and epilogue, and describes how they fit together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import module_fqn, value
from thresher.graph.packed_layout import PackedLayout, Packing, Passed, Scatter, Visibility
from thresher.graph.program import Program
from thresher.graph.sizes import example_of

from ..extract import extract
from ..structure.experts import find_experts
from ..structure.linears import PRODUCTS
from ..structure.pattern import CASTS
from ..structure.sdpa import Attention
from ..tokens.axes import BATCH, SEQUENCE, TOKENS, Stop, TokenAxes
from .body import trace_body
from .frontier import Frontier, body_inputs
from .island import Island
from .visibility import MaskProbe

aten = torch.ops.aten
_LAID_OUT = {
    *CASTS, aten.t.default, aten.transpose.int, aten.permute.default, aten.reshape.default, aten.select.int,
}  # fmt: skip


class NotPackable(Exception):
    """Why a program is not packed, as a full sentence."""


@dataclass
class Packable:
    """What `match` worked out. program: the copy it looked at, whose nodes these are and in which masks are summed."""

    program: Program
    tokens: fx.Node
    padding: fx.Node
    axes: TokenAxes
    sites: dict[fx.Node, Attention]
    visibilities: dict[fx.Node, Visibility]
    probes: dict[fx.Node, MaskProbe]
    proven: int
    islands: dict[fx.Node, Island]


def linears(program: Program) -> list[tuple[fx.Node, int]]:
    """Each product with the number of elements of the stored matrix it multiplies by; 0 without one. Experts count whole."""
    experts = {s.node for s in find_experts(program)}
    products = {*program.nodes(*PRODUCTS), *experts}
    return [(node, _matrix(program, node)) for node in program.nodes() if node in products]


def flops(product: fx.Node, size: int) -> float:
    """What a product by a stored matrix of so many elements computes on the example: of several, each row has one."""
    if not size:
        return 0.0
    result = value(product)
    width = example_of(
        value(product.args[1] if product.target is aten.addmm.default else product.args[0]).shape[-1]
    )
    return 2.0 * width * math.prod(example_of(n) for n in result.shape)


def _matrix(program: Program, product: fx.Node) -> int:
    """Elements of the largest stored matrix among a product's operands; a bias is none."""
    sizes = [0]
    for argument in product.all_input_nodes:
        while argument.target in _LAID_OUT and isinstance(argument.args[0], fx.Node):
            argument = argument.args[0]
        held = program.weight(argument)
        if held is not None and held.tensor.dim() > 1:
            sizes.append(held.tensor.numel())
    return max(sizes)


def cut(padded: Program, found: Packable, packing: Packing) -> tuple[PackedLayout, Program]:
    """Cut the program into prologue, body and epilogue, and describe how they fit together."""
    program, axes = found.program, found.axes
    places = program.placeholders
    rows = packing.form == "rows"
    frontier = Frontier(program, axes, found.sites, found.visibilities, rows, found.islands, found.padding)
    try:
        frontier.explore()
    except Stop as stop:
        raise NotPackable(f"The tokens cannot be separated from the padding: {stop}.") from None
    results = program.outputs
    computed = [n for n in results if isinstance(n, fx.Node)]
    late = [n for n in program.graph.nodes if n in axes.stopped]
    leaving = [
        n
        for n in axes.labels
        if n.op != "placeholder" and any(u in axes.stopped or u.op == "output" for u in n.users)
    ]
    prologue_nodes = [n for n in frontier.prologue if n.op != "placeholder"]
    early = [
        a for node in late for a in node.all_input_nodes
        if a not in axes.stopped and a not in axes and a.op == "call_function"
    ] + [n for n in computed if n not in axes and n not in axes.stopped and n.op != "placeholder"]  # fmt: skip
    prologue_nodes = list(dict.fromkeys(prologue_nodes + early))
    body = trace_body(program, frontier, leaving)
    epilogue, epilogue_arguments = None, []

    def source(node: fx.Node) -> Scatter | Passed:
        if node in places:
            return Passed("input", places.index(node))
        if node in axes:
            labels = axes[node]
            if TOKENS in labels:
                return Scatter(leaving.index(node), labels.index(TOKENS), labels.index(TOKENS))
            return Scatter(leaving.index(node), labels.index(BATCH), labels.index(SEQUENCE))
        return Passed("prologue", prologue_nodes.index(node))

    late_results = list(dict.fromkeys(n for n in computed if n in axes.stopped))
    if late_results:
        needed = list(dict.fromkeys(
            a for node in late for a in node.all_input_nodes if a not in axes.stopped and a.op != "get_attr"
        ))  # fmt: skip
        epilogue = extract(program, needed, late_results)
        epilogue_arguments = [source(n) for n in needed]
    layout = PackedLayout(
        mask=places.index(found.padding),
        tokens=places.index(found.tokens),
        prologue=extract(program, places, prologue_nodes) if prologue_nodes else None,
        arguments=body_inputs(frontier, places, prologue_nodes),
        epilogue=epilogue,
        epilogue_arguments=epilogue_arguments,
        results=[
            Passed("epilogue", late_results.index(n)) if n in late_results else source(n) for n in computed
        ],
        padded=padded,
        visibilities={module_fqn(n) or n.name: v for n, v in found.visibilities.items()},
        masks=tuple(prologue_nodes.index(m) for m in frontier.masks if m in prologue_nodes),
        proven=found.proven,
        packing=packing,
        holes=all(island.holes for island in found.islands.values()),
    )
    resizable = {
        n: found.probes[mask]
        for n, v in found.visibilities.items()
        if v.kind != "generic" and (mask := found.sites[n].mask) is not None
    }
    if any(p.resizable() for p in resizable.values()):
        names = {n: module_fqn(n) or n.name for n in resizable}

        def reclassify(length: int) -> dict[str, Visibility]:
            seen = {id(p): p.classify(length) for p in set(resizable.values())}
            return {names[n]: seen[id(p)] for n, p in resizable.items()}

        layout.reclassify = reclassify
    return layout, body


def packing(found: Packable, config: Any) -> Packing:
    """How and when calls are packed, by the options of a `PrepackConfig`; costs are FLOPs of what runs packed."""
    tokens = max(1, found.axes.batch * found.axes.sequence)
    token_cost = sum(
        flops(node, size) / tokens for node, size in linears(found.program) if node in found.axes
    )
    pair_cost = sum(
        2 * value(site.q).shape[1] * (value(site.q).shape[-1] + value(site.v).shape[-1])
        for site in found.sites.values()
    )
    causal = all(v.kind == "causal" for v in found.visibilities.values())
    return Packing(config.form, config.buckets, found.axes.batch * found.axes.sequence, config.outputs,
                   config.min_gain, float(token_cost), float(pair_cost), causal, config.capacity)  # fmt: skip
