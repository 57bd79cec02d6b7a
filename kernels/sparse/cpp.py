"""The C++ kernels of the sparse MLP operators, and the dense product they stand against, as functions.

All take activations [..., F], fp32 or bf16, and a neuron-major weight of the same dtype, or int8 with
a scale. The C++ kernels' results are bitwise the same for any thread count and batch. At low
densities a call lasts a tenth of a millisecond, so the wrappers create no tensor but the result.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch

from .. import native
from . import down as defs

_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
_ZERO = torch.zeros(1)
_SLAB = 1 << 21  # weights widened at a time for a product in fp32: 8 MiB
_MIN_WORK = 1 << 19  # multiply-adds; below it a second thread costs more than it saves


@functools.cache
def _function(name: str, signature: tuple[type, ...], result: type | None = _L):
    function = getattr(native.load("sparse_mlp"), name)
    function.argtypes, function.restype = signature, result
    return function


_DOWN = (_P, _I, _L, _L, _L, _P, _I, _P, _I, _P, _L, _P, _P, _L, _I)
_MLP = (_P, _P, _I, _L, _L, _L, _L, _P, _I, _P, _I, _P, _P, _I, _P, _P, _L, _P, _P, _L, _I)


@functools.cache
def down_kernel():
    """The C function behind `down`; returns the number of neurons in the union, -1 above the limit."""
    return _function("thresher_sparse_down", _DOWN)


_DENSE = (_P, _L, _L, _L, _P, _P, _P, _I)
_MOST_DENSE_TOKENS = 128  # above, PyTorch's product wins in spite of reordering the weight


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _MIN_WORK else 1


def refuses(act: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    """Why the kernels cannot take this call, or None."""
    if act.dtype not in (torch.float32, torch.bfloat16):
        return f"The C++ kernel computes fp32 and bf16 activations, not {act.dtype}."
    if not weight.numel():
        return "The weight is empty."
    if not all(t is None or t.is_contiguous() for t in (weight, *others)):
        return "The C++ kernel reads contiguous weights, scales, biases and thresholds only."
    return None


def down(
    act: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    threshold: torch.Tensor | None,
    limit: int,
) -> tuple[torch.Tensor | None, int]:
    """(result [..., D], neurons in the union); (None, -1) when the union exceeds `limit` neurons."""
    act = act.contiguous()
    out = act.new_empty((*act.shape[:-1], defs.features_of(weight)))
    active = down_kernel()(*down_arguments(act, weight, scale, bias, threshold, limit, out))
    return (out if active >= 0 else None), active


def down_arguments(act, weight, scale, bias, threshold, limit: int, out: torch.Tensor) -> tuple:
    """What `down_kernel()` takes for a call that writes `out`; all tensors must outlive it."""
    neurons, features = weight.shape[0], out.shape[-1]
    tokens = math.prod(act.shape[:-1])
    limits = _ZERO if threshold is None else threshold
    return (
        act.data_ptr(),
        _TYPES[act.dtype],
        tokens,
        neurons,
        features,
        limits.data_ptr(),
        threshold is not None and limits.dim() == 1,
        weight.data_ptr(),
        _TYPES[weight.dtype],
        _pointer(scale),
        1 if scale is None else scale.numel() // max(neurons, 1),
        _pointer(bias),
        out.data_ptr(),
        limit,
        _threads(tokens * neurons * features),
    )


def mlp(
    gate: torch.Tensor,
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_scale: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    up_act: str,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    threshold: torch.Tensor | None,
    limit: int,
) -> tuple[torch.Tensor | None, int]:
    """As `down`, with gate [..., F] and x [..., K]; the count is of neurons whose gate is kept."""
    gate, x = gate.contiguous(), x.contiguous()
    (neurons, features), width = weight.shape, x.shape[-1]
    tokens = math.prod(gate.shape[:-1])
    out = torch.empty((*gate.shape[:-1], features), dtype=gate.dtype)
    limits = _ZERO if threshold is None else threshold
    active = _function("thresher_sparse_mlp", _MLP)(
        gate.data_ptr(),
        x.data_ptr(),
        _TYPES[gate.dtype],
        tokens,
        neurons,
        width,
        features,
        limits.data_ptr(),
        limits.dim() == 1 and threshold is not None,
        up_weight.data_ptr(),
        _TYPES[weight.dtype],
        _pointer(up_scale),
        _pointer(up_bias),
        up_act == "relu",
        weight.data_ptr(),
        _pointer(scale),
        1 if scale is None else scale.numel() // max(neurons, 1),
        _pointer(bias),
        out.data_ptr(),
        limit,
        _threads(tokens * neurons * (width + features)),
    )
    return (out if active >= 0 else None), active


@functools.cache
def _multiplies_bf16() -> bool:
    return bool(native.cpu_features() & {"amx_bf16", "avx512_bf16"})


def matmul(
    h: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """`h @ dequantized(weight) + bias` with every neuron read, from the neuron-major copy; [..., D].

    By PyTorch's own product, but for a few bf16 tokens on CPUs that multiply bf16.

    A weight that the CPU cannot multiply as it is kept is widened to fp32 a slab at a time.
    """
    neurons, features = weight.shape[0], defs.features_of(weight)
    flat = h.reshape(-1, neurons)
    if weight.dtype == h.dtype == torch.bfloat16 and 0 < flat.shape[0] <= _MOST_DENSE_TOKENS:
        out = torch.empty(flat.shape[0], features, dtype=h.dtype)
        flat = flat.contiguous()
        done = _function("thresher_dense_bf16", _DENSE, _I)(
            flat.data_ptr(), flat.shape[0], neurons, features, weight.data_ptr(), _pointer(bias), out.data_ptr(),
            _threads(flat.shape[0] * neurons * features),
        )  # fmt: skip
        if done:
            return out.view(*h.shape[:-1], features)
    if weight.dtype == h.dtype and (h.dtype == torch.float32 or _multiplies_bf16()):
        out = torch.mm(flat, weight) if bias is None else torch.addmm(bias, flat, weight)
    else:
        total = torch.zeros(flat.shape[0], features)
        step = max(1, _SLAB // max(features, 1))
        for first in range(0, neurons, step):
            rows = slice(first, first + step)
            slab = defs.dequantized(weight[rows], None if scale is None else scale[rows], torch.float32)
            total.addmm_(flat[:, rows].float(), slab)
        out = (total if bias is None else total + bias.float()).to(h.dtype)
    return out.view(*h.shape[:-1], features)


def large_pages(weight: torch.Tensor) -> None:
    """Ask the system for large pages under a CPU weight, best before it is filled; contents stay.

    Rows are read far apart, and each first touch of a small page is a look-up of its own.
    """
    call = _function("thresher_large_pages", (_P, _L), None)
    call(weight.data_ptr(), weight.numel() * weight.element_size())
