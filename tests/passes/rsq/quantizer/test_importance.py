"""Token importance: each strategy against a naive computation, and the mapping's edges."""

import pytest
import torch

from thresher.errors import ArgumentError
from thresher.passes.rsq.quantizer import importance


def naive_attention(q, k, seen, softcap=0.0):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    probabilities = torch.softmax(scores.masked_fill(~seen[:, None], -torch.inf), -1).nan_to_num(0.0)
    return probabilities.sum((1, 2))


def qk(batch=2, heads=4, kv_heads=2, length=11, dim=8):
    make = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, heads, length, dim, generator=make),
        torch.randn(batch, kv_heads, length, dim, generator=make),
    )


@pytest.mark.parametrize("block", [1, 40, 1 << 22])
@pytest.mark.parametrize(
    "causal, window, softcap", [(True, -1, 0.0), (False, -1, 0.0), (True, 3, 0.0), (False, 2, 1.5)]
)
def test_attncon_matches_the_full_map(monkeypatch, block, causal, window, softcap):
    monkeypatch.setattr(importance, "_BLOCK", block)
    q, k = qk()
    distance = torch.arange(11)[:, None] - torch.arange(11)
    seen = distance >= 0 if causal else torch.ones(11, 11, dtype=torch.bool)
    if window >= 0:
        seen = seen & (distance.abs() <= window)
    actual = importance.attention_concentration(q, k, causal=causal, window_left=window, softcap=softcap)
    torch.testing.assert_close(actual, naive_attention(q, k, seen[None].expand(2, -1, -1), softcap))
    # Each query of each head spends exactly one unit of attention.
    torch.testing.assert_close(actual.sum(1), torch.full((2,), 4.0 * 11))


def test_attncon_of_a_padded_sequence_is_that_of_the_sequence_alone():
    q, k = qk()
    real = torch.zeros(2, 11, dtype=torch.bool)
    real[0, 4:] = True
    real[1, :5] = True
    padded = importance.attention_concentration(q, k, real=real)
    for row, part in ((0, slice(4, 11)), (1, slice(0, 5))):
        alone = importance.attention_concentration(q[row : row + 1, :, part], k[row : row + 1, :, part])
        torch.testing.assert_close(padded[row, part], alone[0])
    assert (padded[~real] == 0).all()


def test_attncon_normalised_divides_by_the_queries_that_see_a_key():
    q, k = qk()
    plain = importance.attention_concentration(q, k)
    expected = plain / torch.arange(11, 0, -1)
    torch.testing.assert_close(importance.attention_concentration(q, k, normalize=True), expected)


def test_attncon_refuses_keys_of_another_layer():
    q, k = qk()
    with pytest.raises(ArgumentError, match="kv_heads a divisor of 4"):
        importance.attention_concentration(q, k[:, :, :7])


def test_first_and_last_parts_count_real_tokens():
    real = torch.ones(2, 16, dtype=torch.bool)
    real[1, :8] = False
    first = importance.chunks(real, 8, (0,))
    assert first[0].tolist() == [1, 1] + [0] * 14
    assert first[1].tolist() == [0] * 8 + [1] + [0] * 7
    both = importance.chunks(real, 16, (0, 15))
    assert both[0].nonzero().flatten().tolist() == [0, 15]
    with pytest.raises(ArgumentError):
        importance.chunks(real, 8, (8,))


def test_rare_tokens_small_changes_large_norms_and_far_tokens_score_high():
    tokens = torch.tensor([[3, 3, 3, 1]])
    rarity = importance.token_rarity(tokens, torch.bincount(tokens.flatten(), minlength=5))
    assert rarity.argmax(1).item() == 3
    x = torch.zeros(1, 3, 4)
    x[0, 2] = 2.0
    assert importance.activation_norm(x).tolist() == [[0.0, 0.0, 4.0]]
    assert importance.activation_change(x, torch.zeros_like(x)).argmin(1).item() == 2


def test_token_distance_is_the_mean_of_the_distance_matrix():
    x = torch.randn(2, 9, 5) + 100  # an offset that fp32 cancellation would show
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, 6:] = False
    actual = importance.token_distance(x, real)
    for row, count in ((0, 9), (1, 6)):
        part = x[row, :count].double()
        expected = torch.cdist(part, part).square().mean(1).float()
        torch.testing.assert_close(actual[row, :count], expected, rtol=1e-4, atol=1e-5)


def test_weights_span_the_range_and_average_to_one_per_sequence():
    scores = torch.rand(3, 20) * torch.tensor([[1.0], [100.0], [1e-3]])
    w = importance.weights(scores, 0.05)
    torch.testing.assert_close(w.mean(1), torch.ones(3))
    torch.testing.assert_close(w.amin(1) / w.amax(1), torch.full((3,), 0.05))
    assert torch.equal(w.argsort(1), scores.argsort(1))


@pytest.mark.parametrize("r_min, r_max", [(0.01, 1.0), (0.3, 0.3)])
def test_equal_scores_or_bounds_give_exactly_one(r_min, r_max):
    scores = torch.full((2, 7), 0.3) if r_min != r_max else torch.rand(2, 7)
    assert torch.equal(importance.weights(scores, r_min, r_max), torch.ones(2, 7))


def test_a_sequence_of_one_token_weighs_one():
    assert importance.weights(torch.tensor([[5.0]]), 0.01).tolist() == [[1.0]]


def test_pads_weigh_nothing_and_change_nothing():
    scores = torch.rand(2, 8)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[0, :3] = False
    real[1] = False
    noisy = scores.clone()
    noisy[~real] = float("nan")
    w = importance.weights(noisy, 0.1, real=real)
    torch.testing.assert_close(w[0, 3:], importance.weights(scores[:1, 3:], 0.1)[0])
    assert (w[~real] == 0).all()


def test_power_stretches_before_the_mapping():
    scores = torch.tensor([[0.0, 1.0, 4.0]])
    torch.testing.assert_close(
        importance.weights(scores, 0.1, power=0.5), importance.weights(scores.sqrt(), 0.1)
    )
    with pytest.raises(ArgumentError, match="power"):
        importance.weights(-scores, 0.1, power=2.0)


@pytest.mark.parametrize("r_min", [0.0, -1.0, 1.5])
def test_bad_ranges_are_refused(r_min):
    with pytest.raises(ArgumentError, match="r_min"):
        importance.weights(torch.rand(1, 4), r_min)


def test_nonfinite_scores_are_refused():
    with pytest.raises(ArgumentError, match="scores"):
        importance.weights(torch.tensor([[1.0, float("nan")]]), 0.1)


def test_shifted_copies_keep_every_token():
    tokens = torch.arange(8).reshape(1, 8)
    shifted = importance.shift_sequences(tokens, 4)
    assert shifted[:, 0].tolist() == [0, 6, 4, 2]
    assert torch.equal(shifted.sort(1).values, tokens.expand(4, -1))
    two = importance.shift_sequences(torch.arange(12).reshape(2, 6), 2)
    assert two[:, 0].tolist() == [0, 3, 6, 9]
    with pytest.raises(ArgumentError, match="copies"):
        importance.shift_sequences(tokens, 9)
