"""Every operator in plain ATen means what its reference means, over the operator's own inputs."""

import blocks
import captures
import pytest
import torch

from thresher import ops
from thresher.formats import bitpack
from thresher.kernels import catalog
from thresher.kernels.nvfp4 import linear as nvfp4
from thresher.kernels.nvfp4 import plain
from thresher.kernels.wna16 import plain as wna16_plain
from thresher.lowering.decompose import decompose, own_nodes
from thresher.op_checks import difference

catalog.load()
NEVER_IN_A_GRAPH = {"nvfp4_quantize"}  # packs weights, before a program exists
REFUSED = {
    "tokens_holding"
}  # each call's data decide its size; export says so, see tests/passes/zipvl/test_exact.py


def test_every_operator_has_a_form():
    without = {op.name for op in ops.all_ops() if op.plain_function() is None}
    assert without == NEVER_IN_A_GRAPH | REFUSED


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


def test_every_scale_is_decoded_from_its_byte():
    every = torch.arange(256, dtype=torch.uint8)
    expected = every.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(plain.decode_e4m3(every), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(plain.decode_e4m3(every.view(torch.float8_e4m3fn)).isnan(), expected.isnan())


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_the_same_where_they_straddle_words(bits):
    make = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (3, 77), generator=make)
    codes[0] = (1 << bits) - 1  # every bit of every word, the sign too
    assert torch.equal(wna16_plain.codes_of(bitpack.pack(codes, bits), bits, 77), codes)


@pytest.mark.parametrize("quantize", [blocks.nvfp4, blocks.int4])
@torch.no_grad()
def test_quantized_models_run_where_only_aten_is_known(quantize):
    """Traced into a program, where a target has no form of its own for such linears."""
    base, inputs = blocks.half()
    program = quantize(base)
    inlined = program.copy()
    decompose(inlined)
    assert own_nodes(program) and not own_nodes(inlined)
    given = captures.arguments(program, inputs)
    for actual, expected in zip(inlined.run(*given), program.run(*given), strict=True):
        assert difference(actual, expected) < 2e-3  # fp16 activations between the linears
