"""Packing finds exactly the real tokens, and unpacking puts results back where they came from."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from thresher.errors import ArgumentError
from thresher.runtime.packing import plan as packing
from thresher.runtime.packing.buckets import geometric, multiple_of
from thresher.runtime.packing.plan import pack, plan, unpack


@st.composite
def masks(draw):
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    bits = draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    return torch.tensor(bits).reshape(rows, width)


BUCKETS = st.sampled_from([None, multiple_of(1), multiple_of(8), geometric(1.5, 4)])


@settings(max_examples=150, deadline=None)
@given(masks(), BUCKETS)
def test_plan_describes_the_mask(mask, bucket):
    p = plan(mask, bucket=bucket)
    batch, width = mask.shape
    assert (p.batch, p.width, p.tokens) == (batch, width, int(mask.sum()))
    assert list(p.lengths) == mask.sum(1).tolist()
    real_rows, real_cols = mask.nonzero(as_tuple=True)
    assert torch.equal(p.rows[: p.tokens], real_rows) and torch.equal(p.cols[: p.tokens], real_cols)
    assert torch.equal(p.idx, p.idx.clamp(0, batch * width - 1)) and p.idx.shape == (p.total,)
    assert (p.rows[p.tokens :] == -1).all() and mask.reshape(-1)[p.idx].all()
    ends = p.cu_seqlens.tolist()
    assert p.cu_seqlens.dtype == torch.int32 and len(ends) == batch + (1 if bucket is None else 2)
    sizes = [b - a for a, b in itertools.pairwise(ends)]
    assert sizes == [*p.lengths] + ([] if bucket is None else [p.filler]) and max(sizes) == p.max_len
    assert p.total == (p.tokens if bucket is None or p.tokens == 0 else bucket(p.tokens))


@settings(max_examples=150, deadline=None)
@given(masks(), BUCKETS, st.sampled_from([(0, 1), (1, 0), (0, 2), (-3, -1), (2, 0), (3, 1)]), st.booleans())
def test_unpack_of_pack_is_the_batch_with_zeros_at_pads(mask, bucket, dims, transposed):
    p = plan(mask, bucket=bucket)
    shape = [3, 2, 5, 4]
    shape[dims[0]], shape[dims[1]] = mask.shape
    padded = torch.randn(shape[::-1]).permute(3, 2, 1, 0) if transposed else torch.randn(shape)
    packed = pack(padded, p, dims)
    shape[dims[0]], shape[dims[1]] = 1, p.total
    assert list(packed.shape) == shape
    front = [d % 4 for d in dims]
    by_token = padded.movedim(front, (0, 1))
    assert torch.equal(packed.movedim(front, (0, 1))[0, : p.tokens], by_token[mask])
    back = unpack(packed, p, dims).movedim(front, (0, 1))
    assert torch.equal(back, by_token * mask[:, :, None, None])


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16]
)
def test_every_mask_dtype_gives_the_same_plan(dtype):
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    assert plan(mask.to(dtype)).idx.tolist() == [1, 2, 3, 5]


@pytest.mark.parametrize(
    "mask, words",
    [
        (torch.ones(2, 1, 1, 3), ["attention_mask", "(2, 1, 1, 3)", "[batch, sequence]"]),
        (torch.ones(3), ["(3,)"]),
        (torch.ones(2, 3, dtype=torch.complex64), ["complex64"]),
        (torch.tensor([[0.0, -torch.inf]]), ["1 values", "Additive masks"]),
        (torch.tensor([[1.0, torch.nan]]), ["1 values"]),
        (torch.tensor([[1, 2, 2]]), ["2 values", "segment ids"]),
        (torch.tensor([[1, -1]]), ["1 values"]),
    ],
)
def test_other_masks_are_refused(mask, words):
    with pytest.raises(ArgumentError) as error:
        plan(mask)
    assert all(word in str(error.value) for word in words)


def test_more_tokens_than_int32_offsets_address_are_refused():
    with pytest.raises(ArgumentError, match="at most 2147483647"):
        plan(torch.ones(1, 1, dtype=torch.bool), bucket=lambda tokens: packing.MAX_TOKENS + 1)


def test_a_bucket_below_its_batch_is_refused():
    with pytest.raises(ArgumentError, match="bucket"):
        plan(torch.ones(1, 4, dtype=torch.bool), bucket=lambda tokens: 3)


@pytest.mark.parametrize("rows, width", [(0, 4), (3, 0), (0, 0), (3, 4)])
def test_batches_without_any_token(rows, width):
    p = plan(torch.zeros(rows, width), bucket=multiple_of(64))
    assert p.total == 0 and p.max_len == 0 and p.cu_seqlens.tolist() == [0] * (rows + 2)
    packed = pack(torch.ones(rows, width, 5), p)
    assert packed.shape == (1, 0, 5)
    assert torch.equal(unpack(packed, p), torch.zeros(rows, width, 5))


def test_more_than_65k_tokens():
    p = plan(torch.ones(3, 40_000, dtype=torch.bool))
    assert p.cu_seqlens.tolist() == [0, 40_000, 80_000, 120_000]
    assert torch.equal(p.idx, torch.arange(120_000)) and p.padding == 0


def test_a_batch_dim_of_one_stands_for_every_row():
    p = plan(torch.tensor([[0, 1, 1], [1, 0, 0]]), bucket=multiple_of(4))
    assert pack(torch.arange(3)[None], p).tolist() == [[1, 2, 0, 1]]


def test_pads_are_never_read():
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    hidden = torch.randn(2, 3, 4).masked_fill(mask[..., None] == 0, torch.nan)
    p = plan(mask, bucket=multiple_of(8))
    assert pack(hidden, p).isfinite().all() and unpack(pack(hidden, p), p).isfinite().all()


@pytest.mark.parametrize(
    "shape, dims", [((2, 4), (0, 1)), ((3, 3), (0, 1)), ((2, 3), (0, 0)), ((2, 3), (0, -2)), ((2, 3), (0, 5))]
)
def test_pack_refuses_what_does_not_fit(shape, dims):
    p = plan(torch.tensor([[0, 1, 1], [1, 0, 0]]))
    with pytest.raises(ArgumentError):
        pack(torch.zeros(shape), p, dims)


def test_unpack_refuses_another_plans_tensor():
    p = plan(torch.tensor([[0, 1, 1], [1, 0, 0]]))
    with pytest.raises(ArgumentError, match="size 1 in dim 0 and 3 in dim 1"):
        unpack(torch.zeros(1, 4, 8), p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_large_results_are_zero_at_pads_too(dtype):
    mask = torch.zeros(4, 1024, dtype=torch.bool)
    mask[1, 5:9] = True
    p = plan(mask)
    wide = packing._LAZY_ZEROS // (4 * 1024) // dtype.itemsize
    values = torch.ones(1, 4, wide, dtype=dtype)
    out = unpack(values, p)
    assert out.dtype == dtype and out[mask].eq(1).all() and out[~mask].eq(0).all()


def test_gradients_flow_to_real_tokens_only():
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    p = plan(mask, bucket=multiple_of(8))
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    (unpack(pack(hidden, p) * 2, p)).sum().backward()
    assert torch.equal(hidden.grad, 2.0 * mask[..., None].expand(2, 3, 4))


class _Waits(TorchFunctionMode):
    """Counts what makes the host wait for a device."""

    names = {
        "tolist",
        "item",
        "cpu",
        "numpy",
        "nonzero",
        "__bool__",
        "__int__",
        "__float__",
        "__len__",
        "equal",
    }

    def __init__(self):
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.names:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_call_waits_for_the_device_once(dtype):
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]], dtype=dtype)
    hidden = torch.randn(2, 3, 4)
    with _Waits() as waits:
        p = plan(mask, bucket=multiple_of(64))
        unpack(pack(hidden, p), p)
    assert waits.seen == ["tolist"]


@pytest.mark.gpu
def test_a_call_waits_for_the_gpu_once():
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]], device="cuda")
    hidden = torch.randn(2, 3, 4, device="cuda")
    expected = unpack(pack(hidden, plan(mask)), plan(mask))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as warned:
            p = plan(mask)
            result = unpack(pack(hidden, p), p)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(warned) == 1 and torch.equal(result, expected)
