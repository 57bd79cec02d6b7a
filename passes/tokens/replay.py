"""Runs a program's nodes again for fewer tokens: how a pass shortens the sequence halfway.

What `Replay` computes is traced (`retrace`). It fits every value made for other tokens to those of the current
`Frame`. Sizes that a graph spells out (reshapes, expansions) are written anew from the labels of `axes`, so a
graph captured at fixed sizes is shortened as well as one with symbols.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import module_fqn, value
from thresher.graph.program import Program
from thresher.graph.token_labels import copied

from ..extract import is_computed
from ..structure.sdpa import attention
from .axes import BATCH, SEQUENCE, Labels, Stop, TokenAxes, sizes
from .frame import Frame, along, pick, put

aten = torch.ops.aten

_SHAPED = {aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int}
_NO_BROADCAST = {
    aten.embedding.default, aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default,
    aten.layer_norm.default, aten.rms_norm.default,
}  # fmt: skip


def call(node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    """A node's value as the program has it."""
    args: Any = fx.node.map_arg(node.args, lambda n: env[n])
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: env[n])
    with fx.traceback.set_current_meta(node):
        return node.target(*args, **kwargs)  # type: ignore[operator]


def needed(axes: TokenAxes, node: fx.Node, argument: fx.Node) -> Labels:
    """Labels that an argument without any must have to line up with a labelled node's result. Raises Stop."""
    rank = value(argument).dim()
    if node.target in _NO_BROADCAST:
        return (None,) * rank
    result = axes[node]
    if not isinstance(result, tuple):
        raise Stop(f"{node.name} gives several results and takes {argument.name} beside the tokens")
    aligned = result[len(result) - rank :] if rank else ()
    wide = {label for label, size in zip(aligned, sizes(argument)) if label is not None and size != 1}
    if any(copied(label) for label in wide):
        raise Stop(
            f"{node.name} takes {argument.name} beside tokens whose rows were merged into one dimension"
        )
    return tuple(
        label if SEQUENCE in wide and (label in (SEQUENCE, BATCH) or size != 1) else None
        for label, size in zip(aligned, sizes(argument))
    )


def packed_attention() -> Any:
    """The operator of attention over packed sequences."""
    return torch.ops.thresher.varlen_attention.default


def check(program: Program, axes: TokenAxes) -> None:
    """Raise Stop unless everything the labelled nodes read can be fitted to fewer tokens."""
    attentions = (aten.scaled_dot_product_attention.default, packed_attention())
    for node in axes.labels:
        if node.op != "call_function" or node.target in attentions:
            continue
        for argument in node.all_input_nodes:
            if is_computed(argument) and argument not in axes:
                needed(axes, node, argument)


class Replay:
    """The state of one trace: values by node, and the frame of each labelled one.

    env: values of nodes that are the same for every choice of tokens. axes: labels from the first boundary on.
    tables: unlabelled values that stand for positions, such as rotary tables.
    """

    def __init__(
        self, axes: TokenAxes, env: dict[Any, Any], length: Any, tables: Container[fx.Node] = frozenset()
    ):
        self.axes, self.env, self.tables = axes, env, tables
        self.root = self.frame = Frame(None, None, length)
        self.home: dict[fx.Node, Frame] = {}

    def compute(self, node: fx.Node) -> Any:
        """A node's value for the current frame's tokens; kept."""
        result = self.value_in(node, self.frame)
        self.env[node] = result
        if node in self.axes:
            self.home[node] = self.frame
        return result

    def narrow(self, index: torch.Tensor, length: Any) -> Frame:
        """Go on with tokens `index` [B, L] of the current frame."""
        self.frame = Frame(self.frame, index, length)
        return self.frame

    def value_in(self, node: fx.Node, frame: Frame) -> Any:
        """Compute one node from values fitted to a frame."""
        if node not in self.axes or frame.step is None:
            return call(node, self.env if frame is self.root else {**self.env, **frame.values})
        if node.target is packed_attention():
            given = {
                n: self.fit(n, node, frame) if n in self.axes else self.env[n] for n in node.all_input_nodes
            }
            given[node.all_input_nodes[3]] = frame.offsets
            return call(node, given)
        if node.target is aten.scaled_dot_product_attention.default:
            given = {n: self.fit(n, node, frame) for n in node.all_input_nodes}
            mask = attention(node).mask
            if mask is not None:
                given[mask] = self._fit_mask(mask, frame)
            return call(node, given)
        given = {n: self.fit(n, node, frame) for n in node.all_input_nodes}
        if node.target in _SHAPED or node.target is aten.expand.default:
            target = aten.expand.default if node.target is aten.expand.default else aten.reshape.default
            with fx.traceback.set_current_meta(node):
                return target(given[node.all_input_nodes[0]], self._shape(node, frame))
        return call(node, given)

    def fit(self, argument: fx.Node, reader: fx.Node, frame: Frame) -> Any:
        """An argument's value for a frame's tokens."""
        if argument in frame.values:
            return frame.values[argument]
        known = self.env[argument]
        if not is_computed(argument):
            return known
        if argument in self.axes:
            home = self.home.get(argument, self.root)
            labels: Any = self.axes[argument]
        else:
            home = self.root
            if reader.target is aten.scaled_dot_product_attention.default:
                return known  # the mask, which has its own way
            labels = needed(self.axes, reader, argument)
        index = frame.positions() if argument in self.tables else frame.since(home)
        if index is None or not isinstance(labels, tuple) or SEQUENCE not in labels:
            return known
        key = (argument, labels)
        if key not in frame.fitted:
            if BATCH not in labels:  # alike for all rows, but each row keeps tokens of its own
                wide = self.axes[reader]
                known = known.reshape([1] * (len(wide) - known.dim()) + list(known.shape))
                labels = tuple(
                    BATCH if w == BATCH else own
                    for w, own in zip(wide, (None,) * (len(wide) - len(labels)) + labels)
                )
            frame.fitted[key] = pick(known, labels, index)
        return frame.fitted[key]

    def now(self, node: fx.Node) -> Any:
        """A labelled value, or one from before the first boundary, for the current frame's tokens."""
        index = self.frame.since(self.home.get(node, self.root))
        if index is None:
            return self.env[node]
        if node not in self.frame.fitted:
            self.frame.fitted[node] = pick(self.env[node], self.axes[node], index)
        return self.frame.fitted[node]

    def _fit_mask(self, mask: fx.Node, frame: Frame) -> Any:
        index = frame.since(self.root)
        if index is None:
            return self.env[mask]
        if (mask, "mask") not in frame.fitted:
            full = self.env[mask]
            full = full.reshape([1] * (4 - full.dim()) + list(full.shape))
            rows, columns = full.shape[-2:]
            if not (isinstance(rows, int) and rows == 1):
                full = pick(full, (BATCH, None, SEQUENCE, None), index)
            if not (isinstance(columns, int) and columns == 1):
                full = pick(full, (BATCH, None, None, SEQUENCE), index)
                if frame.real is not None and frame.real.dim() == 2:
                    shown = frame.real[:, None, None]
                    least = torch.finfo(full.dtype).min if full.is_floating_point() else None
                    full = full & shown if least is None else full.masked_fill(~shown, least)
            frame.fitted[(mask, "mask")] = full
        return frame.fitted[(mask, "mask")]

    def _shape(self, node: fx.Node, frame: Frame) -> list[Any]:
        wanted: list[Any] = []
        for label, size in zip(self.axes[node], value(node).shape):
            if label == SEQUENCE:
                wanted.append(frame.length)
            elif label is None and isinstance(size, int):
                wanted.append(size)
            elif label == BATCH:
                wanted.append(size if isinstance(size, int) or frame.step is None else frame.step.shape[0])
            else:
                wanted.append(-1)
        if wanted.count(-1) > 1:
            raise Stop(f"{node.name} has two sizes that cannot be told in advance")
        return wanted

    def ahead(self, target: fx.Node, start: fx.Node, rows: torch.Tensor | None, given: Any = None) -> Any:
        """The value of a node further on, for tokens `rows` [B, P] of the frame only (None: all of them).

        start: all the labelled data that `target` needs. given: its value for those tokens, where it is not
        the one at hand. Nothing is kept.
        """
        now = self.frame
        if rows is None:
            frame = Frame(now.parent, now.step, now.length, paths=dict(now.paths), numbered=now.numbered)
            frame.values = {start: self.now(start) if given is None else given}
        else:
            frame = Frame(now, rows, rows.shape[1])
            frame.values = {start: pick(self.now(start), self.axes[start], rows) if given is None else given}
        self._fill(target, frame)
        return frame.values[target]

    def _fill(self, target: fx.Node, frame: Frame) -> None:
        stack = [target]
        while stack:
            node = stack[-1]
            if node in frame.values or (node in self.env and node not in self.axes):
                stack.pop()
                continue
            waiting = [
                n
                for n in node.all_input_nodes
                if n not in frame.values and (n in self.axes or n not in self.env) and n.op == "call_function"
            ]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            if node not in self.axes:
                self.env[node] = call(node, self.env)
            else:
                frame.values[node] = self.value_in(node, frame)

    def restored(self, node: fx.Node, base: torch.Tensor | None = None) -> Any:
        """A value for all tokens again, those left out being `base`'s, or zero."""
        known, home = self.env[node], self.home.get(node, self.root)
        index = home.since(self.root)
        labels = self.axes.get(node)
        if index is not None and isinstance(labels, tuple) and any(map(copied, labels)):
            raise Stop(
                f"{module_fqn(node) or node.name} is read whole, and its rows were merged into one dimension"
            )
        if index is None or not isinstance(labels, tuple) or SEQUENCE not in labels:
            return known
        if BATCH not in labels:
            raise Stop(f"{module_fqn(node) or node.name} has no batch dimension to put tokens back into")
        if home.real is not None:  # fillers leave nothing behind
            real = along(home.real, labels)
            left = torch.zeros_like(known) if base is None else pick(base, labels, index)
            known = torch.where(real, known, left)
        if base is None:
            shape = list(known.shape)
            shape[labels.index(SEQUENCE)] = self.root.length
            base = known.new_zeros(shape)
        return put(base, labels, index, known)
