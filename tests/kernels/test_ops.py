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


@pytest.mark.parametrize("op, dtype", CASES, ids=_id)
def test_opcheck(op, dtype):
    check_registration(op, op.inputs(torch.device("cpu"), dtype)[0])


@pytest.mark.thorough
@pytest.mark.parametrize("op, dtype", CASES, ids=_id)
def test_opcheck_of_every_sample(op, dtype):
    for sample in op.inputs(torch.device("cpu"), dtype)[1:]:
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


@pytest.mark.parametrize("op", ops.all_ops(), ids=_id)
def test_another_dtype_of_one_tensor_is_refused_or_computed_right(op):
    """No kernel reads numbers of one dtype as those of another: a call is refused in Python, or equals the reference."""
    for dtype in [d for d in HALVES if d in op.tolerance]:
        sample = op.inputs(torch.device("cpu"), dtype)[0]
        for place, given in enumerate(sample.args):
            if not isinstance(given, torch.Tensor) or given.dtype not in HALVES:
                continue
            for other in HALVES:
                args = [given.to(other) if i == place else a for i, a in enumerate(sample.args)]
                try:
                    actual = _tensors(op(*args))
                except ArgumentError as refused:
                    assert other != given.dtype and str(other) in str(refused), (place, refused)
                    continue
                limit = max(op.tolerance.get(d, 0.0) for d in (dtype, other))
                for a, e in zip(actual, _tensors(op.reference(*args)), strict=True):
                    assert a.shape == e.shape and a.dtype == e.dtype
                    assert relative_error(a, e) <= limit, (place, dtype, other)
