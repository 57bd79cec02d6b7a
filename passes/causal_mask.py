"""Causal masks: say `is_causal` where a graph spells out a causal mask that nothing but sizes decides.

    matched:  scaled_dot_product_attention(q, k, v, mask), mask [.., n, n] true at and below the diagonal
    becomes:  scaled_dot_product_attention(q, k, v, is_causal=True), and the mask is never made

transformers builds a [B, 1, n, n] mask whenever a model is traced, since tracing hides from it that a
plain causal mask would do. Every attention kernel then reads n^2 booleans and computes the upper
triangle too. A mask that a caller's tensor takes part in (a padding mask, position ids) stays.

What counts as proof: the mask's expression reads no input's values; no condition in it is a window;
and evaluated at the captured sizes, and at others where sizes are symbols, it is the lower triangle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thresher.compat import without_fake_mode
from thresher.graph.nodes import module_fqn, value
from thresher.graph.program import Program
from thresher.graph.sizes import example_of
from thresher.recipe import PassConfig

from .base import EXACT, Context, Match, Miss, Pass, register_pass
from .extract import extract
from .structure.masks import BEFORE, NEAR, conditions
from .structure.pattern import match
from .structure.sdpa import MASKED, attention

aten = torch.ops.aten
_LONGEST = 4096  # an evaluation costs n^2 bytes


@dataclass(frozen=True)
class CausalMaskConfig(PassConfig):
    """Causal masks have no options."""

    name = "causal_mask"


@register_pass
class CausalMask(Pass[CausalMaskConfig]):
    """Says `is_causal` in the place of a mask that is the lower triangle. See the module's docstring."""

    name, effect = "causal_mask", EXACT
    per_rank = True

    def match(self, program: Program, context: Context[CausalMaskConfig]) -> Sequence[Match | Miss]:
        return [
            Miss(site, reason) if reason is not None else Match(site, node)
            for node, site, reason in candidates(program)
        ]

    def rewrite(self, program: Program, match: Match, context: Context[CausalMaskConfig]) -> None:
        make_causal(match.data)


def candidates(program: Program) -> list[tuple[fx.Node, str, str | None]]:
    """Every attention with a mask, its name, and why the mask must stay (None: it need not)."""
    known: dict[fx.Node, str | None] = {}
    found = []
    for node in program.nodes(aten.scaled_dot_product_attention.default):
        mask = attention(node).mask
        if mask is None:
            continue
        if mask not in known:
            known[mask] = why_not_causal(program, mask)
        found.append((node, module_fqn(node) or node.name, known[mask]))
    return found


def make_all_causal(program: Program) -> int:
    """Replace every mask that is provably the plain causal one by `is_causal`; gives how many these were."""
    causal = [node for node, _, reason in candidates(program) if reason is None]
    for node in causal:
        make_causal(node)
    return len(causal)


def prepare_causal(program: Program, context: Context[Any]) -> int | None:
    """The preparation of a pass that reads causal attention; None where no mask was one."""
    number = make_all_causal(program)
    if number:
        context.notes.append(
            f"the masks of {number} attentions are the plain causal one, and are no longer computed."
        )
    return number or None


def make_causal(node: fx.Node) -> None:
    """Replace an attention's mask by `is_causal`."""
    site = attention(node)
    rest = {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa")}  # these come by name only
    node.args = (site.q, site.k, site.v)
    node.kwargs = {"is_causal": True, **rest}


def why_not_causal(program: Program, mask: fx.Node) -> str | None:
    """Why a mask is not provably the plain causal one, as a sentence; None when it is."""
    reads = _values_read(mask)
    if reads:
        return (
            f"Its mask depends on the values of {reads[0]}, so it may hide more than later tokens. "
            f"Call the model without {reads[0]} where no row is padded."
        )
    for condition in conditions(mask):  # one by one: a window may be wider than any size tried below
        if before := match(BEFORE, condition):
            return f"Its mask is a window of {before['width']} tokens."
        if near := match(NEAR, condition):
            return f"Its mask is a window of {near['reach']} tokens to either side."
    rows, columns = value(mask).shape[-2:]
    fixed = isinstance(rows, int) and isinstance(columns, int)
    for length in (
        [example_of(columns)]
        if fixed
        else sorted({3, 17, example_of(columns), min(_LONGEST, 4 * example_of(columns))})
    ):
        shown = _evaluate(program, mask, columns, length)
        shown = shown if shown.dtype == torch.bool else shown > MASKED
        if shown.shape[-1] != shown.shape[-2]:
            return f"Its mask has {shown.shape[-2]} rows and {shown.shape[-1]} columns."
        if not torch.equal(shown, torch.ones_like(shown).tril()):
            return "Its mask is not the lower triangle."
    return None


def _values_read(mask: fx.Node) -> list[str]:
    """Inputs whose values, not only sizes, take part in a mask."""
    found, seen, stack = [], set(), [mask]
    while stack:
        node = stack.pop()
        if node in seen or node.target is aten.sym_size.int or not isinstance(value(node), torch.Tensor):
            continue
        seen.add(node)
        if node.op == "placeholder":
            found.append(str(node.target).removeprefix("l_args_").removeprefix("l_kwargs_").strip("_"))
        elif node.target not in _SHAPE_ONLY:
            stack += node.all_input_nodes
    return found


_SHAPE_ONLY = {
    aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.new_empty.default,
    aten.ones_like.default, aten.zeros_like.default, aten.full_like.default,
}  # fmt: skip


def _evaluate(program: Program, mask: fx.Node, size: Any, length: int) -> torch.Tensor:
    """The mask at sequence length `length`, the other sizes as captured."""
    part = extract(program, program.placeholders, [mask])
    bound = {} if isinstance(size, int) else {size.node.expr: length}

    def at(given: Any) -> int:
        if isinstance(given, int):
            return given
        number = given.node.expr.subs(bound)
        return int(number) if number.is_number else example_of(given)

    inputs: list[Any] = []
    for place in program.placeholders:
        known = value(place)
        if isinstance(known, torch.Tensor):
            inputs.append(torch.zeros([at(s) for s in known.shape], dtype=known.dtype))
        else:
            inputs.append(at(known) if isinstance(known, (int, torch.SymInt)) else known)
    cpu = torch.device("cpu")
    for node in part.nodes():
        node.args = fx.node.map_aggregate(node.args, lambda a: cpu if isinstance(a, torch.device) else a)
        node.kwargs = {k: cpu if isinstance(v, torch.device) else v for k, v in node.kwargs.items()}
    part.graph_module.recompile()
    with without_fake_mode(), torch.no_grad():
        return part.run(*inputs)[0]
