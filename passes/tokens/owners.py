"""Whose tokens a value is made of, where a model reads several sequences: encoder and decoder, text and image.

A decoder's hidden states come from the decoder's ids and, through cross attention, from the encoder's too; they are the
decoder's tokens, and pads among them are what the decoder's mask says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.graph.program import Program

aten = torch.ops.aten
_KINDS = ("input_ids", "inputs_embeds", "input_features", "input_values")
_MASK = "attention_mask"


class Owners:
    """For each node of a program, the input its tokens come from."""

    def __init__(self, program: Program):
        self._from: dict[fx.Node, frozenset[str]] = {}
        names = dict(zip(program.placeholders, program.input_names))
        ids = {n for node in program.nodes(aten.embedding.default) for n in _behind(node.args[1])}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                known = value(node)
                carries = isinstance(known, torch.Tensor) and (
                    node in ids or (known.is_floating_point() and known.dim() > 2)
                )
                self._from[node] = frozenset(
                    {names[node]} if carries and not names[node].endswith("mask") else ()
                )
            else:
                parts = (self._from.get(a, frozenset()) for a in node.all_input_nodes)
                self._from[node] = frozenset().union(*parts)

    def of(self, node: fx.Node) -> str | None:
        """The input whose tokens a value holds: the decoder's where it sees both; None without such an input."""
        found = sorted(self._from.get(node, ()), key=lambda n: (not n.startswith("decoder"), "pixel" in n, n))
        return found[0] if found else None

    def mask(self, node: fx.Node) -> str | None:
        """What the padding mask of these tokens is called; None for values that have none, such as an image's patches."""
        owner = self.of(node)
        if owner is None or "pixel" in owner:
            return None
        kind = next((k for k in _KINDS if owner.endswith(k)), None)
        return owner.removesuffix(kind) + _MASK if kind is not None else _MASK

    def real(self, node: fx.Node, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """bool [batch, sequence], true at a value's real tokens, from the inputs by name; None where all are real."""
        name = self.mask(node)
        given = inputs.get(name) if name is not None else None
        return given != 0 if isinstance(given, torch.Tensor) and given.dim() == 2 else None


def _behind(node: Any) -> list[fx.Node]:
    """The placeholders that indices are computed from, masks aside."""
    found, stack, seen = [], [node], set()
    while stack:
        one = stack.pop()
        if not isinstance(one, fx.Node) or one in seen:
            continue
        seen.add(one)
        if one.op == "placeholder":
            found.append(one)
        elif one.target is not aten.sym_size.int:
            stack += one.all_input_nodes
    return found
