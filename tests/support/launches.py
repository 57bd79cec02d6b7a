"""Every launch of a Triton kernel that models lead to, recorded and not run: kernel, types, tile and options.

    for launch in recorded(90):          # as a GPU of compute capability 9.0 would be given them
        launch.compile()                 # ahead of time, by triton_aot

Calls of each operator's provider at the sizes of models are made on the CPU with Triton's launcher replaced, so that what
is compiled is what the launching code really asks for, tile by tile: nothing here repeats it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import gpu_checks as checks
import torch
import triton_aot as aot
from triton.runtime.jit import JITFunction

from thresher import ops
from thresher.kernels.nvfp4 import cuda as nvfp4_cuda
from thresher.kernels.varlen import cuda as varlen_cuda

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
OPTIONS = ("num_warps", "num_stages", "num_ctas")
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """operator: whose provider launched. capability: of the GPU, times ten. dtype: of the activations."""

    operator: str
    capability: int
    dtype: torch.dtype
    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def configuration(self) -> str:
        """The tile and what else is fixed when it is compiled, in words."""
        fixed = ", ".join(f"{k}={v}" for k, v in self.constants if k.isupper() and not callable(v))
        return f"{str(self.dtype).removeprefix('torch.')}; {fixed}; {', '.join(f'{k}={v}' for k, v in self.options)}"

    @property
    def products(self) -> bool:
        """Whether tensor cores are to be expected: a product in half types, or of fp32 in TF32 parts."""
        fixed = dict(self.constants)
        if self.name in ("gemm", "gemm_w4a4", "transform"):
            return True
        if self.name in ("up", "down"):
            return fixed["BT"] >= 16 and (self.dtype != torch.float32 or fixed["PRECISION"] != "ieee")
        uses = self.name in ("varlen_forward", "pool_part", "tail_part", "row_lse", "key_sums")
        return uses and (self.dtype != torch.float32 or fixed["PRECISION"] != "ieee")

    @property
    def wide(self) -> bool:
        """Whether loads of 16 bytes are to be expected: not of one row of 64 sums, which a warp reads in 8 bytes each."""
        return not (self.name == "merge" and dict(self.constants)["DV"] < 128)

    def compile(self) -> aot.Resources:
        binary = aot.compile_for(
            self.capability, self.kernel, dict(self.signature), dict(self.constants), aligned=self.aligned,
            **dict(self.options),
        )  # fmt: skip
        return aot.resources(binary)


def _launch(kernel: Any, args: tuple[Any, ...], given: dict[str, Any], about: tuple[Any, ...]) -> Launch:
    options = {k: given.pop(k) for k in OPTIONS if k in given}
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in given.items() if k in kernel.arg_names}
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, aligned = {}, {}, []
    for name, value in values.items():
        if name in fixed or value is None:
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            aligned.append(name)
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            if value == 1:
                constants[name] = 1  # as the launcher specializes it
                continue
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(name)
        else:
            signature[name] = "fp32"
    operator, capability, dtype = about
    return Launch(
        operator, capability, dtype, kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned),
        tuple(options.items()),
    )  # fmt: skip


@contextlib.contextmanager
def recording(found: list[Launch], about: list[Any]) -> Iterator[None]:
    """Note launches in place of making them."""

    def run(self: Any, *args: Any, grid: Any = None, warmup: Any = None, **given: Any) -> None:
        found.append(_launch(self, args, given, tuple(about)))

    with mock.patch.object(JITFunction, "run", run), checks.without_device():
        yield


def recorded(capability: int) -> list[Launch]:
    """The different launches that the calls of `calls` lead to on such a GPU."""
    found: list[Launch] = []
    tile, tiling = nvfp4_cuda.gemm_tile, varlen_cuda.tiling
    about: list[Any] = ["", capability, None]
    with (
        recording(found, about),
        mock.patch.object(nvfp4_cuda, "gemm_tile", lambda rows, _: tile(rows, capability)),
        mock.patch.object(varlen_cuda, "tiling", lambda *given: tiling(*given[:3], capability)),
    ):
        for name, args, dtype in calls():
            op = ops.get(name)
            about[0], about[2] = name, dtype
            for owner, provider in checks.providers():
                if owner is op and checks.takes(provider, args) and _has(provider, capability):
                    provider.run(*args)
                    break  # as a call does
    return list(dict.fromkeys(found))


def _has(provider: Any, capability: int) -> bool:
    return provider.name != "triton_w4a4" or capability >= 100


HALF = torch.bfloat16


def calls() -> Iterator[tuple[str, tuple[Any, ...], torch.dtype]]:
    """(operator, arguments, dtype) of calls at the sizes of models, with every choice that changes a kernel."""
    wide, narrow = 4096, 1024
    for rows in (1, 16, 64, 2048):
        for dtype in (HALF, torch.float32) if rows == 1 else (HALF,):
            x = torch.empty(rows, wide, dtype=dtype)
            for bits in (2, 3, 4, 8):
                codes = torch.empty(narrow, wide * bits // 32, dtype=torch.int32)
                scales = torch.empty(narrow, wide // 64)
                zeros = torch.empty(narrow, wide // 64, dtype=torch.uint8)
                bias = torch.empty(narrow, dtype=dtype)
                yield "wna16_linear", (x, codes, scales, zeros, bias, bits, 64), dtype
            codes = torch.empty(narrow, wide // 2, dtype=torch.uint8)
            blocks = torch.empty(narrow, wide // 16, dtype=torch.float8_e4m3fn)
            yield "nvfp4_linear", (x, codes, blocks, torch.ones(()), None, None, "exact"), dtype
    x = torch.randn(64, 256).to(HALF)
    codes, blocks = torch.zeros(128, 128, dtype=torch.uint8), torch.zeros(128, 16, dtype=torch.float8_e4m3fn)
    yield "nvfp4_linear", (x, codes, blocks, torch.ones(()), None, None, "nvfp4"), HALF
    yield from _attention_calls()
    yield from _sparse_calls()
    for block in (1024, 1536, 2048):
        yield "hadamard", (torch.empty(4, block, dtype=HALF), torch.ones(block), block), HALF


def _attention_calls() -> Iterator[tuple[str, tuple[Any, ...], torch.dtype]]:
    offsets = torch.tensor([0, 256, 512], dtype=torch.int32)
    for width in (64, 128, 256):
        for dtype in (HALF, torch.float32):
            q, k = (torch.empty(1, 512, h, width, dtype=dtype).transpose(1, 2) for h in (8, 2))
            for causal, window, cap in (
                (True, -1, 0.0),
                (False, -1, 0.0),
                (True, 128, 0.0),
                (True, -1, 30.0),
            ):
                if dtype == HALF or (causal and window < 0 and not cap and width < 256):
                    yield "varlen_attention", (q, k, k, offsets, 256, 0.1, causal, window, cap), dtype
            if dtype == HALF:
                place = torch.zeros(512, dtype=torch.int64)
                for mask in (
                    torch.zeros(2, 1, 256, 256, dtype=dtype),
                    torch.zeros(2, 1, 256, 256, dtype=torch.bool),
                ):
                    yield "varlen_attention_masked", (q, k, k, mask, place, place, offsets, 256, 0.1), dtype
    for width in (64, 128, 256):
        q, k = torch.empty(1, 8, 64, width, dtype=HALF), torch.empty(1, 2, 512, width, dtype=HALF)
        probes = torch.zeros(64, dtype=torch.int64)
        for segments in (None, torch.zeros(512, dtype=torch.int64)):
            yield (
                "probe_scores",
                (q, k, probes[None], None if segments is None else segments[None], 0.1),
                HALF,
            )
    yield "token_transition", (torch.empty(1, 512, 4096, dtype=HALF),) * 2, HALF
    from thresher.kernels.kv.format import quantize

    for width in (64, 128):
        for bits in (2, 4, 8):
            k = torch.randn(1, 2, 64, width).to(HALF)
            pool, tail = quantize(k, k, bits, 32), k[:, :, :32].contiguous()
            q = torch.empty(1, 8, 1, width, dtype=HALF)
            yield "kv_attention", (q, list(pool), tail, tail, None, 0.1), HALF


def _sparse_calls() -> Iterator[tuple[str, tuple[Any, ...], torch.dtype]]:
    neurons, features = 2048, 1024
    for tokens in (1, 2, 16):
        for dtype in (HALF, torch.float32):
            act = torch.empty(tokens, neurons, dtype=dtype)
            weight = torch.empty(neurons, features, dtype=dtype)
            low, scale = torch.empty(neurons, features, dtype=torch.int8), torch.empty(neurons, 1)
            bias, limit = torch.empty(features, dtype=dtype), torch.empty(neurons)
            yield "sparse_down", (act, weight, None, bias, limit, 1.0, 16, ""), dtype
            yield "sparse_down", (act, low, scale, bias, None, 1.0, 16, ""), dtype
            up = torch.empty(neurons, features, dtype=dtype)
            x = torch.empty(tokens, features, dtype=dtype)
            yield (
                "sparse_mlp",
                (act, x, up, None, None, "identity", weight, None, bias, limit, 1.0, 16, ""),
                dtype,
            )
