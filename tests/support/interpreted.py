"""Runs the GPU providers of every operator in Triton's interpreter, and watches every address that they touch.

    TRITON_INTERPRET=1 python interpreted.py samples|edges|orders [operator ...]    # a line for each provider, then `agrees`

The interpreter patches Triton for its whole process, so this is a program of its own. For each sample of an operator it
checks that

- the result is the reference's, within the operator's tolerance;
- no address outside the call's tensors is read or written: each lies between the first and the last byte of a tensor
  that was handed to the kernel, with NaN beyond every tensor's end, so that a read which were missed would show;
- every element of what `torch.empty` made is written, or not read: it holds NaN, or the largest integer, before;
- the programs of a launch may run in any order: backwards and shuffled they give the same bits. `samples` sees that on the
  first sample of each dtype that has more than one program, `orders` on all.

bf16 is not run: the interpreter computes it wrongly.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
import triton
from triton.runtime import interpreter

import gpu_checks as checks  # isort: skip  # after the switch above

ORDER = {"now": "forwards"}
RANGES: list[tuple[int, int]] = []
TOUCHED = {"addresses": 0, "launches": 0}
LARGEST = {"programs": 0}  # of the launches of a sample


class OutOfBounds(Exception):
    """A kernel touched memory that belongs to none of its tensors."""


def _check(addresses: np.ndarray, mask: np.ndarray, width: int, what: str) -> None:
    wanted = np.asarray(addresses)[np.broadcast_to(np.asarray(mask, bool), np.shape(addresses))].ravel()
    if not wanted.size:
        return
    TOUCHED["addresses"] += wanted.size
    wanted = wanted.astype(np.int64)
    inside = np.zeros(wanted.shape, bool)
    for low, high in RANGES:
        inside |= (wanted >= low) & (wanted + width <= high)
    if not inside.all():
        worst = int(wanted[~inside][0])
        gap = min(min(abs(worst - low), abs(worst - high)) for low, high in RANGES)
        raise OutOfBounds(f"{what} at {worst:#x}, {gap} bytes from the nearest end of a tensor")


_load, _store = (
    interpreter.InterpreterBuilder.create_masked_load,
    interpreter.InterpreterBuilder.create_masked_store,
)


def _width(kind) -> int:
    return max(1, np.dtype(interpreter._get_np_dtype(kind)).itemsize)


def _checked_load(self, ptrs, mask, *rest):
    _check(ptrs.data, mask.data, _width(ptrs.get_element_ty()), "a read")
    return _load(self, ptrs, mask, *rest)


def _checked_store(self, ptrs, value, mask, *rest):
    _check(ptrs.data, mask.data, _width(ptrs.get_element_ty()), "a write")
    return _store(self, ptrs, value, mask, *rest)


def _elsewhere(self, x, y, z):
    """The program that runs where the loops over the grid have come to (x, y, z)."""
    if (x, y, z) == (0, 0, 0):
        count = int(np.prod(self.grid_dim))
        self.order = list(range(count))
        LARGEST["programs"] = max(LARGEST["programs"], count)
        if ORDER["now"] == "backwards":
            self.order.reverse()
        elif ORDER["now"] == "shuffled":
            random.Random(0).shuffle(self.order)
    _, height, depth = self.grid_dim
    place = self.order[(x * height + y) * depth + z]
    _set_grid_idx(self, place // (height * depth), place // depth % height, place % depth)


_set_grid_idx = interpreter.InterpreterBuilder.set_grid_idx
_init = interpreter.GridExecutor._init_args_hst


def _note_tensors(self, args, kwargs):
    made = _init(self, args, kwargs)
    TOUCHED["launches"] += 1
    RANGES[:] = [_extent(t) for t in (*made[0], *made[1].values()) if isinstance(t, torch.Tensor)]
    return made


def _extent(t: torch.Tensor) -> tuple[int, int]:
    """The bytes from a tensor's first element to its last."""
    if not t.numel():
        return t.data_ptr(), t.data_ptr()
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def install() -> None:
    """Watch loads and stores, and give the grid's loops an order that can be changed."""
    interpreter.InterpreterBuilder.create_masked_load = _checked_load
    interpreter.InterpreterBuilder.create_masked_store = _checked_store
    interpreter.GridExecutor._init_args_hst = _note_tensors
    interpreter.InterpreterBuilder.set_grid_idx = _elsewhere


def poison(t: torch.Tensor) -> torch.Tensor:
    """Fill a tensor with what no result may come from."""
    with torch.no_grad():
        if t.is_floating_point() and t.dtype.itemsize > 1:
            return t.fill_(torch.nan)
        if t.dtype == torch.bool or not t.numel():
            return t
        t.view(torch.uint8).fill_(0x7F)
        return t


def fenced(value):
    """A copy of a tensor with the same strides, inside a larger one that is poisoned before and behind it."""
    if isinstance(value, (list, tuple)):
        return type(value)(fenced(v) for v in value)
    if not isinstance(value, torch.Tensor) or not value.numel():
        return value
    span = sum((n - 1) * s for n, s in zip(value.shape, value.stride())) + 1
    pad = 64
    room = poison(torch.empty(span + 2 * pad, dtype=value.dtype))
    inner = room.as_strided(value.shape, value.stride(), pad)
    inner.copy_(value)
    return inner


@contextlib.contextmanager
def poisoned_results():
    """`torch.empty` and its relatives hold what no result may come from."""
    real = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}
    new = torch.Tensor.new_empty
    for name, make in real.items():
        setattr(torch, name, lambda *a, make=make, **k: poison(make(*a, **k)))
    torch.Tensor.new_empty = lambda self, *a, **k: poison(new(self, *a, **k))
    try:
        yield
    finally:
        for name, make in real.items():
            setattr(torch, name, make)
        torch.Tensor.new_empty = new


def run(op, provider, args, order):
    ORDER["now"] = order
    with poisoned_results():
        return checks.call(op, provider, args, checks.INTERPRETER)


def check(op, provider, sample, dtype, orders: bool) -> bool:
    """Check one sample, in all orders where asked; False where the provider does not take it."""
    if not checks.takes(provider, sample.args):
        return False
    before = TOUCHED["launches"]
    args = tuple(fenced(a) for a in sample.args)
    found = run(op, provider, args, "forwards")
    where = (op.name, provider.name, sample.label, dtype)
    for a, e in zip(found, checks.tensors(op.reference(*sample.args)), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype, where
        error = checks.relative_error(a, e)
        assert error <= op.tolerance[dtype], (*where, error)
    if orders and TOUCHED["launches"] > before:
        for order in ("backwards", "shuffled"):
            for a, b in zip(found, run(op, provider, args, order), strict=True):
                assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()), (
                    *where,
                    order,
                )
    return True


def interpreted():
    """(operator, provider) of what the interpreter can run."""
    return [(op, p) for op, p in checks.providers() if p.name not in checks.UNINTERPRETED]


def samples(names: list[str], orders: bool = False) -> None:
    """Every sample of every operator, or of those named, in the first dtype, and every third in others, whose addresses
    and masks are the same code. orders: every sample in each dtype, and each of them in all orders."""
    for op, provider in interpreted():
        if names and op.name not in names:
            continue
        ran = launched = 0
        start = dict(TOUCHED)
        for number, dtype in enumerate(d for d in checks.INTERPRETER.dtypes if d in op.tolerance):
            seen = False
            for sample in op.inputs(checks.INTERPRETER.device, dtype)[:: 3 if number and not orders else 1]:
                before, LARGEST["programs"] = TOUCHED["launches"], 0
                ran += check(op, provider, sample, dtype, orders or not seen)
                launched += TOUCHED["launches"] > before
                seen = seen or LARGEST["programs"] > 1
        touched = TOUCHED["addresses"] - start["addresses"]
        print(
            f"{op.name} {provider.name}: {ran} samples, {launched} launched, {touched} addresses", flush=True
        )


def edges(names: list[str]) -> None:
    """What tests/gpu does beside the samples, at small sizes."""
    for op, provider in interpreted():
        if names and op.name not in names:
            continue
        ran = (
            checks.strided(op, provider, torch.float32, checks.INTERPRETER)
            if torch.float32 in op.tolerance
            else 0
        )
        print(f"{op.name} {provider.name}: {ran} strided", flush=True)
    for large in checks.LARGE if not names else ():
        large(checks.INTERPRETER, torch.float16)
        print(large.__name__, flush=True)


def main(part: str, *names: str) -> int:
    install()
    {"samples": samples, "edges": edges, "orders": functools.partial(samples, orders=True)}[part](list(names))
    print("agrees", triton.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
