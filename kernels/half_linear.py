"""Op `thresher::half_linear`: a linear layer of bf16 or float16 where the CPU has no instructions for them.

    half_linear(x [..., K], weight [N, K], bias? [N]) -> [..., N]

PyTorch's half products take about eight times as long as its fp32 ones on such a CPU (AVX2; for float16 also most with
AVX-512). The C++ kernel here widens a panel of the weight to fp32, once for all tokens, and takes the time of fp32. On those
machines lowering puts this operator in place of `aten.linear` (`lowering/half_linears.py`), so every pass still sees plain
linears.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch.nn import functional as F

from thresher import ops
from thresher.plain_form import Plain
from thresher.pricing import LinearRate

from . import arguments, native

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the kernel multiplies, with the numbers that C++ knows them by. fp32 is there to be compared with: PyTorch's own
products take the same time."""
HALVES = (torch.bfloat16, torch.float16)
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURE = (_P, _I, _L, _L, _L, _P, _P, _P, _I)
_MIN_WORK = 1 << 19  # multiply-adds; below it a second thread costs more than it saves


def _fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _inputs(device, dtype):
    g = torch.Generator().manual_seed(0)

    def sample(label, lead, inputs, outputs, bias):
        def random(*size):
            return torch.randn(*size, generator=g).to(device, dtype)

        return ops.Sample(
            label, (random(*lead, inputs), random(outputs, inputs), random(outputs) if bias else None)
        )

    return [
        sample("one token", (1, 1), 256, 96, True),
        sample("few tokens", (2, 3), 77, 45, False),
        sample("whole tiles", (4, 12), 64, 64, True),
        sample("odd sizes", (5, 7), 521, 37, True),
        sample("fewer columns than a panel", (29,), 40, 5, False),
        sample("more tokens than a block", (800,), 24, 48, True),
        sample("no token", (0,), 32, 16, True),
    ]


def _rate(dtype: torch.dtype) -> LinearRate:
    """Times dense weights of a type by what programs multiply them with on this machine."""

    def weight(side: int) -> tuple[torch.Tensor, ...]:
        return (torch.randn(side, side).to(dtype),)

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.to(weight.dtype)
        return half_linear.direct(x, weight, None) if gains(dtype) else F.linear(x, weight)

    return LinearRate(f"linear.{str(dtype).removeprefix('torch.')}", weight, run)


@ops.define(
    "half_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=_fake,
    inputs=_inputs,
    # sums in another order, and the half types' own rounding
    tolerance={torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3},
    providers=("cpu_cpp",),
    plain=Plain(),
    rates=[_rate(dtype) for dtype in HALVES],
    check=arguments.dense_linear,
)
def half_linear(x, weight, bias):
    """`x [..., K] @ weight [N, K]^T + bias [N]` in x's dtype, added up in fp32 and rounded once, [..., N]."""
    return F.linear(x, weight, bias)


@functools.cache
def _kernel():
    function = native.load("half_linear").thresher_half_linear
    function.argtypes, function.restype = _SIGNATURE, None
    return function


def _accepts(x, weight, bias) -> str | None:
    if x.dtype not in TYPES:
        return f"The C++ kernel computes fp32, bf16 and float16, not {x.dtype}."
    if not weight.is_contiguous() or not (bias is None or bias.is_contiguous()):
        return "The C++ kernel reads contiguous weights and biases only."
    return None


@half_linear.provider(
    "cpu_cpp",
    device="cpu",
    supported=functools.partial(native.load_error, "half_linear"),
    supports_args=_accepts,
)
def _half_linear(x, weight, bias):
    x = x.contiguous()
    (outputs, inputs), tokens = weight.shape, math.prod(x.shape[:-1])
    out = x.new_empty((*x.shape[:-1], outputs))
    _kernel()(
        x.data_ptr(), TYPES[x.dtype], tokens, inputs, outputs, weight.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(),
        torch.get_num_threads() if tokens * weight.numel() >= _MIN_WORK else 1,
    )  # fmt: skip
    return out


def gains(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for PyTorch's products of a half type, and the kernel here is there."""
    # the CPU is asked first: where it multiplies the type, nobody waits for a kernel to be built
    return dtype in HALVES and not _multiplies(dtype) and native.load_error("half_linear") is None


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether PyTorch has instructions of this CPU for a half type's products."""
    known = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        return bool(getattr(torch.ops.mkldnn, known)())
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return False
