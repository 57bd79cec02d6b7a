"""Every operator in plain ATen means what its reference means, over the operator's own inputs."""

import pytest
import torch

from thresher import ops
from thresher.kernels import catalog
from thresher.kernels.nvfp4 import linear as nvfp4
from thresher.kernels.nvfp4 import plain

catalog.load()
NEVER_IN_A_GRAPH = {"nvfp4_quantize"}  # packs weights, before a program exists
REFUSED = {
    "tokens_holding"
}  # each call's data decide its size; export says so, see tests/passes/zipvl/test_exact.py
QUANTIZED = {"nvfp4_linear", "wna16_linear"}  # have forms of each target's own


def test_every_operator_has_a_form():
    without = {op.name for op in ops.all_ops() if op.plain_function() is None}
    assert without == QUANTIZED | NEVER_IN_A_GRAPH | REFUSED


@pytest.mark.parametrize("op", [o for o in ops.all_ops() if o.plain_function()], ids=lambda o: o.name)
def test_agrees_with_the_reference(op):
    form = op.plain_function()
    for sample in op.inputs(torch.device("cpu"), torch.float32):
        expected, actual = op.reference(*sample.args), form(*sample.args)
        if not isinstance(expected, tuple):
            expected, actual = (expected,), (actual,)
        for e, a in zip(expected, actual, strict=True):
            assert e.dtype == a.dtype and e.shape == a.shape, sample.label
            torch.testing.assert_close(
                a, e, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m, s=sample: f"{s.label}: {m}"
            )


@pytest.mark.parametrize(
    "activations, fixed", [("int8", False), ("int16", False), ("nvfp4", False), ("nvfp4", True)]
)
def test_activations_round_to_the_same_bits(activations, fixed):
    x = torch.randn(9, 328, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, 328)
    x[0] = 0.0
    scale = torch.tensor(3.0 / 2688) if fixed else None
    for expected, actual in zip(
        nvfp4.round_activations(x, activations, scale), plain.round_activations(x, activations, scale)
    ):
        assert torch.equal(expected, actual)


def test_every_e2m1_rounding_is_right():
    """All midpoints, their neighbours and the values themselves, of both signs."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    middle = (values[1:] + values[:-1]) / 2
    x = torch.cat(
        [values, middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1), torch.tensor([100.0])]
    )
    x = torch.cat([x, -x])
    from thresher.formats.nvfp4 import decode_e2m1, encode_e2m1

    assert torch.equal(plain.round_e2m1(x), decode_e2m1(encode_e2m1(x)))
