"""What would spoil a quantization after hours, looked for before the first layer: weights and activations that are no
numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from thresher import tensor_files
from thresher.compat import has_values
from thresher.errors import ThresherError
from thresher.graph.nodes import module_fqn
from thresher.graph.program import Program

from .pieces import Batch
from .sweep import Sweep, bind

aten = torch.ops.aten
_PIECE = 1 << 22  # elements looked at a time
TOKENS = 64  # of one sequence, that a model is tried with


def bad_values(tensor: torch.Tensor) -> int:
    """How many NaN and infinite values a floating tensor has; a piece at a time."""
    flat = tensor.detach().reshape(-1)
    return sum(int((~torch.isfinite(piece)).sum()) for piece in flat.split(_PIECE)) if flat.numel() else 0


def check_weights(program: Program, files: Mapping[str, str]) -> None:
    """Raise ThresherError for NaN and infinite values in the model's weights; files: where each of them came from."""
    said: list[str] = []
    for held in program.weights.values():
        tensor = held.tensor
        own = not held.source and not held.fqn.startswith("constant.")
        if own and tensor.is_floating_point() and tensor.element_size() > 1 and has_values(tensor):
            if bad := bad_values(tensor):
                place = f" in {files[held.fqn]}" if held.fqn in files else ""
                said.append(f"{held.fqn}{place} has {bad} NaN or infinite values; repair the weight.")
            tensor_files.release()
    if said:
        raise ThresherError(" ".join(said[:8]) + (f" And {len(said) - 8} more." if len(said) > 8 else ""))


def check_activations(program: Program, batch: Batch) -> None:
    """Raise ThresherError, naming the module, where the model itself gives NaN or infinite activations.

    It runs as it is, in its own dtype, on the start of one sequence: what overflows in fp16 is found here.
    """
    inputs = bind(program, batch.inputs, (1, TOKENS))
    if batch.real is not None and not bool(batch.real[:1, :TOKENS].all()):
        return  # what a pad computes may be anything
    for node, found in Sweep(program).steps(inputs):
        if isinstance(found, torch.Tensor) and node.target in _PRODUCTS and bad_values(found):
            raise ThresherError(
                f"{module_fqn(node) or node.name} gives {bad_values(found)} NaN or infinite values for the first {TOKENS} "
                f"tokens of the calibration data, in {found.dtype}, before anything is quantized. Load the model in "
                "another dtype, or repair its weights."
            )


_PRODUCTS = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default}


def finite(rows: torch.Tensor, weights: torch.Tensor | None) -> bool:
    """Whether rows [..., K] are numbers, apart from those of weight 0: what a pad computes may be anything."""
    if bool(
        torch.isfinite(rows.sum())
    ):  # one pass over the rows, and a NaN or an infinite value comes through it
        return True
    fine = torch.isfinite(rows).all(-1)
    return bool(fine.all() if weights is None else (fine | (weights <= 0)).all())
