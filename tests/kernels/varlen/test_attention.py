"""Packed attention keeps segments apart, bit for bit, and is each segment's own dense attention."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from thresher.errors import ArgumentError
from thresher.kernels import catalog
from thresher.kernels.varlen import cpu as varlen_cpu
from thresher.kernels.varlen.attention import varlen_attention, varlen_attention_masked
from thresher.runtime.packing.buckets import multiple_of
from thresher.runtime.packing.plan import pack, plan, unpack

catalog.load()
KINDS = {  # causal, window_left, softcap
    "causal": (True, -1, 0.0),
    "bidirectional": (False, -1, 0.0),
    "window": (True, 5, 0.0),
    "two-sided window": (False, 5, 0.0),
    "soft cap": (True, -1, 3.0),
    "soft cap and window": (True, 5, 3.0),
}


def qkv(lengths, heads=4, kv_heads=2, dim=16, seed=0, dtype=torch.float32):
    """Segments drawn one by one, so that a segment is the same whatever stands beside it."""
    parts = []
    for i, length in enumerate(lengths):
        make = torch.Generator().manual_seed(1000 * seed + i)
        parts.append([torch.randn(1, length, h, dim, generator=make) for h in (heads, kv_heads, kv_heads)])
    return [torch.cat(part, dim=1).to(dtype).transpose(1, 2) for part in zip(*parts)]


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def attention(tensors, lengths, kind="causal", scale=0.3):
    return varlen_attention(*tensors, offsets(lengths), max(lengths), scale, *KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_equals_dense_attention_on_it_alone(kind):
    lengths = [3, 150, 1, 6, 7]
    tensors = qkv(lengths)
    out = attention(tensors, lengths, kind)
    causal, window, softcap = KINDS[kind]
    begin = 0
    for length in lengths:
        q, k, v = (t[:, :, begin : begin + length] for t in tensors)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) | torch.tensor(not causal)
        if window >= 0:
            seen &= distance.abs() <= window
        scores = 0.3 * q.double() @ k.double().repeat_interleave(2, 1).mT
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        expected = weights @ v.double().repeat_interleave(2, 1)
        torch.testing.assert_close(out[:, :, begin : begin + length].double(), expected, rtol=1e-5, atol=1e-5)
        begin += length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_other_segments_never_change_a_bit(kind, dtype):
    lengths, changed = [9, 64, 200, 64], 1
    before = attention(qkv(lengths, dtype=dtype), lengths, kind)
    kept = (slice(0, 9), slice(73, 337))

    other = qkv(lengths, seed=1, dtype=dtype)
    mixed = qkv(lengths, dtype=dtype)
    for tensor, replacement in zip(mixed, other):
        tensor[:, :, 9:73] = replacement[:, :, 9:73]
    after = attention(mixed, lengths, kind)
    assert all(torch.equal(before[:, :, part], after[:, :, part]) for part in kept)
    assert not torch.equal(before[:, :, 9:73], after[:, :, 9:73])

    longer = [*lengths]
    longer[changed] = 97
    after = attention(qkv(longer, dtype=dtype), longer, kind)
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert torch.equal(before[:, :, 73:], after[:, :, 106:])

    after = attention(qkv([*lengths, 64], dtype=dtype), [*lengths, 64], kind)
    assert torch.equal(before, after[:, :, :337])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_stay_in_their_segment(kind, poison):
    lengths = [9, 30, 140]
    clean = attention(qkv(lengths), lengths, kind)
    tensors = qkv(lengths)
    for tensor in tensors:
        tensor[:, :, 9:39] = poison
    out = attention(tensors, lengths, kind)
    assert torch.equal(out[:, :, :9], clean[:, :, :9]) and torch.equal(out[:, :, 39:], clean[:, :, 39:])
    assert not out[:, :, 9:39].isfinite().any()


@pytest.mark.parametrize("window", [62, 63, 64, 65, 200])
def test_windows_around_the_length_and_the_block(window, monkeypatch):
    monkeypatch.setattr(varlen_cpu, "_MIN_BLOCK", 16)
    lengths = [63, 64, 65, 130]
    args = (*qkv(lengths), offsets(lengths), 130, 0.3)
    for causal in (True, False):
        out = varlen_attention(*args, causal, window, 0.0)
        expected = varlen_attention.reference(*args, causal, window, 0.0)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_a_window_never_costs_a_mask_of_the_whole_segment(monkeypatch):
    widest = []

    def record(q, k, v, attn_mask=None, **kwargs):
        widest.append(0 if attn_mask is None else attn_mask.numel())
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(varlen_cpu, "scaled_dot_product_attention", record)
    with varlen_attention.force("cpu_sdpa"):
        varlen_attention(*qkv([4096], heads=2, kv_heads=1), offsets([4096]), 4096, 0.3, True, 64, 0.0)
    assert 0 < max(widest) <= 128 * (128 + 64)


def test_the_result_is_stored_token_major():
    out = attention(qkv([3, 5]), [3, 5])
    assert out.shape == (1, 4, 8, 16) and out.transpose(1, 2).is_contiguous()
    for provider in varlen_attention.provider_names():
        if provider in ("cpu_cpp", "cpu_sdpa", "reference"):
            with varlen_attention.force(provider):
                assert attention(qkv([3, 5]), [3, 5]).stride() == out.stride()


def test_any_strides_are_taken():
    lengths = [5, 40]
    expected = attention(qkv(lengths), lengths)
    head_major = [t.contiguous() for t in qkv(lengths)]
    odd = [t.mT.contiguous().mT for t in qkv(lengths)]
    for tensors in (head_major, odd):
        torch.testing.assert_close(attention(tensors, lengths), expected, rtol=1e-5, atol=1e-6)


def test_any_upper_bound_serves_as_max_len():
    args = (*qkv([3, 5]), offsets([3, 5]))
    assert torch.equal(
        varlen_attention(*args, 5, 0.3, True, -1, 0.0), varlen_attention(*args, 512, 0.3, True, -1, 0.0)
    )


@pytest.mark.parametrize(
    "change, argument",
    [
        ({"q": torch.zeros(2, 4, 8, 16)}, "q"),
        ({"k": torch.zeros(1, 3, 8, 16)}, "k"),
        ({"k": torch.zeros(1, 2, 8, 8)}, "k"),
        ({"v": torch.zeros(1, 2, 7, 16)}, "v"),
        ({"cu": torch.tensor([0, 3, 8])}, "cu_seqlens"),
        ({"cu": torch.tensor([0, 3, 7], dtype=torch.int32)}, "cu_seqlens"),
        ({"cu": torch.tensor([0, 9, 8], dtype=torch.int32)}, "cu_seqlens"),
        ({"cu": torch.tensor([1, 3, 8], dtype=torch.int32)}, "cu_seqlens"),
        ({"cu": torch.tensor([], dtype=torch.int32)}, "cu_seqlens"),
    ],
)
def test_what_does_not_fit_is_refused(change, argument):
    q, k, v = qkv([3, 5])
    given = {"q": q, "k": k, "v": v, "cu": offsets([3, 5]), **change}
    with pytest.raises(ArgumentError) as error:
        varlen_attention(*given.values(), 5, 0.3, True, -1, 0.0)
    assert error.value.argument == argument


def padded_batch(mask, heads=4, dim=16):
    make = torch.Generator().manual_seed(3)
    return [torch.randn(*mask.shape, heads, dim, generator=make).transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize("bucket", [None, multiple_of(64)])
@pytest.mark.parametrize("bias", ["bool", "alibi", "relative", "prefix"])
def test_masked_attention_equals_the_padded_batchs(bias, bucket):
    width = 24
    real = torch.rand(5, width, generator=torch.Generator().manual_seed(0)) < 0.5
    real[1], real[2], real[3] = False, torch.arange(width) >= 20, torch.arange(width) < 7
    causal = torch.ones(width, width).tril().bool()
    distance = (torch.arange(width) - torch.arange(width)[:, None]).float()
    allowed = real[:, None, None] & (causal | (torch.arange(width) < 4 if bias == "prefix" else False))
    mask = {
        "bool": allowed,
        "prefix": allowed,
        "alibi": (distance * torch.tensor([0.5, 0.25, 0.125, 0.06])[:, None, None])[None].masked_fill(
            ~allowed, -torch.inf
        ),
        "relative": torch.randn(1, 4, width, width, generator=torch.Generator().manual_seed(1)).masked_fill(
            ~allowed, torch.finfo(torch.float32).min
        ),
    }[bias]
    q, k, v = padded_batch(real)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25)
    p = plan(real, bucket=bucket)
    packed = [pack(t, p, (0, 2)) for t in (q, k, v)]
    out = varlen_attention_masked(*packed, mask, p.rows, p.cols, p.cu_seqlens, p.max_len, 0.25)
    assert out.transpose(1, 2).is_contiguous()
    back = unpack(out, p, (0, 2)).transpose(1, 2)
    torch.testing.assert_close(back[real], expected.transpose(1, 2)[real], rtol=1e-5, atol=1e-5)


def test_masked_attention_keeps_rows_apart():
    real = torch.arange(30) < torch.tensor([[30], [11], [20]])
    mask = (real[:, None, None] & torch.ones(30, 30).tril().bool()).float().log()
    p = plan(real, bucket=multiple_of(64))
    args = (p.rows, p.cols, p.cu_seqlens, p.max_len, 0.25)
    packed = [pack(t, p, (0, 2)) for t in padded_batch(real)]
    before = varlen_attention_masked(*packed, mask, *args)
    for tensor in packed:
        tensor[:, :, 30:41] = torch.nan
    mask[1] = torch.nan
    after = varlen_attention_masked(*packed, mask, *args)
    assert torch.equal(before[:, :, :30], after[:, :, :30]) and torch.equal(
        before[:, :, 41:], after[:, :, 41:]
    )
    assert after[:, :, 30:41].isnan().all()


def test_filler_sees_only_itself():
    p = plan(torch.tensor([[1, 1, 0], [0, 1, 0]]), bucket=multiple_of(8))
    q, k, v = (torch.randn(1, h, p.total, 8) for h in (4, 2, 2))
    out = varlen_attention_masked(
        q, k, v, torch.ones(1, 1, 3, 3).bool(), p.rows, p.cols, p.cu_seqlens, 8, 1.0
    )
    assert torch.equal(out[:, :, 3:], v.repeat_interleave(2, 1)[:, :, 3:])


@pytest.mark.parametrize(
    "mask, rows, argument",
    [
        (torch.ones(3, 3).bool(), None, "mask"),
        (torch.ones(1, 3, 3, 3).bool(), None, "mask"),
        (torch.ones(1, 1, 3, 3).int(), None, "mask"),
        (torch.ones(1, 1, 3, 3).bool(), torch.zeros(2, dtype=torch.int64), "rows"),
        (torch.ones(1, 1, 3, 3).bool(), torch.zeros(3), "rows"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, rows, argument):
    p = plan(torch.tensor([[1, 1, 0], [0, 1, 0]]))
    tensors = [torch.randn(1, 4, 3, 8) for _ in range(3)]
    with pytest.raises(ArgumentError) as error:
        varlen_attention_masked(
            *tensors, mask, p.rows if rows is None else rows, p.cols, p.cu_seqlens, p.max_len, 1.0
        )
    assert error.value.argument == argument


@pytest.mark.parametrize("window", [-1, 3])
def test_no_gradient_crosses_segments(window):
    """The definition itself: an output of one segment depends on that segment's inputs only, and causally on them."""
    lengths = (5, 7, 4)
    ends = torch.tensor([0, 5, 12, 16], dtype=torch.int32)
    q, k, v = (torch.randn(1, h, sum(lengths), 8, requires_grad=True) for h in (4, 2, 2))
    out = varlen_attention.reference(q, k, v, ends, 7, 0.3, True, window, 0.0)
    out[:, :, 9].sum().backward()  # the fifth token of the middle segment
    for tensor, first in ((k, 5), (v, 5), (q, 9)):
        reached = tensor.grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist()
        assert reached == list(range(max(first, 9 - window if window >= 0 else first), 10))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_lets_a_nan_cross_segments():
    """Why FlexAttention is no provider: masked keys still multiply their values, and 0 * NaN is NaN."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor([50, 30])
    segment = torch.repeat_interleave(torch.arange(2), lengths)
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 80, 16, generator=make) for _ in range(3))
    v[:, :, 60] = torch.nan

    def same(batch, head, i, j):
        return segment[i] == segment[j]

    with torch.no_grad():
        theirs = flex_attention(q, k, v, block_mask=create_block_mask(same, None, None, 80, 80, device="cpu"))
    ends = torch.tensor([0, 50, 80], dtype=torch.int32)
    ours = torch.ops.thresher.varlen_attention(q, k, v, ends, 50, 0.25, False, -1, 0.0)
    assert theirs[:, :, :50].isnan().all()
    assert not ours[:, :, :50].isnan().any() and ours[:, :, 50:].isnan().all()
