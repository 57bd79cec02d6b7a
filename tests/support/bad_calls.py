"""Calls of operators with arguments that do not belong together, made from each operator's own samples.

    python tests/support/bad_calls.py --each 40 --seed 0

makes so many damaged calls of each operator and holds each to this: its check raises ArgumentError, or the
reference computes the call and every provider that accepts it agrees. A process of its own, since the failure
to be found is a read beyond a tensor's memory, which may end the process. `--sanitize` builds the C++ kernels
with address and undefined-behaviour checks, which also finds the reads that end nothing; the process then needs
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0, and
a cache folder of its own.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

from thresher import op_checks, ops
from thresher.errors import ArgumentError
from thresher.kernels import catalog, native

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)
INDICES = (-(10**9), -2, -1, 10**9)
NUMBERS = {
    bool: (True, False),
    int: (-(10**6), -1, 0, 1, 3, 7, 10**6),
    float: (float("nan"), -1.0, 0.0, 0.5, 2.0),
    str: ("", "nonsense"),
}


def _strided(t: torch.Tensor) -> torch.Tensor:
    """The same values, no two of them side by side in memory."""
    wide = t.new_zeros((*t.shape, 2))
    wide[..., 0] = t
    return wide[..., 0]


def _damaged(t: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((f"as {dtype}", t.to(dtype)) for dtype in DTYPES if dtype != t.dtype)
    for d in range(t.dim()):
        yield f"without dimension {d}'s last", t.narrow(d, 0, max(t.shape[d] - 1, 0))
        yield f"nothing in dimension {d}", t.narrow(d, 0, 0)
        yield f"twice as long in dimension {d}", torch.cat([t, t], d)
    yield "flat", t.flatten()
    yield "one dimension more", t[None]
    yield "without its first dimension", t[0] if t.dim() and t.shape[0] else t[None, None]
    yield "no dimension", t.new_zeros(())
    yield "strided", _strided(t)
    if t.dim() > 1:
        yield "transposed", t.transpose(-1, -2)
        yield "stored transposed", t.transpose(-1, -2).contiguous().transpose(-1, -2)
        yield "one row for all", t[:1].expand(t.shape) if t.shape[0] else t
    if t.numel() and t.dtype in (torch.int32, torch.int64):
        for place in {0, t.numel() // 2, t.numel() - 1}:
            for value in INDICES:
                new = t.clone()
                new.view(-1)[place] = value
                yield f"{value} at {place}", new
        yield "backwards", t.flip(-1)


def calls(op: ops.Op, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(what was done, arguments): each sample with one argument damaged."""
    optional = ["?" in a or "None" in a for a in op.schema.split("(", 1)[1].split(") ->")[0].split(", ")]
    for sample in op.inputs(torch.device("cpu"), dtype):
        for i, arg in enumerate(sample.args):
            changes: list[tuple[str, Any]] = []
            if isinstance(arg, torch.Tensor):
                changes = [*_damaged(arg), *([("None", None)] if optional[i] else [])]
            elif isinstance(arg, list):
                changes = [("one short", arg[:-1]), ("backwards", arg[::-1]), ("none", [])]
                changes += [
                    (f"[{at}] {label}", [*arg[:at], new, *arg[at + 1 :]])
                    for at, t in enumerate(arg) for label, new in _damaged(t)
                ]  # fmt: skip
            elif arg is not None:
                changes = [(repr(value), value) for value in NUMBERS[type(arg)]]
            for label, new in changes:
                yield f"{sample.label}: argument {i} {label}", (*sample.args[:i], new, *sample.args[i + 1 :])


def fault(op: ops.Op, args: tuple[Any, ...], tolerance: float) -> str | None:
    """What is wrong with how the operator meets this call, or None."""
    assert op.check is not None
    try:
        op.check(*args)
    except ArgumentError:
        return None
    except Exception as error:
        return f"its check raises {type(error).__name__}: {error}"
    try:
        expected = op.reference(*args)
    except Exception as error:
        return f"its check accepts what the reference cannot compute: {type(error).__name__}: {error}"
    for provider in op.providers:
        if provider.device != "cpu" or op.usable(provider) is not None:
            continue
        if provider.supports_args is not None and provider.supports_args(*args) is not None:
            continue
        with op.force(provider.name):
            error = op_checks.difference(op(*args), expected)
        if not error <= tolerance and not (error != error and _not_finite(expected)):
            return f"{provider.name} differs from the reference by {error}"
    return None


def _not_finite(result: Any) -> bool:
    return any(bool((~t.isfinite()).all()) for t in op_checks._tensors(result) if t.is_floating_point())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--each", type=int, default=0, help="calls of each operator, 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sanitize", action="store_true", help="build the kernels with address checks")
    options = parser.parse_args()
    if options.sanitize:
        native._FLAGS = (*native._FLAGS, *SANITIZE)
    torch.set_num_threads(1)
    catalog.load()
    made, faults = 0, 0
    for op in ops.all_ops():
        everything = [(dtype, *call) for dtype in op.tolerance for call in calls(op, dtype)]
        whole = [(d, s.label, s.args) for d in op.tolerance for s in op.inputs(torch.device("cpu"), d)]
        if options.each and len(everything) > options.each:
            everything = random.Random(options.seed).sample(everything, options.each)
        for dtype, label, args in whole + everything:
            print(
                f"\r{op.name}, {dtype}, {label}", end="", file=sys.stderr, flush=True
            )  # the last before a crash
            wrong = fault(op, args, max(op.tolerance.values()))
            made += 1
            if wrong is not None:
                faults += 1
                print(f"{op.name}, {dtype}, {label}: {wrong}", flush=True)
    print(f"{made} calls, {faults} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
