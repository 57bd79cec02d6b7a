"""NVFP4 at the level of kernels: the linear's speed, the quantizer's speed, the cast, the modes, the error.

Times are CPU milliseconds, the least of interleaved rounds, with bf16 activations, through
`torch.ops.thresher.nvfp4_linear` as a graph calls it. Rows of torchao appear where it is installed.

`--parts` runs some parts only: speed, cold, quantizer, search (times and errors), cast, modes (equality with
oracles, minutes of integer arithmetic), triton (kernels compiled ahead of time for four GPU generations).
The perplexity of a whole model is nvfp4_perplexity.py, training is nvfp4_training.py.

With one row, each form is called for 100 ms on end, so a 9 MB NVFP4 weight stays in a last-level cache of 32 MB
while the 34 MB of bf16 do not: that is part of the gain. From main memory no format of 4.5 bits can gain
more than 16 / 4.5 = 3.56; the rows marked "cold" evict the caches before every call.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import Benchmark, Timing, arguments, interleave
from _nvfp4_triton import triton_kernels

from thresher.formats import nvfp4 as nvfp4_format
from thresher.kernels.nvfp4.linear import nvfp4_linear
from thresher.kernels.nvfp4.quantize import NVFP4Weight, quantize

INT4_GROUP = 32
ROUNDED = ("exact", "int16", "int8")
TARGETS = {"exact": ">= 2.5", "int16": ">= 4", "int8": ">= 6"}
ERROR_TARGETS = {"exact": "<= 1e-6", "int16": "<= 3e-5", "int8": "<= 8e-3"}
NO_TORCHAO = "torchao is not installed here: pip install --no-deps torchao==0.18.0"
SUPPORT = Path(__file__).parents[1] / "tests" / "support"
PARTS = ("speed", "cold", "quantizer", "search", "cast", "modes", "triton")
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None


def our_linear(x: torch.Tensor, q: NVFP4Weight, activations: str) -> torch.Tensor:
    return nvfp4_linear(x, q.codes, q.block_scales, q.global_scale, None, None, activations)


def int4_linear(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """PyTorch's own int4 weight-only product for CPUs, 32 weights a group."""
    n, k = weight.shape
    groups = weight.float().view(n, -1, INT4_GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.int32).view(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    grid = torch.cat((scale, low + 8 * scale), -1).transpose(0, 1).contiguous().bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, INT4_GROUP, grid)


def torchao_linear(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """torchao's weight-only NVFP4 linear under torch.compile."""
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    layer.weight.data.copy_(weight)
    quantize_(layer, NVFP4WeightOnlyConfig())
    return torch.compile(layer)


def linear_speed(bench: Benchmark, n: int, k: int, rows: list[int], rounds: int) -> None:
    """All forms at each number of rows, and the claims about one row."""
    torch.manual_seed(0)
    weight = (torch.randn(n, k) * 0.02).bfloat16()
    single, q, int4 = weight.float(), quantize(weight), int4_linear(weight)
    torchao = torchao_linear(weight) if HAS_TORCHAO and rows[0] == 1 else None
    shape = f"{n}x{k}"
    for m in rows:
        x = torch.randn(m, k).bfloat16()
        x32 = x.float()
        forms: dict[str, Callable[[], Any]] = {
            "torch bf16": lambda x=x: torch.nn.functional.linear(x, weight),
            "torch fp32": lambda x=x32: torch.nn.functional.linear(x, single),
        }
        if m <= 16:
            forms["torch int4"] = lambda x=x: int4(x)
        for mode in ROUNDED:
            forms[f"nvfp4 {mode}"] = lambda x=x, mode=mode: our_linear(x, q, mode)
        forms["nvfp4 exact, fp32 activations"] = lambda x=x32: our_linear(x, q, "exact")
        if torchao is not None and m == 1:
            forms["torchao compiled"] = lambda x=x: torchao(x)
        with torch.no_grad():
            turns, stretch = (rounds, 100) if m == 1 else (5, 30) if m <= 16 else (3, 0)
            times = interleave(forms, rounds=turns, warmup=1, least_ms=stretch)
        for name, timing in times.items():
            ratio = times["torch bf16"].cpu_min / timing.cpu_min
            bench.row(weight=shape, rows=m, form=name, **timing.fields(), against_bf16=round(ratio, 3))
        claims_of_rows(bench, shape, m, times)
    for mode in ROUNDED:
        x = torch.randn(4, k)
        exact = x.double() @ q.dequantize(torch.float64).t()
        error = float((our_linear(x, q, mode).double() - exact).norm() / exact.norm())
        bench.claim(f"{shape}: relative L2 error of {mode} activations", error, ERROR_TARGETS[mode])


def cold_speed(bench: Benchmark, size: int, rounds: int) -> None:
    """One row, with the weight fetched from main memory every time. No claim: memory decides."""
    weight = (torch.randn(size, size) * 0.02).bfloat16()
    q, x, other = quantize(weight), torch.randn(1, size).bfloat16(), torch.zeros(1 << 25)
    forms = {mode: (lambda mode=mode: our_linear(x, q, mode)) for mode in ROUNDED}
    forms["torch bf16"] = lambda: torch.nn.functional.linear(x, weight)
    spent = {}
    for name, form in forms.items():
        times = []
        for _ in range(rounds):
            other.add_(1)
            start = time.thread_time()
            form()
            times.append((time.thread_time() - start) * 1e3)
        spent[name] = min(times)
    for name, least in spent.items():
        ratio = round(spent["torch bf16"] / least, 3)
        bench.row(
            weight=f"{size}x{size} cold", rows=1, form=name, cpu_min_ms=round(least, 4), against_bf16=ratio
        )


def claims_of_rows(bench: Benchmark, shape: str, m: int, times: dict[str, Timing]) -> None:
    ours = {mode: times[f"nvfp4 {mode}"].cpu_min for mode in ROUNDED}
    bf16 = times["torch bf16"].cpu_min
    if m > 1:
        slowest = max(ours.values())
        bench.claim(f"{shape}, {m} rows: bf16 time / slowest nvfp4 form", bf16 / slowest, ">= 1")
        return
    for mode in ROUNDED:
        bench.claim(f"{shape}, 1 row: {mode} activations against bf16", bf16 / ours[mode], TARGETS[mode])
    int4 = times["torch int4"].cpu_min
    bench.claim(f"{shape}, 1 row: exact activations against torch int4", int4 / ours["exact"], ">= 1.5")
    name = f"{shape}, 1 row: exact activations against torchao compiled"
    if "torchao compiled" in times:
        bench.claim(name, times["torchao compiled"].cpu_min / ours["exact"], ">= 100")
    else:
        bench.not_measured(name, NO_TORCHAO)


def quantizer_speed(bench: Benchmark, size: int, rounds: int) -> None:
    weight = torch.randn(size, size).bfloat16()
    forms: dict[str, Callable[[], Any]] = {"thresher": lambda: quantize(weight)}
    if HAS_TORCHAO:
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

        def torchao() -> Any:
            return NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max()))

        forms["torchao"] = torchao
    times = interleave(forms, rounds=rounds, warmup=1)
    for name, timing in times.items():
        gigabytes = weight.numel() * weight.itemsize / timing.cpu_min / 1e6
        bench.row(quantize=f"{size}x{size} bf16", form=name, **timing.fields(), gb_per_s=round(gigabytes, 3))
    name = f"quantizing {size}x{size} against torchao"
    if HAS_TORCHAO:
        bench.claim(name, times["torchao"].cpu_min / times["thresher"].cpu_min, ">= 20")
    else:
        bench.not_measured(name, NO_TORCHAO)


def scale_search(bench: Benchmark, size: int) -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(5.0).sample((size, size))
    error = {}
    for search in ("none", "four_over_six", "mse"):
        q = quantize(weight, search=search)
        error[search] = float((q.dequantize() - weight).square().mean() / weight.square().mean())
        bench.row(weight_error=f"Student-t(5), {size}x{size}", form=search, relative_mse=error[search])
    lower = 100 * (1 - error["mse"] / error["none"])
    bench.claim("weight MSE with scale search, percent below plain rounding", lower, ">= 18")


def cast_mismatches(bits: torch.Tensor) -> int:
    """Codes that differ from an oracle which compares fp32 bit patterns as integers."""
    magnitude = bits & 0x7FFFFFFF
    # Ties at .25, 1.25, 2.5 and 5 stay below, at .75, 1.75 and 3.5 they go up: always to the even code.
    above = (0x3E800001, 0x3F400000, 0x3FA00001, 0x3FE00000, 0x40200001, 0x40600000, 0x40A00001)
    code = torch.zeros_like(bits, dtype=torch.uint8)
    for bound in above:
        code += magnitude >= bound
    nan = magnitude > 0x7F800000
    sign = ((bits >= 1 << 31) & (magnitude > 0)).to(torch.uint8) << 3
    expected = (code | sign).masked_fill(nan, 0)
    value = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
    return int((nvfp4_format.encode_e2m1(value) != expected).sum())


def cast(bench: Benchmark, quick: bool) -> None:
    stop, step = (1 << 32, 1 << 22) if not quick else (1 << 16, 1 << 16)
    wrong = 0
    for start in range(0, stop, step):
        bits = torch.arange(start, start + step)
        wrong += cast_mismatches(bits << 16 if quick else bits)
    bench.claim(
        f"E2M1 codes unlike the oracle's, {'all bf16' if quick else 'all fp32'} values", wrong, "== 0"
    )
    if quick:
        bench.not_measured("E2M1 cast on all 2^32 fp32 values", "Left out by --quick; takes minutes.")


def modes(bench: Benchmark, count: int) -> None:
    """Codes and scales of each named mode, byte for byte against the tool itself, or an independent oracle."""
    sys.path.insert(0, str(SUPPORT))
    from nvfp4_oracle import ORACLES, distributions, oracle

    def torchao(x: torch.Tensor) -> tuple[Any, Any]:
        from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

        scales, codes = nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.abs().max()))
        return nvfp4_format.unpack(codes).numpy(), scales.view(torch.uint8).numpy()

    judges = {m: (lambda x, m=m: oracle(x, m)[:2], "an oracle written from its definition") for m in ORACLES}
    if HAS_TORCHAO:
        judges["torchao"] = (torchao, "torchao itself")
    wrong = dict.fromkeys(judges, 0)
    for label, x in distributions(count):
        for mode, (judge, said) in judges.items():
            if mode == "torchao" and x.dtype == torch.float16:
                continue  # it takes fp32 and bf16
            codes, scales = judge(x)
            q = quantize(x, mode=mode)
            unlike = int((nvfp4_format.unpack(q.codes).numpy() != codes).sum())
            unlike += int((q.block_scales.view(torch.uint8).numpy() != scales).sum())
            bench.row(mode=mode, against=said, data=label, values=x.numel(), bytes_unlike=unlike)
            wrong[mode] += unlike
    for mode, (_, said) in judges.items():
        kinds = "five" if mode == "torchao" else "six"
        name = f"bytes of mode {mode} unlike {said}'s, {count >> 20}M values in each of {kinds} distributions"
        bench.claim(name, wrong[mode], "== 0")
    if not HAS_TORCHAO:
        bench.not_measured("bytes of mode torchao", NO_TORCHAO)


def main() -> None:
    def add(parser: ArgumentParser) -> None:
        parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)

    args = arguments(__doc__, add)
    bench = Benchmark("nvfp4", args)
    rounds = 9
    parts: dict[str, Callable[[], Any]] = {
        "speed": lambda: speed(bench, args.quick, rounds),
        "cold": lambda: cold_speed(bench, 4096, rounds),
        "quantizer": lambda: quantizer_speed(bench, 4096, 3 if args.quick else 7),
        "search": lambda: scale_search(bench, 1024),
        "cast": lambda: cast(bench, args.quick),
        "modes": lambda: modes(bench, 1 << 20 if args.quick else 10 << 20),
        "triton": lambda: triton_kernels(bench),
    }
    for name in PARTS:
        if name in args.parts:
            parts[name]()
    gpu = "This machine has no such GPU; the kernels are compiled ahead of time by the tests."
    for claim in ("GEMV against cuBLAS bf16", "GEMM, M <= 64", "GEMM, M >= 1024"):
        bench.not_measured(f"H200: {claim}", gpu)
    bench.finish()


def speed(bench: Benchmark, quick: bool, rounds: int) -> None:
    rows = [1, 16, 64] if quick else [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    linear_speed(bench, 4096, 4096, rows, rounds)
    if not quick:
        linear_speed(bench, 14336, 4096, [1], rounds)


if __name__ == "__main__":
    main()
