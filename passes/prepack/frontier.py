"""Where padded values enter the packed body, and what each of its placeholders is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from thresher.graph.edit import call_before
from thresher.graph.nodes import value
from thresher.graph.packed_layout import Counted, Gather, Passed, PlanField, Visibility
from thresher.graph.program import Program
from thresher.graph.token_labels import copied

from ..extract import is_computed
from ..structure.sdpa import Attention
from ..tokens.axes import BATCH, SEQUENCE, TOKENS, Labels, Stop, TokenAxes, sizes
from ..tokens.labels import aten
from .island import Island


@dataclass
class Frontier:
    """The values that enter the body from outside it, with the labels they need there.

    sites: the attentions, by the node that holds the result. rows: sequences share rows, so that attention
        is masked; else the body is one row, and attention goes by segments.
    entering: node -> labels; all None for a value that is the same for every token.
    masks: masks of generic attention, passed as they are. prologue: nodes that must be computed padded.
    islands: parts that run on padded rows, by the node that holds the result. whole: what those read of the padded batch,
        passed as it is, behind the padding mask, whose size is theirs.
    """

    program: Program
    axes: TokenAxes
    sites: dict[fx.Node, Attention]
    visibilities: dict[fx.Node, Visibility]
    rows: bool = False
    islands: Mapping[fx.Node, Island] = field(default_factory=dict)
    padding: fx.Node | None = None
    entering: dict[fx.Node, Labels] = field(default_factory=dict)
    masks: list[fx.Node] = field(default_factory=list)

    @property
    def prologue(self) -> list[fx.Node]:
        return [n for n in [*self.entering, *self.passed] if n not in self.axes]

    @property
    def whole(self) -> list[fx.Node]:
        """What the islands read of the padded batch: the padding mask, and the values around each; none without islands."""
        if not self.islands or self.padding is None:
            return []
        around = [a for island in self.islands.values() for a in island.around]
        return list(dict.fromkeys([self.padding, *around]))

    @property
    def passed(self) -> list[fx.Node]:
        """Padded values that enter the body as they are: masks of generic attention, and what islands read."""
        return list(dict.fromkeys([*self.masks, *self.whole]))

    def explore(self) -> None:
        """Visit every labelled node's other arguments. Raises Stop when one cannot be laid out in tokens."""
        for node in list(self.axes.labels):
            if node.op == "placeholder":
                self.entering[node] = self.axes[node]
            elif node in self.islands:
                continue
            elif node in self.sites:
                mask = self.sites[node].mask
                if self.visibilities[node].kind == "generic" and mask is not None and mask not in self.masks:
                    self.masks.append(mask)
            elif node.target is aten.embedding.default:
                self._enter(node.args[1], self.axes[node][:-1])  # type: ignore[arg-type]
            else:
                for argument in node.all_input_nodes:
                    if is_computed(argument) and argument not in self.axes:
                        needed = self._needed(node, argument)
                        if self.rows and SEQUENCE in needed and BATCH not in needed:
                            argument, needed = self._for_each_row(node, argument)
                        self._enter(argument, needed)

    def _needed(self, node: fx.Node, argument: fx.Node) -> Labels:
        """Labels an unlabelled argument must have to line up with a node's labelled result."""
        if node.target in (aten.embedding.default, aten.linear.default, aten.mm.default, aten.addmm.default,
                           aten.matmul.default, aten.layer_norm.default, aten.rms_norm.default):  # fmt: skip
            return (None,) * value(argument).dim()
        result = self.axes[node]
        if not isinstance(result, tuple):
            raise Stop(f"{node.name} gives several results and takes {argument.name} beside the tokens")
        rank = value(argument).dim()
        aligned = result[len(result) - rank :] if rank else ()
        wide = {label for label, size in zip(aligned, sizes(argument)) if label is not None and size != 1}
        if not wide:
            return (None,) * rank
        if any(copied(label) not in (None, (1, 1)) for label in wide):
            raise Stop(f"{node.name} takes {argument.name} beside rows that hold each token several times")
        if BATCH in wide and SEQUENCE not in aligned:
            raise Stop(f"{argument.name} has a value per row and no sequence dimension")
        return aligned  # a size of 1 stands for all rows, or for all of a row's tokens

    def _for_each_row(self, node: fx.Node, argument: fx.Node) -> tuple[fx.Node, Labels]:
        """A table [sequence, ...] beside tokens [batch, ..., sequence, ...], as one with all their dimensions: rows that
        sequences share hold other positions each."""
        labels = self.axes[node]
        assert isinstance(labels, tuple)
        made = argument
        for _ in range(len(labels) - value(argument).dim()):
            made = call_before(node, aten.unsqueeze.default, (made, 0))
        node.replace_input_with(argument, made)
        return made, labels

    def _enter(self, node: fx.Node, labels: Labels) -> None:
        known = self.entering.get(node, labels)
        if known != labels:
            raise Stop(f"{node.name} is used with two different layouts")
        if (
            BATCH in labels
            and node.target is aten.embedding.default
            and labels[-1] is None
            and is_computed(node.args[1])
        ):
            # look the table up for real tokens only; a [B, S, hidden] tensor of pads is never made
            self.axes.labels[node] = labels
            self._enter(node.args[1], labels[:-1])  # type: ignore[arg-type]
            return
        self.entering[node] = labels


def body_inputs(
    frontier: Frontier, places: Sequence[fx.Node], prologue: Sequence[fx.Node]
) -> list[Gather | PlanField | Passed | Counted]:
    """Where each of the body's placeholders comes from, in the order `trace_body` makes them."""

    def origin(node: fx.Node) -> tuple[str, int]:
        return ("input", places.index(node)) if node in places else ("prologue", prologue.index(node))

    found: list[Gather | PlanField | Passed | Counted] = []
    for node, labels in frontier.entering.items():
        if TOKENS in labels:
            found.append(Gather(*origin(node), labels.index(TOKENS), labels.index(TOKENS)))
        elif SEQUENCE in labels:
            batch = labels.index(BATCH) if BATCH in labels else None
            found.append(Gather(*origin(node), batch, labels.index(SEQUENCE)))
        else:
            found.append(Passed(*origin(node)))
    found += [PlanField(name) for name in plan_fields(frontier)]
    return found + [Passed(*origin(m)) for m in frontier.passed]


def plan_fields(frontier: Frontier) -> list[str]:
    """What the body takes from the packing plan."""
    if frontier.rows:
        return ["segments", "columns"]
    return ["cu_seqlens", "max_len"] + (["rows", "columns"] if frontier.passed else [])
