"""Every operator: its registration is sound, and each provider agrees with the reference."""

import pytest
import torch

from thresher import ops
from thresher.errors import ArgumentError
from thresher.kernels import catalog

catalog.load()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = [(op, dtype) for op in ops.all_ops() for dtype in op.tolerance]


def _id(value):
    return value.name if isinstance(value, ops.Op) else str(value).removeprefix("torch.")


def relative_error(actual, expected):
    """Relative L2 error in fp64; NaN and inf must stand in the same places."""
    actual, expected = actual.double(), expected.double()
    torch.testing.assert_close(actual.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.equal(actual[~finite & ~expected.isnan()], expected[~finite & ~expected.isnan()])
    if not finite.any():
        return 0.0
    return float((actual - expected)[finite].norm() / expected[finite].norm().clamp_min(1e-30))


def _tensors(result):
    return (
        [result] if isinstance(result, torch.Tensor) else [t for t in result if isinstance(t, torch.Tensor)]
    )


def check_registration(op, sample):
    torch.library.opcheck(
        op.overload,
        sample.args,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("op", {op.name: op for op, _ in CASES}.values(), ids=lambda op: op.name)
def test_opcheck(op):
    dtype = next(dtype for other, dtype in CASES if other is op)
    check_registration(op, op.inputs(torch.device("cpu"), dtype)[0])


@pytest.mark.thorough
@pytest.mark.parametrize("op, dtype", CASES, ids=_id)
def test_opcheck_of_every_sample(op, dtype):
    for sample in op.inputs(torch.device("cpu"), dtype):
        check_registration(op, sample)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op, dtype", CASES, ids=_id)
def test_providers_agree_with_reference(op, dtype, device):
    for provider in op.providers:
        if provider.device != device or op.usable(provider) is not None:
            continue
        ran = 0
        for sample in op.inputs(torch.device(device), dtype):
            if provider.supports_args is not None and provider.supports_args(*sample.args) is not None:
                continue
            with op.force(provider.name):
                actual = _tensors(op(*sample.args))
            expected = _tensors(op.reference(*sample.args))
            for a, e in zip(actual, expected, strict=True):
                assert a.shape == e.shape and a.dtype == e.dtype, sample.label
                assert relative_error(a, e) <= op.tolerance[dtype], (provider.name, sample.label)
            ran += 1
        assert ran or dtype != torch.float32, f"{provider.name} accepted none of the samples"


HALVES = (torch.float32, torch.bfloat16, torch.float16)


def _in_another_dtype(given):
    """(dtype it is, dtype it becomes, the argument so changed): each floating tensor in turn, those of lists too."""
    if isinstance(given, torch.Tensor) and given.dtype in HALVES:
        yield from ((given.dtype, other, given.to(other)) for other in HALVES if other != given.dtype)
    elif isinstance(given, (list, tuple)):
        for at, one in enumerate(given):
            for was, other, new in _in_another_dtype(one):
                yield was, other, [*given[:at], new, *given[at + 1 :]]


def _size(sample):
    return sum(t.numel() for a in sample.args for t in (a if isinstance(a, (list, tuple)) else [a])
               if isinstance(t, torch.Tensor))  # fmt: skip


@pytest.mark.parametrize("op", ops.all_ops(), ids=_id)
def test_another_dtype_of_one_tensor_is_refused_or_computed_right(op):
    """No kernel reads numbers of one dtype as those of another: a call is refused in Python, or equals the reference."""
    tried = 0
    for dtype in [d for d in HALVES if d in op.tolerance]:
        for number, sample in enumerate(op.inputs(torch.device("cpu"), dtype)):
            if number and _size(sample) > 20_000:  # a large one of each operator is enough
                continue
            for place, given in enumerate(sample.args):
                for _, other, new in _in_another_dtype(given):
                    args = [new if i == place else a for i, a in enumerate(sample.args)]
                    tried += 1
                    try:
                        actual = _tensors(op(*args))
                    except ArgumentError as refused:
                        assert str(other) in str(refused), (sample.label, place, refused)
                        continue
                    limit = max(op.tolerance.get(d, 0.0) for d in (dtype, other))
                    for a, e in zip(actual, _tensors(op.reference(*args)), strict=True):
                        assert a.shape == e.shape and a.dtype == e.dtype
                        assert relative_error(a, e) <= limit, (sample.label, place, dtype, other)
    assert tried or not any(t.is_floating_point() for s in op.inputs(torch.device("cpu"), torch.float32)
                            for t in s.args if isinstance(t, torch.Tensor))  # fmt: skip


@pytest.mark.parametrize("op", ops.all_ops(), ids=_id)
def test_a_mixed_call_has_the_dtypes_its_fake_says(op):
    """Tensors of several dtypes that a check lets through are a program's too: its graph must say what comes out."""
    for dtype in [d for d in HALVES if d in op.tolerance]:
        sample = op.inputs(torch.device("cpu"), dtype)[0]
        for place, given in enumerate(sample.args):
            for _, _, new in _in_another_dtype(given):
                args = tuple(new if i == place else a for i, a in enumerate(sample.args))
                try:
                    op.check(*args)
                except ArgumentError:
                    continue
                torch.library.opcheck(op.overload, args, test_utils=("test_schema", "test_faketensor"))
