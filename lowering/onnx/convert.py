"""One program as an ONNX model: its own operators replaced, the rest through torch's exporter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from thresher.errors import ThresherError
from thresher.graph.program import Program

from ..decompose import add_masks, columns_wanted, decompose, losses, op_name, own_nodes
from ..target import Runtime
from . import tables as onnx_tables
from .attention import group_query, whole_masks
from .translate import translate
from .weights import Weights


class Parts:
    """Converts the parts of one export; collects what they say.

    word: what the user calls the runtime. stage: called with the name of each step as it begins, to show progress.
    """

    def __init__(
        self,
        runtime: Runtime,
        word: str,
        accuracy_level: int,
        opset: int,
        table_bits: int,
        stage: Callable[[str], None] = lambda _: None,
    ):
        self.runtime, self.word, self.accuracy_level = runtime, word, accuracy_level
        self.opset, self.table_bits, self.stage = opset, table_bits, stage
        self.notes: list[str] = []
        self.functions: set[str] = set()
        self.fields: list[str] = []
        self.products: dict[str, str] = {}

    def convert(self, program: Program, name: str) -> Any:
        """One program as an untidied ONNX model; weights are called by their FQN."""
        from .graph import rename_initializers, restore_types, weights_of_products

        self.stage(f"translating the {name}")
        copy = program.copy()
        weights = Weights(copy, self.runtime, self.accuracy_level, notes=self.notes, functions=self.functions)
        for node in own_nodes(copy):
            form = self.runtime.forms.get(op_name(node))
            if form is not None:
                try:
                    form.put(node, weights)
                except ValueError as reason:
                    raise ThresherError(
                        f"{node.name} cannot be exported for {self.word}: {reason}."
                    ) from None
        if self.table_bits:
            onnx_tables.shrink(weights)
        if self.runtime.added_masks:
            add_masks(copy)
        if self.runtime.segments:
            group_query(weights)
        if not self.runtime.added_masks:
            whole_masks(copy)
        self.notes += [f"{count} {name} nodes: {loss}" for count, name, loss in losses(copy)]
        tokens = columns_wanted(copy)
        columns = _columns(copy, tokens) if tokens is not None else None
        decompose(copy, added_masks=self.runtime.added_masks, columns=columns)
        self.fields = list(copy.input_names)
        model = translate(copy, self.opset)
        prefix = "module."
        restore_types(model, {prefix + n: k for n, k in weights.stored.items()})
        rename_initializers(model, {prefix + n: w.fqn for n, w in copy.weights.items()})
        self.products |= weights_of_products(model)
        return model


def _columns(program: Program, tokens: Any) -> fx.Node:
    """The tokens' columns, int64 [tokens], as an input of a packed body, added when it has none."""
    for place, name in zip(program.placeholders, program.input_names, strict=True):
        if name == "columns":
            return place
    last = program.placeholders[-1]
    with program.graph.inserting_after(last):
        place = program.graph.placeholder("columns")
    mode = program.fake_mode()
    with mode:
        place.meta["val"] = torch.empty(tokens, dtype=torch.int64)
    program.input_names.append("columns")
    return place
