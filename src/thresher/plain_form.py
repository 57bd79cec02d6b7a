"""An operator's plain form: what it means in ATen that every exporter knows, with no loops over data, no bit casts
and no views of bytes.

    @define("scale_rows(Tensor x, Tensor s) -> Tensor", ..., plain=Plain())            # its reference is plain ATen
    @define(..., plain=Plain(run=_plain))                                              # another function is
    @define(..., plain=Plain(run=_plain, spell=_spell))                                # and calls share parts of it
    @define(..., plain="It packs weights, before a program exists.")                   # there is none
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

NONE = "It has no form in plain operators."


class Spelling(Protocol):
    """A program in which operators are being replaced by their plain forms.

    added_masks: attention takes masks that are added to its scores, not bool ones.
    columns: the tokens' columns in the padded batch, int64 [T], where a plain form asked for them.
    """

    added_masks: bool
    columns: fx.Node | None

    def traced(self, node: fx.Node, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """Insert what `function` does with graph arguments before a node; the node or nodes of its result."""
        ...

    def once(
        self, key: Hashable, node: fx.Node, function: Callable[..., Any], arguments: Sequence[Any]
    ) -> Any:
        """The same for what several calls share: inserted before the first that asks for `key`."""
        ...

    def constant(self, name: str, node: fx.Node, tensor: torch.Tensor) -> fx.Node:
        """A tensor as a weight of the program, stored once under a name; the node that reads it, before `node`."""
        ...


@dataclass(frozen=True)
class Plain:
    """An operator in plain ATen.

    run: a function of the operator's own arguments; None where the reference is one.
    spell: puts one call into a program and gives the node of its result, where a program's calls share parts
        (masks, constants); else `run` is traced in place of each call.
    says: a full sentence for reports on what it costs, such as memory that grows; empty for nothing.
    loss: a full sentence on what is lost, such as that nothing is skipped any more; empty for nothing.
    columns: for a call, how many packed tokens it has, where its plain form counts in the padded batch's columns
        (`Spelling.columns`); None where it does not.
    """

    run: Callable[..., Any] | None = None
    spell: Callable[[Spelling, fx.Node], Any] | None = None
    says: str = ""
    loss: str = ""
    columns: Callable[[fx.Node], Any] | None = None
