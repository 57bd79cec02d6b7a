"""CPU provider of `token_transition`: the three sums in one reading of both inputs (C++)."""

from __future__ import annotations

import ctypes

import torch

from .. import native
from . import transition as defs

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _refuse(x, fx):
    return None if x.dtype in _KINDS else f"It reads {', '.join(map(str, _KINDS))}; x is {x.dtype}."


@defs.token_transition.provider(
    "cpu_cpp",
    device="cpu",
    supported=lambda: native.load_error("token_transition"),
    supports_args=_refuse,
)
def _token_transition_cpp(x, fx):
    x, fx = x.contiguous(), fx.contiguous()
    magnitude, cosine = defs._fake_pair(x, fx)
    width = x.shape[-1]
    native.load("token_transition").token_transition(
        *(native.pointer(t) for t in (x, fx, magnitude, cosine)),
        ctypes.c_int64(magnitude.numel()),
        ctypes.c_int64(width),
        _KINDS[x.dtype],
        torch.get_num_threads(),
    )
    return magnitude, cosine
