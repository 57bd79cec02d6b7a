"""Op `thresher::few_linear`: a linear layer for one or two tokens, with ReLU if one follows.

    few_linear(x [..., K], weight [N, K], bias? [N], relu) -> [..., N]

A decode step is a row of such products, each as long as its weight takes to come from memory. On a CPU
PyTorch's take up to twice that; the C++ kernel here does not. Inductor programs are given this operator in
place of `aten.linear` where it was measured to be faster (`lowering/inductor/few_tokens.py`). No pass emits it, so
every pass still sees plain linears.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
from pathlib import Path

import torch
from torch.nn import functional as F

from thresher import ops
from thresher.plain_form import Plain

from . import arguments, native
from .sparse import tune as sparse_tune

MOST_TOKENS = 2
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURE = (_P, _I, _L, _L, _L, _P, _P, _I, _P, _I)
_MIN_WORK = 1 << 19  # multiply-adds; below it a second thread costs more than it saves


def _fake(x, weight, bias, relu):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _inputs(device, dtype):
    g = torch.Generator().manual_seed(0)

    def sample(label, lead, inputs, outputs, bias, relu):
        def random(*size):
            return torch.randn(*size, generator=g).to(device, dtype)

        args = (random(*lead, inputs), random(outputs, inputs), random(outputs) if bias else None, relu)
        return ops.Sample(label, args)

    return [
        sample("one token", (1, 1), 256, 96, True, False),
        sample("two tokens, ReLU", (2,), 128, 64, True, True),
        sample("odd sizes", (1,), 77, 45, False, True),
        sample("wide", (2, 1), 4160, 7, False, False),
        sample("wide, one token", (1,), 4111, 9, True, False),
        sample("more tokens than it is for", (3, 2), 64, 48, True, False),
        sample("no token", (0,), 32, 16, True, False),
    ]


def check(x, weight, bias, relu) -> None:
    """Raise ArgumentError unless the arguments fit together. Reads metadata only."""
    arguments.dense_linear(x, weight, bias)


@ops.define(
    "few_linear(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor",
    fake=_fake,
    inputs=_inputs,
    # as for sparse_down: sums in another order, and the half types' own rounding
    tolerance={torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3},
    providers=("cpu_cpp",),
    plain=Plain(),
    check=check,
)
def few_linear(x, weight, bias, relu):
    """`x [..., K] @ weight [N, K]^T + bias [N]`, then max(0, .) where `relu`; fp32, [..., N]. For a few rows of x."""
    y = F.linear(x, weight, bias)
    return y.relu() if relu else y


@functools.cache
def _kernel():
    function = native.load("few_linear").thresher_few_linear
    function.argtypes, function.restype = _SIGNATURE, None
    return function


def _accepts(x, weight, bias, relu) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"The C++ kernel computes fp32 and bf16, not {x.dtype}."
    if math.prod(x.shape[:-1]) > MOST_TOKENS:
        return f"The C++ kernel is for up to {MOST_TOKENS} tokens."
    if not weight.is_contiguous() or not (bias is None or bias.is_contiguous()):
        return "The C++ kernel reads contiguous weights and biases only."
    return None


@few_linear.provider(
    "cpu_cpp",
    device="cpu",
    supported=functools.partial(native.load_error, "few_linear"),
    supports_args=_accepts,
)
def _few_linear(x, weight, bias, relu):
    x = x.contiguous()
    (outputs, inputs), tokens = weight.shape, math.prod(x.shape[:-1])
    out = x.new_empty((*x.shape[:-1], outputs))
    _kernel()(
        x.data_ptr(), x.dtype == torch.bfloat16, tokens, inputs, outputs, weight.data_ptr(),
        None if bias is None else bias.data_ptr(), relu, out.data_ptr(),
        torch.get_num_threads() if tokens * weight.numel() >= _MIN_WORK else 1,
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=1024)
def saves(outputs: int, inputs: int, dtype: torch.dtype, tokens: int) -> float:
    """Seconds that one call of this shape saves over `F.linear`, measured once a machine; 0 without the kernel."""
    if native.load_error("few_linear") is not None:
        return 0.0
    shape = [outputs, inputs, str(dtype), tokens, torch.get_num_threads()]
    key = json.dumps(["few_linear", Path(native.load("few_linear")._name).stem, torch.__version__, *shape])
    return sparse_tune.remembered(key, lambda: _measure(outputs, inputs, dtype, tokens))


def _measure(outputs: int, inputs: int, dtype: torch.dtype, tokens: int) -> float:
    weights = [
        torch.full((outputs, inputs), 0.5, dtype=dtype)
        for _ in range(sparse_tune.copies(outputs * inputs * dtype.itemsize))
    ]
    x = torch.ones(tokens, inputs, dtype=dtype)

    def pick(turn: int) -> torch.Tensor:
        return weights[turn % len(weights)]

    theirs, ours = sparse_tune.least_seconds(
        (lambda turn: F.linear(x, pick(turn)), lambda turn: _few_linear(x, pick(turn), None, False))
    )
    return theirs - ours
