"""What would spoil a quantization after hours, looked for before the first layer: weights and activations that are no
numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import fx

from thresher import tensor_files
from thresher.compat import has_values
from thresher.errors import ThresherError
from thresher.graph.nodes import module_fqn
from thresher.graph.program import Program

from .pieces import Batch
from .sweep import Sweep, bind, exactness

aten = torch.ops.aten
_PIECE = 1 << 22  # elements looked at a time
EXACT = 1e-9
TOKENS = 64  # of one sequence, that a model is tried with


def bad_values(tensor: torch.Tensor) -> int:
    """How many NaN and infinite values a floating tensor has; a piece at a time."""
    flat = tensor.detach().reshape(-1)
    bad = 0
    for piece in flat.split(_PIECE) if flat.numel() else ():
        bad += int((~torch.isfinite(piece)).sum())
        tensor_files.release()  # of a mapped table no more than a piece is held
    return bad


def check_weights(program: Program, files: Mapping[str, str]) -> None:
    """Raise ThresherError for NaN and infinite values in the model's weights; files: where each of them came from.

    A buffer that is added to scores may hold minus infinity: a mask.
    """
    said: list[str] = []
    for node in program.graph.nodes:
        held = program.weight(node)
        if held is None or held.source or held.fqn.startswith("constant."):
            continue
        tensor = held.tensor
        if tensor.is_floating_point() and tensor.element_size() > 1 and has_values(tensor):
            bad = bad_values(tensor)
            if bad and not _may_be_mask(node, tensor):
                said.append(
                    f"{held.fqn}{_place(held.fqn, files)} has {bad} NaN or infinite values; repair the weight."
                )
    if said:
        raise ThresherError(" ".join(said[:8]) + (f" And {len(said) - 8} more." if len(said) > 8 else ""))


def _place(name: str, files: Mapping[str, str]) -> str:
    """In which file a bad weight lies; of one that the library put together, such as stacked experts, which tensor of which
    file is bad."""
    if name in files:
        return f" in {files[name]}"
    beside = name.rpartition(".")[0] + "."
    for other in sorted(n for n in files if n.startswith(beside)):
        tensor = tensor_files.MappedFile(Path(files[other])).tensor(other)
        if tensor.is_floating_point() and tensor.element_size() > 1 and bad_values(tensor):
            return f", made from {other} in {files[other]},"
    return ""


def _may_be_mask(node: fx.Node, tensor: torch.Tensor) -> bool:
    """Whether a tensor with values that are no numbers is none that is multiplied or looked up: -inf alone, in rows."""
    multiplied = any(user.target in (*_PRODUCTS, aten.embedding.default) for user in node.users)
    fine = bool(torch.isfinite(tensor).logical_or(tensor == -torch.inf).all()) if tensor.dim() > 1 else False
    return fine and not multiplied


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


def check_rotation(original: Program, rotated: Program, batch: Batch) -> float:
    """fp64 error of a rotated program on the start of one sequence; raises ThresherError above EXACT."""
    error = exactness(original, rotated, bind(original, batch.inputs, (1, TOKENS)))
    if not error <= EXACT:
        raise ThresherError(
            f"The rotated model differs from the original by {error:.1e} of its output in fp64, and {EXACT:.0e} is "
            "allowed: the recovered structure must be wrong. Use rotate=False, rotate_heads=False and "
            "rotate_down=False, and please report the model."
        )
    return error


def finite(rows: torch.Tensor, weights: torch.Tensor | None) -> bool:
    """Whether rows [..., K] are numbers, apart from those of weight 0: what a pad computes may be anything."""
    if bool(
        torch.isfinite(rows.sum())
    ):  # one pass over the rows, and a NaN or an infinite value comes through it
        return True
    fine = torch.isfinite(rows).all(-1)
    return bool(fine.all() if weights is None else (fine | (weights <= 0)).all())
