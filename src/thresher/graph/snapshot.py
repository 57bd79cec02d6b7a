"""What a program was at one moment, so that somebody who may only look can be held to it."""

from __future__ import annotations

from typing import Any

from .program import Program


class Snapshot:
    """A program's nodes, weights and inputs as they are now, by identity: some microseconds a node and no text.

    A node's arguments are one immutable object that torch.fx replaces at every edit, so that comparing identities sees
    all edits of the graph. What lies in `node.meta` is not looked at.
    """

    def __init__(self, program: Program):
        self._nodes = _nodes(program)
        self._weights = {name: (w, w.tensor) for name, w in program.weights.items()}
        self._rest = _rest(program)

    def edit(self, program: Program) -> str | None:
        """What was edited since, as half a sentence (`it changed the node linear_3`); None where nothing was."""
        now = _nodes(program)
        before, after = {n[0]: n for n in self._nodes}, {n[0]: n for n in now}
        for node in after:
            if node not in before:
                return f"it added the node {node.name}"
        for node, was in before.items():
            if node not in after:
                return f"it removed the node {node.name}"
            if any(a is not b for a, b in zip(was[1:], after[node][1:])):
                return f"it changed the node {node.name}"
        if any(a[0] is not b[0] for a, b in zip(self._nodes, now)):
            return "it moved nodes"
        weights = {name: (w, w.tensor) for name, w in program.weights.items()}
        if weights.keys() != self._weights.keys():
            return f"it added or removed the weight {min(weights.keys() ^ self._weights.keys())}"
        for name, (weight, tensor) in weights.items():
            if weight is not self._weights[name][0] or tensor is not self._weights[name][1]:
                return f"it replaced the weight {weight.fqn}"
        for what, is_now, was_then in zip(
            ("inputs", "packing", "calls", "updates", "mask_name"), _rest(program), self._rest
        ):
            if is_now != was_then:
                return f"it changed the program's {what}"
        return None


def _nodes(program: Program) -> list[tuple[Any, ...]]:
    return [(n, n.op, n.target, n.args, n.kwargs) for n in program.graph.nodes]


def _rest(program: Program) -> tuple[Any, ...]:
    return (
        list(program.input_names),
        id(program.packing),
        id(program.calls),
        dict(program.updates),
        program.mask_name,
    )
