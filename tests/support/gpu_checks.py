"""What is checked of our kernels on a GPU, and in Triton's interpreter where there is none: one code for both.

`Place` says where: "cuda", where providers are called through the operator, or the CPU, where the same functions run in
the interpreter (`tests/gpu/interpreted_edges.py`). `big` is how many elements a large tensor has: 3 billion on a card,
beyond what 32 bits count, and a few thousand in the interpreter.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from thresher import ops
from thresher.kernels import catalog

catalog.load()
FOREIGN = frozenset({"scaled_mm", "torch_varlen", "cuda_sdpa"})  # other libraries' kernels
UNINTERPRETED = frozenset({"triton_w4a4"})  # Triton's interpreter has no block-scaled product
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Place:
    """device: where tensors lie. big: elements of a large tensor. dtypes: what is computed right there."""

    device: torch.device
    big: int
    dtypes: tuple[torch.dtype, ...] = DTYPES

    @property
    def real(self) -> bool:
        return self.device.type == "cuda"


CARD = Place(torch.device("cuda"), 3_000_000_000)
INTERPRETER = Place(torch.device("cpu"), 3_000, (torch.float32, torch.float16))


def providers(foreign: bool = False) -> Iterator[tuple[ops.Op, Any]]:
    """(operator, provider) of every provider for CUDA; those of other libraries too where asked."""
    for op in ops.all_ops():
        for provider in op.providers:
            if provider.device == "cuda" and (foreign or provider.name not in FOREIGN):
                yield op, provider


def tensors(result: Any) -> list[torch.Tensor]:
    return (
        [result] if isinstance(result, torch.Tensor) else [t for t in result if isinstance(t, torch.Tensor)]
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error in fp64; NaN and infinity must stand in the same places."""
    a, e = actual.double(), expected.double()
    assert torch.equal(a.isnan(), e.isnan())
    finite = e.isfinite()
    assert torch.equal(a[~finite & ~e.isnan()], e[~finite & ~e.isnan()])
    if not finite.any():
        return 0.0
    return float((a - e)[finite].norm() / e[finite].norm().clamp_min(1e-30))


def takes(provider: Any, args: tuple[Any, ...]) -> bool:
    return provider.supports_args is None or provider.supports_args(*args) is None


def call(op: ops.Op, provider: Any, args: tuple[Any, ...], place: Place) -> list[torch.Tensor]:
    """A provider's results: through the operator on a card, by its own function in the interpreter."""
    with torch.no_grad():
        if place.real:
            with op.force(provider.name):
                return tensors(op(*args))
        with without_device():
            return tensors(provider.run(*args))


def agrees(
    op: ops.Op, provider: Any, args: tuple[Any, ...], dtype: torch.dtype, place: Place, label: str
) -> None:
    """Assert that a provider gives the reference's results, within the operator's tolerance."""
    actual, expected = call(op, provider, args, place), tensors(op.reference(*args))
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype, (op.name, provider.name, label)
        found = relative_error(a, e)
        assert found <= op.tolerance[dtype], (op.name, provider.name, label, dtype, found)


@contextlib.contextmanager
def without_device() -> Iterator[None]:
    """`with torch.cuda.device(...)` means nothing where the interpreter runs."""
    real = torch.cuda.device
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.cuda.device = real  # type: ignore[misc]


def every_sample(op: ops.Op, provider: Any, dtype: torch.dtype, place: Place) -> int:
    """Check all samples of an operator; how many the provider took."""
    ran = 0
    for sample in op.inputs(place.device, dtype):
        if takes(provider, sample.args):
            agrees(op, provider, sample.args, dtype, place, sample.label)
            ran += 1
    return ran


def strided(op: ops.Op, provider: Any, dtype: torch.dtype, place: Place) -> int:
    """The same with every tensor a view of a larger one, every other row of it: strides that are no shape's."""
    ran = 0
    for sample in op.inputs(place.device, dtype)[:4]:
        args = tuple(_every_other(a) for a in sample.args)
        if takes(provider, args):
            agrees(op, provider, args, dtype, place, f"{sample.label}, strided")
            ran += 1
    return ran


def _every_other(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or not value.numel():
        return value
    room = torch.empty_like(torch.cat([value, value], -2).transpose(-1, -2).contiguous().transpose(-1, -2))
    room = room.contiguous()
    inner = room[..., ::2, :]
    inner.copy_(value)
    return inner


# -- beyond 32 bits ----------------------------------------------------------------------------------------------------


def _last_rows(count: int, width: int, place: Place, dtype: torch.dtype) -> torch.Tensor:
    """[count, width]; zero but for its last three rows."""
    x = torch.zeros(count, width, device=place.device, dtype=dtype)
    x[-3:] = torch.randn(3, width, device=place.device).to(dtype)
    return x


def large_activations(place: Place, dtype: torch.dtype) -> None:
    """Products of more activations than 32 bits count, by few weights: the last rows are those of a small call."""
    from thresher.formats import bitpack

    width = 4096 if place.real else 64
    x = _last_rows(place.big // width + 1, width, place, dtype)
    codes = torch.randint(0, 16, (16, width))
    args = (
        bitpack.pack(codes, 4).to(place.device),
        torch.rand(16, 1, device=place.device),
        None,
        None,
        4,
        -1,
    )
    _same_tail(ops.get("wna16_linear"), lambda t: (t, *args), x, place, 0)
    from thresher.kernels.nvfp4.quantize import quantize

    q = quantize(torch.randn(16, width, device=place.device))
    more = (q.codes, q.block_scales, q.global_scale.reshape(()), None, None, "exact")
    _same_tail(ops.get("nvfp4_linear"), lambda t: (t, *more), x, place, 0)


def large_rows(place: Place, dtype: torch.dtype) -> None:
    """Transforms and transitions of more tokens than 32 bits count elements."""
    width = 4096 if place.real else 64
    x = _last_rows(place.big // width + 1, width, place, dtype)
    _same_tail(ops.get("hadamard"), lambda t: (t, None, width), x, place, 0)
    _same_tail(ops.get("token_transition"), lambda t: (t[None], t[None]), x, place, 1)


def large_segments(place: Place, dtype: torch.dtype) -> None:
    """Packed attention over more elements than 32 bits count: the last segment is as if it were alone."""
    heads, width, last = (16, 128, 200) if place.real else (2, 16, 9)
    tokens = place.big // (heads * width) + last
    rest = tokens - last
    ends = [*range(0, rest, 2048 if place.real else 16), rest, tokens]
    offsets = torch.tensor(ends, dtype=torch.int32, device=place.device)
    x = torch.zeros(1, tokens, heads, width, device=place.device, dtype=dtype)
    x[:, -last:] = torch.randn(1, last, heads, width, device=place.device).to(dtype)
    x = x.transpose(1, 2)
    longest = max(b - a for a, b in itertools.pairwise(ends))
    op = ops.get("varlen_attention")
    for provider in _of(op, place):
        whole = call(op, provider, (x, x, x, offsets, longest, 0.1, True, -1, 0.0), place)[0]
        small = x[:, :, -last:]
        alone = torch.tensor([0, last], dtype=torch.int32, device=place.device)
        expected = op.reference(small, small, small, alone, last, 0.1, True, -1, 0.0)
        assert relative_error(whole[:, :, -last:], expected) <= op.tolerance[dtype], provider.name


def large_weights(place: Place, dtype: torch.dtype) -> None:
    """A neuron-major weight of more elements than 32 bits count, of which the last neurons are on."""
    features = 8192 if place.real else 128
    neurons = place.big // features + 1
    weight = torch.zeros(neurons, features, device=place.device, dtype=dtype)
    weight[-3:] = torch.randn(3, features, device=place.device).to(dtype)
    act = torch.zeros(1, neurons, device=place.device, dtype=dtype)
    act[0, -3:] = 1.0
    op = ops.get("sparse_down")
    expected = weight[-3:].double().sum(0)
    for provider in _of(op, place):
        actual = call(op, provider, (act, weight, None, None, None, 1.0, 16, ""), place)[0]
        assert relative_error(actual[0], expected) <= op.tolerance[dtype], provider.name


def _of(op: ops.Op, place: Place) -> list[Any]:
    """The providers of an operator that can run at a place."""
    there = [p for o, p in providers() if o is op]
    return (
        [p for p in there if op.usable(p) is None]
        if place.real
        else [p for p in there if p.name not in UNINTERPRETED]
    )


def _same_tail(
    op: ops.Op, args: Callable[[torch.Tensor], Any], x: torch.Tensor, place: Place, dim: int
) -> None:
    """The last rows of a large call equal the reference's on them alone."""
    expected = tensors(op.reference(*args(x[-3:])))
    ran = 0
    for provider in _of(op, place):
        if not takes(provider, args(x)):
            continue
        for a, e in zip(call(op, provider, args(x), place), expected, strict=True):
            tail = a.narrow(dim, a.shape[dim] - 3, 3)
            assert relative_error(tail, e) <= op.tolerance[x.dtype], (op.name, provider.name)
        ran += 1
    assert ran, f"no provider of {op.name} took the call"


LARGE = (large_activations, large_rows, large_segments, large_weights)
