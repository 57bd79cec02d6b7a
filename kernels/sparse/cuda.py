"""CUDA providers of the sparse MLP operators: the Triton kernels for few tokens, else a dense product.

The device alone knows how many neurons are active, and waiting for it would cost more than the
kernel, so here the number of tokens decides: up to `bmax` (and 16) the sparse kernels run at any
density, since at full density they are a split-K product; `tau` = 0 forbids them.
"""

from __future__ import annotations

import math

import torch

from thresher import site_counts

from .. import optional_triton
from . import down as down_defs
from . import mlp as mlp_defs
from . import triton_kernels as kernels

CHUNK = 256  # neurons a program sums; at 5 % some 13 of them, and F / 256 * D / 128 programs fill a GPU
MAX_TOKENS = 16
_MASKED_TOKENS = 2  # up to here `gemv`, which needs no list
GEMV = {"BK": 16, "BN": 128, "num_warps": 4}  # of fp32 half as many rows, which spill otherwise
UP = {"BR": 16, "BK": 128, "num_warps": 4}
DOWN = {"BK": 16, "BN": 128, "num_warps": 4}
REDUCE = {"BN": 256, "num_warps": 2}  # four sums a thread: loads of 16 bytes


def _supported() -> str | None:
    if optional_triton.MISSING is not None:
        return optional_triton.MISSING
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU."
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "The Triton kernels need compute capability 8.0."
    return None


def _refuses(act, weight, scale, *others) -> str | None:
    if act.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"The Triton kernels compute fp32, bf16 and fp16 activations, not {act.dtype}."
    if weight.dtype == torch.uint8:
        return "The Triton kernels read int8 and unquantized weights, not 4-bit codes."
    if not all(t is None or t.is_contiguous() for t in (weight, scale, *others)):
        return "The Triton kernels read contiguous weights, scales, biases and thresholds only."
    groups = 1 if scale is None else scale.numel() // max(1, scale.shape[0])
    if groups > 1 and (weight.shape[1] // groups) % DOWN["BN"]:
        return f"Groups of {weight.shape[1] // groups} columns are not a multiple of {DOWN['BN']}."
    return None


def _accepts_down(act, weight, scale, bias, threshold, tau, bmax, site):
    return _refuses(act, weight, scale, bias, threshold)


def _accepts_mlp(
    gate, x, up_weight, up_scale, up_bias, up_act, weight, scale, bias, threshold, tau, bmax, site
):
    return _refuses(gate, weight, scale, up_weight, up_scale, up_bias, bias, threshold)


def _dense(h, weight, scale, bias):
    """`h @ weight + bias` from the neuron-major copy."""
    return torch.nn.functional.linear(h, down_defs.dequantized(weight, scale, h.dtype).t(), bias)


def _threshold_kind(threshold: torch.Tensor | None) -> int:
    return 0 if threshold is None else 1 if threshold.dim() == 0 else 2


def _grouping(weight: torch.Tensor, scale: torch.Tensor | None) -> tuple[int, int]:
    groups = 1 if scale is None else scale.numel() // max(1, weight.shape[0])
    return groups, weight.shape[1] // groups


class _Call:
    """The workspace of one call, and the launches that sparse_down and sparse_mlp share."""

    def __init__(self, act: torch.Tensor, weight: torch.Tensor, site: str):
        self.neurons, self.features = weight.shape
        self.tokens = math.prod(act.shape[:-1])
        self.act, self.weight, self.site = act.contiguous(), weight, site
        self.chunks = -(-self.neurons // CHUNK)
        self.device = act.device
        self.counts = torch.empty(self.chunks, dtype=torch.int32, device=self.device)
        self.partials = torch.empty(self.chunks, self.tokens, self.features, device=self.device)
        # tl.dot needs 16 rows; below 3 tokens plain sums are cheaper than 13 rows of nothing.
        self.padded = 16 if self.tokens > _MASKED_TOKENS else self.tokens
        self.precision = "ieee" if act.dtype == torch.float32 else "tf32"  # the second is not used by halves

    def gemv(self, scale, threshold) -> None:
        groups, width = _grouping(self.weight, scale)
        tile = GEMV | {"BK": 8} if self.weight.dtype == torch.float32 else GEMV
        grid = (-(-self.features // tile["BN"]), self.chunks)
        kernels.gemv[grid](
            self.act, self.weight, scale, threshold, self.partials, self.counts, self.tokens, self.neurons,
            self.features, groups, width, THRESHOLD=_threshold_kind(threshold), SCALED=scale is not None,
            CHUNK=CHUNK, BT=self.padded, **tile,
        )  # fmt: skip

    def compact(self, threshold) -> None:
        places = self.chunks * CHUNK
        self.index = torch.empty(places, dtype=torch.int32, device=self.device)
        self.value = torch.empty(places, self.padded, device=self.device)
        kernels.compact[(self.chunks,)](
            self.act, threshold, self.index, self.value, self.counts, self.tokens, self.neurons,
            THRESHOLD=_threshold_kind(threshold), CHUNK=CHUNK, BT=self.padded, num_warps=4,
        )  # fmt: skip

    def up(self, x, weight, scale, bias, relu: bool) -> None:
        kernels.up[(CHUNK // UP["BR"], self.chunks)](
            x, weight, scale, bias, self.index, self.value, self.counts, self.tokens, weight.shape[1],
            SCALED=scale is not None, HAS_BIAS=bias is not None, RELU=relu, PRECISION=self.precision,
            CHUNK=CHUNK, BT=self.padded, **UP,
        )  # fmt: skip

    def down(self, scale) -> None:
        groups, width = _grouping(self.weight, scale)
        dtype = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
        grid = (-(-self.features // DOWN["BN"]), self.chunks)
        kernels.down[grid](
            self.index, self.value, self.counts, self.weight, scale, self.partials, self.tokens,
            self.features, groups, width, SCALED=scale is not None, PRECISION=self.precision,
            DTYPE=getattr(kernels.tl, dtype[self.act.dtype]), CHUNK=CHUNK, BT=self.padded, **DOWN,
        )  # fmt: skip

    def reduce(self, bias) -> torch.Tensor:
        out = self.act.new_empty((*self.act.shape[:-1], self.features))
        counter = site_counts.count_on_device(self.site, self.device)
        kernels.reduce[(-(-out.numel() // REDUCE["BN"]),)](
            self.partials, bias, out, self.counts, counter, out.numel(), self.features, self.neurons,
            self.chunks, HAS_BIAS=bias is not None, COUNTED=counter is not None,
            BC=1 << max(0, self.chunks - 1).bit_length(), **REDUCE,
        )  # fmt: skip
        return out


def run_down(act, weight, scale, bias, threshold, site="") -> torch.Tensor:
    """`sparse_down` by the sparse kernels, for 1 to 16 tokens."""
    call = _Call(act, weight, site)
    if call.tokens <= _MASKED_TOKENS:
        call.gemv(scale, threshold)
    else:
        call.compact(threshold)
        call.down(scale)
    return call.reduce(bias)


def run_mlp(gate, x, up_weight, up_scale, up_bias, up_act, weight, scale, bias, threshold, site=""):
    """`sparse_mlp` by the sparse kernels, for 1 to 16 tokens."""
    call = _Call(gate, weight, site)
    call.compact(threshold)
    call.up(x.contiguous(), up_weight, up_scale, up_bias, up_act == "relu")
    call.down(scale)
    return call.reduce(bias)


def _sparse(tau: float, bmax: int, act: torch.Tensor) -> bool:
    return tau != 0 and 0 < math.prod(act.shape[:-1]) <= min(bmax, MAX_TOKENS)


@down_defs.sparse_down.provider("triton", device="cuda", supported=_supported, supports_args=_accepts_down)
def _down(act, weight, scale, bias, threshold, tau, bmax, site):
    if _sparse(tau, bmax, act):
        return run_down(act, weight, scale, bias, threshold, site)
    site_counts.count(site, weight.shape[0], None)
    return _dense(down_defs.kept(act, threshold), weight, scale, bias)


@mlp_defs.sparse_mlp.provider("triton", device="cuda", supported=_supported, supports_args=_accepts_mlp)
def _mlp(gate, x, up_weight, up_scale, up_bias, up_act, weight, scale, bias, threshold, tau, bmax, site):
    up = (up_weight, up_scale, up_bias, up_act)
    if _sparse(tau, bmax, gate):
        return run_mlp(gate, x, *up, weight, scale, bias, threshold, site)
    site_counts.count(site, weight.shape[0], None)
    return _dense(mlp_defs.hidden(gate, x, *up, threshold), weight, scale, bias)
