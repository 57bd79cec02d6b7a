"""Quantized pools: the format, its error bounds, and attention over it."""

import pytest
import torch

from thresher import ops
from thresher.errors import ArgumentError
from thresher.kernels import catalog
from thresher.kernels.kv.format import Pool, append, as_pools, dequantize, pack, quantize, unpack

catalog.load()
kv_attention = ops.get("kv_attention")


def _tokens(slots, dim=32, dim_v=32, batch=1, heads=2, seed=0):
    make = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, slots, d, generator=make) for d in (dim, dim_v))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_survive_packing(bits):
    codes = torch.randint(0, 1 << bits, (3, 5, 24), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] == 24 * bits // 8
    assert torch.equal(unpack(packed, bits), codes)


def test_byte_layout():
    """Channel i of each part shares byte i, the first part in the lowest bits: kernels rely on it."""
    assert pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 4).tolist() == [1 | 3 << 4, 2 | 4 << 4]
    assert pack(torch.tensor([0, 1, 2, 3], dtype=torch.uint8), 2).tolist() == [0 | 1 << 2 | 2 << 4 | 3 << 6]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("slots", [1, 31, 32, 33, 100])
def test_error_is_at_most_half_a_step(bits, slots):
    k, v = _tokens(slots)
    k = k * torch.logspace(-2, 3, 32)  # channels of very different size must not disturb each other
    pool = quantize(k, v, bits, 32)
    assert pool.slots == slots and pool.bits == bits and pool.ends[-1] == slots
    restored_k, restored_v = dequantize(pool)
    for begin in range(0, slots, 32):
        part = k[:, :, begin : begin + 32]
        step = (part.amax(2) - part.amin(2)) / ((1 << bits) - 1)
        bound = 0.5 * step + 2e-3 * part.abs().amax(2)  # fp16 steps and lows
        assert ((restored_k[:, :, begin : begin + 32] - part).abs() <= bound[:, :, None]).all()
    step = (v.amax(3) - v.amin(3)) / ((1 << bits) - 1)
    assert ((restored_v - v).abs() <= (0.5 * step + 2e-3 * v.abs().amax(3))[..., None]).all()


def test_constant_channels_and_extremes():
    k, v = _tokens(40)
    k[..., 0], k[..., 1] = 7.0, 1e6  # the second is beyond fp16 and saturates
    v[:, :, 3] = 0.0
    restored_k, restored_v = dequantize(quantize(k, v, 2, 16))
    assert restored_k[..., 0].eq(7.0).all() and restored_k[..., 1].eq(65504.0).all()
    assert restored_v[:, :, 3].eq(0).all()
    assert restored_k.isfinite().all() and restored_v.isfinite().all()


def test_appending_is_dequantized_as_if_apart():
    first, second = quantize(*_tokens(37), 4, 16), quantize(*_tokens(5, seed=1), 4, 16)
    both = append(first, second)
    assert both.ends.tolist() == [16, 32, 37, 42]
    for whole, parts in zip(
        dequantize(both), zip(dequantize(first), dequantize(second), strict=True), strict=True
    ):
        assert torch.equal(whole, torch.cat(parts, 2))
    empty = quantize(*_tokens(0), 4, 16)
    assert torch.equal(append(empty, first).k_codes, first.k_codes)
    with pytest.raises(ArgumentError, match="2 bits"):
        append(first, quantize(*_tokens(4), 2, 16))


def test_two_bits_of_seven_channels_are_refused():
    with pytest.raises(ArgumentError, match="head_dim 7"):
        quantize(*_tokens(4, dim=7), 2, 16)


def _attention(q, pools, tail, visible=None):
    return kv_attention(q, [t for pool in pools for t in pool], *tail, visible, 0.2)


@pytest.mark.parametrize("provider", ["cpu_cpp", "cpu_sdpa", "reference"])
def test_attends_to_dequantized_keys_and_values(provider):
    if provider == "cpu_cpp" and kv_attention.usable(kv_attention.providers[0]) is not None:
        pytest.skip(kv_attention.usable(kv_attention.providers[0]))
    pools = [quantize(*_tokens(70), 4, 32), quantize(*_tokens(90, seed=1), 2, 32)]
    tail = _tokens(10, seed=2)
    q = torch.randn(1, 6, 3, 32)
    k, v = (
        torch.cat([*side, t], 2)
        for side, t in zip(zip(*map(dequantize, pools), strict=True), tail, strict=True)
    )
    mask = torch.ones(3, 170, dtype=torch.bool).tril(167)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=0.2, enable_gqa=True
    )
    with kv_attention.force(provider):
        torch.testing.assert_close(_attention(q, pools, tail), expected, rtol=1e-5, atol=1e-5)


def test_order_of_slots_does_not_matter():
    k, v = _tokens(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    q, tail = torch.randn(1, 2, 1, 32), _tokens(1, seed=3)
    plain = _attention(q, [quantize(k, v, 4, 64)], tail)
    mixed = _attention(q, [quantize(k[:, :, order], v[:, :, order], 4, 64)], tail)
    torch.testing.assert_close(plain, mixed, rtol=1e-5, atol=1e-6)


def test_scores_of_any_size_do_not_overflow():
    q, tail = torch.full((1, 2, 1, 32), 40.0), _tokens(4)
    pool = quantize(*(t * 20 for t in _tokens(50, seed=1)), 8, 32)
    with kv_attention.force("reference"):
        expected = _attention(q, [pool], tail)
    actual = _attention(q, [pool], tail)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_hidden_slots_have_no_effect():
    k, v = _tokens(60)
    q, tail = torch.randn(1, 2, 1, 32), _tokens(5, seed=3)
    visible = torch.rand(1, 65, generator=torch.Generator().manual_seed(0)) < 0.5
    visible[:, -1] = True
    before = _attention(q, [quantize(k, v, 4, 64)], tail, visible)
    v[:, :, ~visible[0, :60]] = 1e3
    after = _attention(q, [quantize(k, v, 4, 64)], tail, visible)
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    "change, argument",
    [
        (dict(tail=_tokens(2)), "k_tail"),  # three queries ask
        (dict(tail=_tokens(5, heads=4)), "k_tail"),
        (dict(tail=_tokens(5, dim=16)), "k_tail"),
        (dict(pools=[quantize(*_tokens(8, heads=1), 4, 8)]), "pools"),
        (dict(visible=torch.ones(1, 4, dtype=torch.bool)), "visible"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, argument):
    call = dict(
        q=torch.randn(1, 6, 3, 32), pools=[quantize(*_tokens(8), 4, 8)], tail=_tokens(5), visible=None
    )
    with pytest.raises(ArgumentError) as error:
        _attention(**(call | change))
    assert error.value.argument == argument


def test_flat_list_must_hold_whole_pools():
    with pytest.raises(ArgumentError, match="k_codes, k_affine"):
        as_pools([torch.zeros(1)] * 7)
    assert Pool._fields == ("k_codes", "k_affine", "v_codes", "v_affine", "ends")
