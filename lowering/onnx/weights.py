"""The weights of one exported part: read, stored anew under an ONNX type, and named in notes.

torch has no tensor of a 4-bit type, so such weights are held as bytes and named in `stored`: the exporter's
result gets the real type put back (`onnx_graph.restore_types`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from thresher.graph.edit import replace
from thresher.graph.nodes import fake_like
from thresher.graph.program import Program, Weight

from ..decompose import trace_before
from ..target import Runtime

symbolic = torch.onnx.ops.symbolic


@dataclass
class Stored:
    """The true ONNX type and shape of a weight held as bytes."""

    dtype: str
    shape: tuple[int, ...]


@dataclass
class Weights:
    """What the forms that replace nodes share in one export.

    runtime: what reads the file. accuracy_level: of `MatMulNBits`; 0 computes in fp32, 4 rounds activations to
    int8. stored: true types by weight attribute. notes: sentences for the record. functions: names of model-local
    functions the result needs.
    """

    program: Program
    runtime: Runtime
    accuracy_level: int = 0
    stored: dict[str, Stored] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    functions: set[str] = field(default_factory=set)

    def tensor(self, node: Any) -> torch.Tensor:
        """The tensor a node stands for. Raises ValueError for one that the graph computes."""
        weight = self.program.weight(node)
        if weight is None:
            raise ValueError(
                f"{getattr(node, 'name', node)} is computed in the graph; a quantized weight must be stored"
            )
        return weight.tensor.detach()

    def keep(self, node: fx.Node, name: str, tensor: torch.Tensor) -> fx.Node:
        """Store a tensor for `node`, as it is; the node that reads it."""
        place = self.program.get_weight(Weight(f"{node.name}.{name}", tensor.contiguous()), node)
        place.meta["val"] = fake_like(tensor.contiguous(), node)
        return place

    def hold(self, node: fx.Node, name: str, codes: torch.Tensor, dtype: str) -> fx.Node:
        """Store integer codes under an ONNX type; two to a byte, the first in the low bits, for 4-bit types."""
        if dtype in ("INT8", "UINT8"):
            return self.keep(node, name, codes.to(torch.int8 if dtype == "INT8" else torch.uint8))
        flat = (codes.reshape(-1).int() & 0xF).to(torch.uint8)
        flat = torch.cat([flat, flat.new_zeros(flat.numel() % 2)])
        place = self.keep(node, name, flat[0::2] | (flat[1::2] << 4))
        self.stored[str(place.target)] = Stored(dtype, tuple(codes.shape))
        return place

    def replace(self, node: fx.Node, form: Callable[..., Any], arguments: Sequence[Any]) -> None:
        """Put what `form` computes from graph arguments in a node's place."""
        replace(node, trace_before(self.program, node, form, list(arguments)), erase=True)

    def note(self, text: str) -> None:
        """Say something in the export's record, once."""
        if text not in self.notes:
            self.notes.append(text)
