"""How fast low-bit linears and whole-model decoding run: the timed part of benchmarks/rsq.py.

python benchmarks/_rsq_speed.py [--quick] [--json PATH] [--part kernel,decode]
"""

from __future__ import annotations

from typing import Any

import torch
from _harness import Benchmark, alone, arguments, interleave

from thresher.formats import bitpack

SIZE = 4096


def linears(bits: int, group: int, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Functions of no arguments, each one product by a [SIZE, SIZE] weight."""
    make = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=make)
    codes = bitpack.pack(torch.randint(0, 1 << bits, (SIZE, SIZE), generator=make), bits)
    scales = torch.rand(SIZE, SIZE // group if group > 0 else 1, generator=make) / 64
    x = torch.randn(rows, SIZE, generator=make).to(dtype)
    op = torch.ops.thresher.wna16_linear
    forms = {f"wna16 {bits}-bit group {group}": lambda: op(x, codes, scales, None, None, bits, group)}
    if bits == 4 and group == 64:
        half, w16, x32 = x.bfloat16(), weight.bfloat16(), x.float()
        ints = torch.randint(0, 16, (SIZE, SIZE), dtype=torch.int32, generator=make)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(ints, 1)
        zeros = torch.rand(SIZE // 64, SIZE, 2, generator=make).bfloat16()
        forms["torch int4 (bf16)"] = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(
            half, packed, 64, zeros
        )
        forms["bf16 linear"] = lambda: torch.nn.functional.linear(half, w16)
        forms["fp32 linear"] = lambda: torch.nn.functional.linear(x32, weight)
    return forms


def kernel(bench: Benchmark, quick: bool) -> None:
    forms: dict[str, Any] = {}
    for bits in (2, 3, 4, 8):
        forms |= linears(bits, 64, 1, torch.bfloat16)
    forms |= linears(4, -1, 1, torch.bfloat16)
    with torch.no_grad():
        times = interleave(forms, rounds=5 if quick else 15)
    for name, timing in times.items():
        bench.row(part="decode matmul", form=name, **timing.fields())
    ours = times["wna16 4-bit group 64"].cpu_min
    for other, target in (("torch int4 (bf16)", ">= 1.2"), ("bf16 linear", ">= 1.8")):
        bench.claim(
            f"4-bit {SIZE}x{SIZE} batch 1: time of {other} over ours", times[other].cpu_min / ours, target
        )


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--part", default="kernel,decode")
        parser.add_argument("--lock", default="", help="a file to lock while timing, where others time too")

    args = arguments(__doc__, add)
    bench = Benchmark("rsq_speed", args)
    import thresher.backend  # noqa: F401 (defines the operators)

    if "kernel" in args.part:
        with alone(args.lock):
            kernel(bench, args.quick)
    if "decode" in args.part:
        from _rsq_decode import decode

        decode(bench, args.quick, lambda: alone(args.lock))
    bench.finish()


if __name__ == "__main__":
    main()
