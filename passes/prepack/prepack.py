"""Prepacking: compute a padded batch's real tokens only, and hand back what the padded model would.

    matched:  a program with a padding mask, in which every attention treats its rows separately
    becomes:  the same nodes on [1, T] real tokens, with `thresher::varlen_attention` for attention

A program captured for [B, S] is polymorphic: with one row of T tokens the same nodes compute exactly
those tokens, for everything but attention treats tokens alike. The program is cut in three. What
does not depend on the tokens (positions, rotary tables) is the prologue and stays padded; the body
is traced again at [1, T]; what comes after the first operator that mixes positions (a pooler, the
last token's logits) is the epilogue and sees padded values again. Positions are gathered, never
renumbered, so left padding and learned positions keep their meaning.

Method: arXiv 2404.09529 packs prompts into bins under a block mask; here segments replace the mask,
and one row replaces the bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from thresher.errors import ArgumentError, unknown_key
from thresher.graph.nodes import module_fqn, value
from thresher.graph.packed_layout import Visibility
from thresher.graph.program import Program
from thresher.graph.sizes import example_of
from thresher.recipe import MASK_NAME, PassConfig

from ..base import EXACT, Context, Match, Miss, Pass, register_pass
from ..candidates import of_writes
from ..tokens.axes import BATCH, SEQUENCE, TokenAxes, propagate
from .attention_sites import attention_sites, not_understood
from .cut import NotPackable, Packable, cut, linears, packing
from .early_gather import gather_early
from .islands import Islands
from .token_inputs import embedded, padding_mask, token_input
from .towers import Outside, outside
from .visibility import LeaksPads, MaskProbe

aten = torch.ops.aten
WHOLE = "the whole program"
_MIND_NO_CUT = {"prepack", "decode_attention", "causal_mask"}


@dataclass(frozen=True)
class PrepackConfig(PassConfig):
    """Options of prepacking.

    mask: name of the input that marks real tokens, for models that do not call it attention_mask.
    min_share: decline when less than this share of the linears' weights lies in the packed part.
    min_gain: run a batch padded when packing it is predicted to gain less than this factor. A batch without
        any padding runs padded too, bit-identical to the model as it was. Where other passes have rewritten the
        packed program, such batches run packed, since the padded one lacks what they did.
    form: "flat", all tokens in one row of segments; or "rows", sequences share rows of a fixed capacity under
        a block mask, as arXiv 2404.09529 has it, for targets that know neither segments nor ragged shapes.
    capacity: of a row in form "rows"; 0 takes what costs least for the batch's lengths. A longer sequence
        raises it for its batch: a capacity of 1 is the published choice, the longest sequence.
    buckets: fill the number of tokens up to one of at most this many sizes, for targets that compile each
        size; 0 leaves it as it is, and one compilation serves all.
    outputs: "padded", or "packed": results with values per token come back as [1, T, ...], in the order of
        `mask.nonzero()`, and no [batch, sequence, vocabulary] is made.
    """

    name = "prepack"
    mask: str = MASK_NAME
    min_share: float = 0.5
    min_gain: float = 1.0
    form: str = "flat"
    capacity: int = 0
    buckets: int = 0
    outputs: str = "padded"

    def validate(self) -> None:
        for name, accepted in (("form", ("flat", "rows")), ("outputs", ("padded", "packed"))):
            if getattr(self, name) not in accepted:
                raise unknown_key(f"prepack's {name}", str(getattr(self, name)), accepted)
        self.within(0, float("inf"), "buckets", "capacity", "min_gain")
        self.within(0, 1, "min_share")
        if self.form == "rows" and (self.buckets or self.outputs == "packed"):
            raise ArgumentError(
                "prepack's form",
                '"rows" with buckets or packed outputs',
                '"rows" alone',
                'Use form="flat" for those.',
            )


@register_pass
class Prepack(Pass[PrepackConfig]):
    """Packs a batch's real tokens into one row. See the module's docstring."""

    name, effect = "prepack", EXACT
    per_rank, moves_tokens, sees_writes = True, True, True

    def prepare(self, program: Program, context: Context[PrepackConfig]) -> int | None:
        """Select positions before the head also where nothing is packed: it is exact and never costs anything."""
        moved = gather_early(program)
        if moved:
            context.notes.append("the positions that are read are selected before the LM head, not after it.")
        return moved or None

    def match(self, program: Program, context: Context[PrepackConfig]) -> Sequence[Match | Miss]:
        try:
            behind = [c.name for c in context.recipe.passes if c.name not in _MIND_NO_CUT]
            return [Match(WHOLE, find(program.copy(), context.config, behind))]
        except NotPackable as reason:
            return [Miss(WHOLE, str(reason))]

    def rewrite(self, program: Program, match: Match, context: Context[PrepackConfig]) -> None:
        found: Packable = match.data
        layout, body = cut(program.copy(), found, packing(found, context.config))
        program.graph_module, program.weights = body.graph_module, body.weights
        program.input_names, program.packing = body.input_names, layout
        for site, seen in sorted(layout.visibilities.items())[:1]:
            window = f" with a window of {seen.window + 1}" if seen.window >= 0 else ""
            context.notes.append(f"attention is {seen.kind}{window} in {site or 'the model'}"
                                 f" (one of {len(layout.visibilities)} attention sites).")  # fmt: skip
        if found.islands:
            first = next(iter(found.islands.values()))
            context.notes.append(f"{len(found.islands)} parts that mix positions run on padded rows inside, the first in "
                                 f"{first.where}: {first.why}.")  # fmt: skip


def find(program: Program, config: PrepackConfig, behind: Sequence[str] = ()) -> Packable:
    """Everything that decides whether and how a program is packed. Raises NotPackable.

    program: a copy; the sums of an attention's masks are added to it.
    behind: passes of the recipe that would see nothing but the packed part.
    """
    padding = padding_mask(program, config.mask)
    tokens = token_input(program, padding)
    batch, sequence = value(tokens).shape[:2]
    for size, axis in ((batch, "batch"), (sequence, "sequence")):
        if example_of(size) == 1:
            raise NotPackable(
                f"The {axis} dimension is 1 in this graph, so there is no padding between rows to leave out."
            )
    if (
        isinstance(batch, torch.SymInt)
        and isinstance(sequence, torch.SymInt)
        and batch.node.expr == sequence.node.expr
    ):
        raise NotPackable(
            f"The example has {example_of(batch)} rows of as many tokens, so that torch gives both sizes one symbol and "
            "they cannot be told apart. A call with another number of rows compiles anew and is packed."
        )
    # The flow starts at the embedded tokens, not at the ids: what else a model computes from the ids
    # (RoBERTa counts positions in them) is a handful of integers and stays padded.
    start = embedded(tokens) or [tokens]
    sites = attention_sites(program)
    seeds = {n: (BATCH, SEQUENCE, *(None,) * (value(n).dim() - 2)) for n in start}
    islands = Islands(program, padding, tokens, start, sites) if config.form == "flat" else None
    axes = propagate(program, seeds, sites, islands)
    within = islands.nodes if islands is not None else set()
    sites = {node: site for node, site in sites.items() if node not in within}
    if not sites and not within:
        raise NotPackable(not_understood(program, axes) or _no_attention(axes))
    apart = outside(program, sites, axes, padding)
    sites = {node: site for node, site in sites.items() if node not in apart.attentions}
    if not sites and not within:
        raise NotPackable("The padding mask marks tokens that no attention of this program works on.")
    visibilities, probes = {}, {}
    for node, site in sites.items():
        where = module_fqn(node) or node.name
        if node not in axes:
            stop = axes.stopped.get(node, "it does not see the tokens")
            raise NotPackable(
                not_understood(program, axes, node) or f"The attention in {where} cannot be packed: {stop}."
            )
        if site.mask is None:
            raise NotPackable(
                f"The attention in {where} does not use the padding mask, so pad tokens are part of its result."
            )
        if site.mask not in probes:
            probes[site.mask] = MaskProbe(program, site.mask, padding)
        visibilities[node] = seen = _classify(probes[site.mask], where, example_of(sequence))
        has = "a soft cap" if site.softcap else "sinks" if site.sinks is not None else None
        if seen.kind == "generic" and (has or config.form == "rows"):
            raise NotPackable(
                f"The attention mask in {where} is more than a causal or windowed one, and "
                + (f"its scores have {has}." if has else 'form="rows" makes masks of those kinds only.')
            )
        if has and config.form == "rows":
            raise NotPackable(f'The attention in {where} has {has}, which form="rows" cannot express.')
    outputs = program.outputs
    written = [i for i in program.updates if outputs[i] in axes or outputs[i] in axes.stopped]
    if written:
        raise NotPackable(of_writes("prepack", program, written))
    if behind and (foreign := _foreign(program, axes, apart)):
        raise NotPackable(
            f"{foreign} weights belong to another tower (encoder or decoder) than the padded one. In a packed program "
            f"{' and '.join(behind)} could not rewrite them. Leave prepack, or {' and '.join(behind)}, out of the recipe."
        )
    share = _packed_share(program, axes, apart)
    if share < config.min_share:
        first = next(iter(axes.stopped.values()), "they do not see the tokens")
        raise NotPackable(
            f"Only {share:.0%} of the linear weights could run packed, and min_share is {config.min_share:.0%}: {first}."
        )
    parts = islands.found if islands is not None else {}
    return Packable(program, tokens, padding, axes, sites, visibilities, probes, example_of(sequence), parts)


def _no_attention(axes: TokenAxes) -> str:
    mixing = next((reason for reason in axes.stopped.values()), None)
    if mixing is None:
        return "The program has no attention, and nothing in it mixes positions."
    return f"The program has no scaled_dot_product_attention; the tokens were followed up to this: {mixing}."


def _classify(probe: MaskProbe, where: str, length: int) -> Visibility:
    if probe.depends_on_values():
        return Visibility("generic")
    try:
        return probe.classify(length)
    except LeaksPads:
        raise NotPackable(
            f"The attention mask in {where} lets real tokens see pad tokens, so leaving pads out would change the result."
        ) from None


def _positions(known: torch.Tensor) -> int:
    """How many vectors a linear's input has in the example."""
    return math.prod(example_of(size) for size in known.shape[:-1])


def _packed_share(program: Program, axes: TokenAxes, apart: Outside) -> float:
    """The share of weights that run packed, of those that these tokens go through: another tower's are not theirs, and a
    head that reads one position of each row counts by that position, however large it is."""
    packed = sum(size for n, size in linears(program) if n in axes)
    padded = sum(
        size * min(1.0, _positions(value(n.args[0])) / max(1, axes.batch * axes.sequence))
        for n, size in linears(program)
        if n not in axes and n in axes.stopped and n not in apart.nodes
    )
    return packed / (packed + padded) if packed + padded else 1.0


def _foreign(program: Program, axes: TokenAxes, apart: Outside) -> int:
    """Weights that are multiplied in a tower whose tokens are not the packed ones."""
    if not apart.attentions:
        return 0
    return sum(
        size for n, size in linears(program) if n not in axes and (n not in axes.stopped or n in apart.nodes)
    )
