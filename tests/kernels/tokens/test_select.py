"""Choices of tokens: exact, repeatable, and never at the cost of protected tokens."""

import math
from itertools import pairwise

import pytest
import torch

from thresher import ops
from thresher.errors import ArgumentError
from thresher.kernels import catalog

catalog.load()
topk_sorted, topk_segments = ops.get("topk_sorted"), ops.get("topk_segments")
adaptive_count, important_attention = ops.get("adaptive_count"), ops.get("important_attention")


def _flags(n, *at):
    return torch.isin(torch.arange(n), torch.tensor(at))[None]


def test_keeps_the_largest_in_order_of_place():
    scores = torch.tensor([[0.1, 5.0, -2.0, 3.0, 4.0]])
    assert topk_sorted(scores, None, None, 3, None).tolist() == [[1, 3, 4]]


def test_ties_go_to_the_earlier_token():
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0, -0.0, 0.0]])
    assert topk_sorted(scores, None, None, 3, None).tolist() == [[0, 1, 4]]
    assert topk_sorted(scores[:, 5:], None, None, 1, None).tolist() == [[0]], "minus zero equals zero"


def test_nan_and_infinities():
    scores = torch.tensor([[math.nan, -math.inf, -1e38, math.inf, 0.0]])
    assert topk_sorted(scores, None, None, 3, None).tolist() == [[2, 3, 4]]
    assert topk_sorted(scores, _flags(5, 0), None, 1, None).tolist() == [[0]], "protected before +inf"
    assert topk_sorted(scores, None, _flags(5, 3), 4, None).tolist() == [[0, 1, 2, 4]], "padding after NaN"


def test_too_many_protected_keeps_the_last_of_them():
    assert topk_sorted(torch.rand(1, 9), _flags(9, 1, 2, 7, 8), None, 2, None).tolist() == [[7, 8]]


def test_all_of_them_is_the_identity():
    scores = torch.randn(3, 20)
    assert torch.equal(topk_sorted(scores, None, None, 20, None), torch.arange(20).expand(3, -1))


@pytest.mark.parametrize("k", [0, 21])
def test_budget_outside_the_row_is_refused(k):
    with pytest.raises(ArgumentError, match="k: got"):
        topk_sorted(torch.rand(1, 20), None, None, k, None)


def test_counts_leave_places_empty_at_the_end():
    scores = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert topk_sorted(scores, None, None, 3, torch.tensor([1, 2])).tolist() == [[0, -1, -1], [0, 2, -1]]


def test_close_scores_of_a_large_scale_are_told_apart():
    """One float key holding segment and score would merge these: 1e6 leaves no bits for 1e-6."""
    scores = torch.tensor([1e-6, 2e-6, 3e-6, 3e-6, 2e-6, 1e-6])
    ends = torch.tensor([0, 3, 6], dtype=torch.int32)
    index, kept = topk_segments(scores, None, ends, torch.tensor([2, 2]), 4)
    assert index.tolist() == [1, 2, 3, 4] and kept.tolist() == [0, 2, 4]


def test_segments_choose_as_if_alone():
    make = torch.Generator().manual_seed(0)
    scores = torch.randn(200, generator=make) * torch.logspace(-8, 8, 200)
    ends, counts = [0, 50, 50, 120, 200], [7, 0, 70, 13]
    index, kept = topk_segments(scores, None, torch.tensor(ends, dtype=torch.int32), torch.tensor(counts), 95)
    assert kept.tolist() == [0, 7, 7, 77, 90]
    for s, (a, b) in enumerate(pairwise(ends)):
        if counts[s]:
            alone = topk_sorted(scores[None, a:b], None, None, counts[s], None)[0] + a
            assert torch.equal(index[kept[s] : kept[s + 1]], alone)
    assert index.unique().numel() == 95, "filler repeats no token"


def test_segments_agree_under_compile_without_a_break():
    scores, ends = torch.randn(60), torch.tensor([0, 20, 60], dtype=torch.int32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def both(scores, counts):
        index, kept = torch.ops.thresher.topk_segments(scores, None, ends, counts, 24)
        return scores[index], kept

    counts = torch.tensor([8, 16])
    index, _ = topk_segments(scores, None, ends, counts, 24)
    assert torch.equal(both(scores, counts)[0], scores[index])


def test_adaptive_count_is_the_least_that_reaches_tau():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 9.0, 0.0]])
    assert adaptive_count(scores, None, 0.7).tolist() == [2, 3, 1]
    assert adaptive_count(scores, None, 1.0).tolist() == [4, 4, 1]


def test_adaptive_count_includes_every_protected_token():
    scores = torch.tensor([[9.0, 0.0, 0.0, 1.0]])
    assert adaptive_count(scores, _flags(4, 1, 2), 0.9).tolist() == [3]
    assert adaptive_count(scores, _flags(4, 0, 1, 2), 0.5).tolist() == [3]


def test_adaptive_choice_holds_its_share():
    make = torch.Generator().manual_seed(1)
    scores, protected = torch.rand(5, 300, generator=make) ** 6, torch.rand(5, 300, generator=make) < 0.05
    counts = adaptive_count(scores, protected, 0.9)
    index = topk_sorted(scores, protected, None, 300, counts)
    held = torch.where(index >= 0, scores.gather(1, index.clamp_min(0)), 0.0).sum(1) / scores.sum(1)
    assert (held >= 0.9 - 1e-6).all()
    assert torch.isin(protected[0].nonzero()[:, 0], index[0]).all()


@pytest.mark.parametrize("tau", [0.0, -1.0, 1.01])
def test_tau_outside_its_range_is_refused(tau):
    with pytest.raises(ArgumentError, match="tau"):
        adaptive_count(torch.rand(1, 4), None, tau)


def test_all_tokens_important_is_causal_attention():
    q, k, v = (torch.randn(2, h, 33, 16) for h in (4, 2, 2))
    out = important_attention(q, k, v, torch.arange(33).expand(2, -1), 0.25)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.25, enable_gqa=True
    )
    assert torch.equal(out, dense)


def test_unimportant_tokens_neither_act_nor_receive():
    q, k, v = (torch.randn(1, 2, 12, 16) for _ in range(3))
    index = torch.tensor([[1, 4, 5, 11, -1]])
    out = important_attention(q, k, v, index, 0.25)
    masked = torch.zeros(12, 12, dtype=torch.bool)
    masked[:, index[0, :4]] = True
    masked &= torch.ones(12, 12).tril().bool()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=masked, scale=0.25)
    torch.testing.assert_close(out[:, :, index[0, :4]], dense[:, :, index[0, :4]])
    rest = [i for i in range(12) if i not in index[0].tolist()]
    assert out[:, :, rest].eq(0).all()
