"""The stretches of layers that ZipVL rewrites: one, or several where token pruning shortened the sequence between.

Behind a cut the hidden state is a gather of the one before it, and masks are gathered along queries and keys.
Both are recognised here, so that the layers behind are rewritten on their shorter sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from thresher.graph.nodes import value
from thresher.graph.packed_layout import Visibility
from thresher.graph.program import Program
from thresher.graph.sizes import example_of

from ..structure.masks import read_masks
from ..structure.recover import AttentionSite, LayerSite, Structure, Tower
from ..tokens.axes import BATCH, SEQUENCE, TokenAxes, propagate
from ..tokens.replay import aten, packed_attention
from ..tokens.towers import tower_size
from ..tokens.types import NotPrunable


@dataclass(eq=False)
class Stretch:
    """Layers that see the same tokens.

    picked: the tokens' places among those of the stretch before, int64 [L] or [B, L, ...]; None for all tokens.
    kept: those in the whole prompt, int64 [B, L], -1 for places that only fill a row up; None where there are none such.
    offsets: where packed sequences begin and end, or None.
    """

    layers: list[LayerSite]
    axes: TokenAxes
    picked: fx.Node | None = None
    offsets: fx.Node | None = None
    kept: fx.Node | None = None

    @property
    def start(self) -> fx.Node:
        return self.layers[0].input

    @property
    def length(self) -> int:
        """Tokens of a row in the example."""
        return example_of(value(self.start).shape[1])


def find_stretches(program: Program, structure: Structure) -> list[Stretch]:
    """The stretches of the language model, in order; none where nothing was recovered. Raises NotPrunable and Stop."""
    towers = max(_chains(structure), key=lambda c: sum(map(tower_size, c)), default=[])
    found = []
    for tower in towers:
        start = tower.layers[0].input
        if value(start).dim() != 3:
            raise NotPrunable(
                f"The hidden state has {value(start).dim()} dimensions, not [batch, tokens, width]."
            )
        offsets = next((_offsets(l.attention) for l in tower.layers if l.attention is not None), None)
        axes = propagate(program, {start: (BATCH, SEQUENCE, None)})
        found.append(Stretch(list(tower.layers), axes, _source(start)[1], offsets))
    for stretch, kept in zip(found[1:], _kept(program)):
        stretch.kept = kept
    return found


def _kept(program: Program) -> list[fx.Node | None]:
    """What token pruning says it kept behind each of its cuts; None where every place is a token's."""
    names = program.calls.extra_outputs if program.calls is not None else []
    said = dict(zip(names, program.outputs[len(program.outputs) - len(names) :]))
    nodes = [node for name, node in said.items() if name.startswith("kept.")]
    return [n if isinstance(n, fx.Node) and n.target is aten.masked_fill.Scalar else None for n in nodes]


def _chains(structure: Structure) -> Iterator[list[Tower]]:
    """Towers of which each goes on with tokens of the one before."""
    ends = {
        end: tower
        for tower in structure.towers
        for end in (tower.layers[-1].output, tower.layers[-1].branches[-1].add)
    }
    before = {tower: ends.get(_source(tower.layers[0].input)[0]) for tower in structure.towers}  # type: ignore[arg-type]
    after = {b: t for t, b in before.items() if b is not None}
    for tower in structure.towers:
        if before[tower] is None:
            chain = [tower]
            while chain[-1] in after:
                chain.append(after[chain[-1]])
            yield chain


def _source(start: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The hidden state whose tokens were picked, and the node that says which; (None, None) for no such node."""
    arguments: Any = start.args
    if start.target is aten.index_select.default and arguments[1] == 1:
        return arguments[0], arguments[2]
    if start.target is aten.index.Tensor and len(arguments[1]) == 2 and all(arguments[1]):
        return arguments[0], arguments[1][1]
    if start.target is aten.gather.default and arguments[1] == 1:
        source = arguments[0]
        return (source.args[0] if source.target is aten.expand.default else source), arguments[2]
    return None, None


def _offsets(site: AttentionSite | None) -> fx.Node | None:
    if site is None or site.node.target is not packed_attention():
        return None
    return site.node.args[3]  # type: ignore[return-value]


def shown(site: AttentionSite) -> Visibility:
    """What an attention sees; a mask gathered along queries and keys by the same tokens shows what it did before.

    Tokens rise, so a causal mask stays one; a window would count tokens that are gone, and its site says so.
    """
    if site.visibility.kind != "generic" or site.mask is None:
        return site.visibility
    whole, picked = _ungathered(_unhidden(site.mask), -1)
    whole, rows = _ungathered(whole, -2)
    if picked is None or picked is not rows:
        return site.visibility
    return shown_by([whole])


def _unhidden(mask: fx.Node) -> fx.Node:
    """A gathered mask before the places that only fill a row up were hidden in it."""
    arguments: Any = mask.args
    hides = mask.target in (aten.bitwise_and.Tensor, aten.logical_and.default, aten.masked_fill.Scalar)
    if hides and _ungathered(arguments[0], -1)[1] is not None:
        return arguments[0]
    return mask


def shown_by(masks: Sequence[fx.Node]) -> Visibility:
    """What masks show that may have been gathered more than once."""
    whole, picked = _ungathered(_unhidden(masks[0]), -1)
    whole, rows = _ungathered(whole, -2)
    return shown_by([whole]) if picked is not None and picked is rows else read_masks(masks, False)


def _ungathered(mask: fx.Node, dim: int) -> tuple[fx.Node, fx.Node | None]:
    """A mask before its dimension `dim` was gathered, and the tokens gathered; (mask, None) where it was not."""
    arguments: Any = mask.args
    if mask.target not in (aten.gather.default, aten.index_select.default) or arguments[1] % 4 != dim % 4:
        return mask, None
    picked = arguments[2]
    while picked.target in (aten.expand.default, aten.reshape.default, aten.select.int):
        picked = picked.args[0]
    whole = arguments[0]
    return (whole.args[0] if whole.target is aten.expand.default else whole), picked


def why_not(layer: LayerSite) -> str | None:
    """Why a layer's attention is not one this pass understands, as a sentence."""
    site = layer.attention
    if site is None:
        return "No attention was recovered in this layer."
    if site.spelling == "eager":
        return "Its attention is spelled eager; only scaled_dot_product_attention is rewritten."
    if site.past is not None or site.cross:
        return "Its keys are not the queries' own tokens, so this is no prompt."
    seen = shown(site)
    if seen.kind != "causal":
        return f"Its attention is {seen.kind}, not causal. Where tokens see later ones, transprune may leave some out."
    if seen.window >= 0:
        return f"It sees a window of {seen.window + 1} tokens only, which has little to save."
    if site.softcap is not None:
        return "It caps its logits, which the attention operators here do not."
    if site.sinks is not None:
        return (
            "Its softmax has sinks beside the keys, which the operators that score tokens here do not know."
        )
    return None
