"""Which tokens stay: `thresher::topk_sorted`, `topk_segments`, `adaptive_count` and `tokens_holding`.

Choices are exact and repeatable. Every token gets one integer key that no other token shares: its
class (protected, plain, padding), its score, its place. Of equal scores the earlier token wins; of
protected tokens too many to keep, the later ones win, since the question and the token that answers
stand last. NaN scores rank below all others. Scores are compared in fp32.
"""

from __future__ import annotations

import torch

from thresher.errors import ArgumentError
from thresher.ops import Sample, define

from .. import arguments
from . import plain

_CLASS, _SCORE = 62, 30  # bits below the class, bits below the score: the rest holds the place
_MAX_TOKENS = 1 << _SCORE
_MOST_COUNT = (1 << 62) - 1


def _check_flags(scores: torch.Tensor, dim: int, **flags: torch.Tensor | None) -> None:
    if scores.dim() != dim or not scores.is_floating_point():
        accepted = "floating [batch, tokens]" if dim == 2 else "floating [tokens]"
        raise ArgumentError("scores", arguments.given(scores), accepted, "Give each token one score.")
    if scores.shape[-1] >= _MAX_TOKENS:
        raise ArgumentError(
            "scores", f"{scores.shape[-1]} tokens", f"fewer than {_MAX_TOKENS}", "Split the row."
        )
    for name, t in flags.items():
        if t is not None and (t.shape != scores.shape or t.dtype != torch.bool):
            raise ArgumentError(
                name,
                f"{t.dtype} {tuple(t.shape)}",
                f"bool {tuple(scores.shape)}, as scores has",
                "Mark each token.",
            )


def rank_keys(scores: torch.Tensor, protected: torch.Tensor | None, pad: torch.Tensor | None) -> torch.Tensor:
    """int64 keys [..., n], all different along n; the larger stays first."""
    scores = scores.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0  # -0 to 0
    bits = scores.contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integers in the order of the floats
    place = torch.arange(scores.shape[-1], device=scores.device)
    key = (ordered << _SCORE) + (_MAX_TOKENS - 1 - place)
    if protected is not None:
        key = torch.where(protected, (1 << _CLASS) + place, key)
    if pad is not None:
        key = torch.where(pad, -(1 << _CLASS) - (1 << (_CLASS - 1)) - place, key)
    return key


def _check_counts(counts: torch.Tensor, rows: int) -> None:
    if counts.shape != (rows,) or counts.dtype not in arguments.INTEGERS:
        accepted = f"integers [{rows}]"
        raise ArgumentError("counts", arguments.given(counts), accepted, "Say for each row how many stay.")
    arguments.in_range("counts", counts, 0, _MOST_COUNT, "Clamp the counts at 0.")


def _check_tau(tau: float) -> None:
    if not 0.0 < tau <= 1.0:
        raise ArgumentError("tau", tau, "a share above 0, at most 1", "ZipVL uses .96 to .975.")


def _check_topk(scores, protected, pad, k, counts) -> None:
    _check_flags(scores, 2, protected=protected, pad=pad)
    _check_k(k, scores.shape[1])
    if counts is not None:
        _check_counts(counts, scores.shape[0])


def _check_segments(scores, protected, cu_seqlens, counts, k) -> None:
    _check_flags(scores, 1, protected=protected)
    _check_k(k, scores.shape[0])
    arguments.rising("cu_seqlens", cu_seqlens, scores.shape[0], "Give each sequence's end, from 0 on.")
    _check_counts(counts, cu_seqlens.shape[0] - 1)


def _check_count(scores, protected, tau) -> None:
    _check_tau(tau)
    _check_flags(scores, 2, protected=protected)


def _check_holding(sums, scores, protected, pad, tau) -> None:
    _check_tau(tau)
    _check_flags(scores, 2, protected=protected, pad=pad)
    if sums.shape != scores.shape or not sums.is_floating_point() or not scores.numel():
        accepted = f"floating {tuple(scores.shape)} as scores has, of one token or more"
        raise ArgumentError("sums", arguments.given(sums), accepted, "Give each token its attention.")


def _check_k(k: int, tokens: int) -> None:
    if k < 1 or k > tokens:
        raise ArgumentError("k", k, f"1 to the number of tokens ({tokens})", "Clamp the budget first.")


def _fake_topk(scores, protected, pad, k, counts):
    return scores.new_empty((scores.shape[0], k), dtype=torch.int64)


def _topk_samples(device, dtype):
    make = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 50, generator=make)
    scores[0, 10:20] = 0.5  # ties
    scores[1, 3], scores[1, 4], scores[1, 5], scores[1, 6] = torch.nan, torch.inf, -torch.inf, -0.0
    protected = torch.rand(3, 50, generator=make) < 0.2
    protected[2, 45:] = True
    pad = torch.zeros(3, 50, dtype=torch.bool)
    pad[0, :30] = True
    counts = torch.tensor([3, 12, 40])
    scores, protected, pad, counts = (t.to(device) for t in (scores, protected, pad, counts))
    return [
        Sample("plain", (scores, None, None, 7, None)),
        Sample("protected and padded", (scores, protected, pad & ~protected, 25, None)),
        Sample("more protected than kept", (scores, protected, None, 2, None)),
        Sample("all", (scores, protected, pad & ~protected, 50, None)),
        Sample("counts", (scores, protected, None, 20, counts)),
    ]


@define(
    "topk_sorted(Tensor scores, Tensor? protected, Tensor? pad, SymInt k, Tensor? counts) -> Tensor",
    fake=_fake_topk,
    inputs=_topk_samples,
    tolerance={torch.float32: 0.0},
    plain=plain.SORTED,
    check=_check_topk,
)
def topk_sorted(scores, protected, pad, k, counts):
    """The k tokens of each row to keep, int64 [B, k], rising.

    scores: [B, n]. protected: bool [B, n] or None, kept before any score counts.
    pad: bool [B, n] or None, kept only where nothing else is left.
    counts: int [B] or None: a row keeps only so many of its k; the places left over hold -1, last.
    """
    index = rank_keys(scores, protected, pad).topk(k, dim=1).indices
    if counts is None:
        return index.sort(1).values
    spare = torch.arange(k, device=scores.device) >= counts[:, None]
    index = index.masked_fill(spare, scores.shape[1]).sort(1).values
    return index.masked_fill(index == scores.shape[1], -1)


def _fake_segments(scores, protected, cu_seqlens, counts, k):
    return scores.new_empty((k,), dtype=torch.int64), torch.empty_like(cu_seqlens)


def _segment_samples(device, dtype):
    make = torch.Generator().manual_seed(0)
    scores = torch.randn(60, generator=make) * 1e6  # no bound on a segment's scores may be assumed
    scores[5:9] = 2.0
    protected = torch.rand(60, generator=make) < 0.1

    def one(label, ends, counts, k):
        ends = torch.tensor(ends, dtype=torch.int32)
        return Sample(
            label, tuple(t.to(device) for t in (scores, protected, ends, torch.tensor(counts))) + (k,)
        )

    return [
        one("exact", [0, 20, 50, 60], [5, 10, 3], 18),
        one("spare places, empty segment", [0, 20, 20, 50, 60], [4, 9, 7, 0], 24),
        one("more than there are", [0, 10, 60], [99, 20], 40),
        one("too many for k", [0, 20, 60], [20, 30], 30),
    ]


@define(
    "topk_segments(Tensor scores, Tensor? protected, Tensor cu_seqlens, Tensor counts, SymInt k)"
    " -> (Tensor, Tensor)",
    fake=_fake_segments,
    inputs=_segment_samples,
    tolerance={torch.float32: 0.0},
    plain=plain.SEGMENTS,
    check=_check_segments,
)
def topk_segments(scores, protected, cu_seqlens, counts, k):
    """The best `counts[s]` tokens of each packed sequence, in k places.

    scores: [T]. protected: bool [T] or None. cu_seqlens: int32 [S + 1], from 0 to T. counts: int [S].
    Returns index int64 [k] and the new offsets int32 [S + 1]. Kept tokens come first, rising, so
    sequences stay whole and in order; places behind the last offset are filler and hold tokens that
    were not kept. Where the counts add up to more than k, later sequences lose their weakest.
    """
    tokens = scores.shape[0]
    place = torch.arange(tokens, device=scores.device)
    segment = torch.bucketize(place, cu_seqlens[1:], right=True, out_int32=True).long()
    by_key = rank_keys(scores, protected, None).argsort(descending=True)
    # A stable second sort, not one mixed key: it keeps the order within a segment whatever the scores.
    order = by_key[segment[by_key].argsort(stable=True)]
    lengths = cu_seqlens.diff().long()
    kept = torch.cat([lengths.new_zeros(1), torch.minimum(counts.long(), lengths).cumsum(0).clamp_max(k)])
    rank = place - cu_seqlens.long()[segment]  # of order[place] within its segment
    chosen = torch.zeros(tokens, dtype=torch.bool, device=scores.device)
    chosen[order] = rank < kept.diff()[segment]
    index = (~chosen).to(torch.int8).argsort(stable=True)[:k]
    return index, kept.to(cu_seqlens.dtype)


def _fake_count(scores, protected, tau):
    return scores.new_empty((scores.shape[0],), dtype=torch.int64)


def _count_samples(device, dtype):
    make = torch.Generator().manual_seed(0)
    scores = torch.rand(4, 64, generator=make) ** 8
    scores[2] = 0.0
    scores[3] = 1.0
    protected = torch.rand(4, 64, generator=make) < 0.2
    scores, protected = scores.to(device), protected.to(device)
    return [
        Sample("plain", (scores, None, 0.9)),
        Sample("protected", (scores, protected, 0.75)),
        Sample("everything", (scores, None, 1.0)),
    ]


@define(
    "adaptive_count(Tensor scores, Tensor? protected, float tau) -> Tensor",
    fake=_fake_count,
    inputs=_count_samples,
    tolerance={torch.float32: 0.0},
    plain=plain.COUNT,
    check=_check_count,
)
def adaptive_count(scores, protected, tau):
    """How many tokens hold a share tau of each row's attention, int64 [B] (ZipVL Eq. 6).

    scores: [B, n], attention sums (`probe_scores`), not below 0. Tokens are taken from the largest
    down, protected ones first, until their sum reaches tau of the row's total; every protected
    token is counted. At least 1.
    """
    order = rank_keys(scores, protected, None).argsort(1, descending=True)
    mass = scores.double().gather(1, order).cumsum(1)
    short = mass < tau * mass[:, -1:]
    count = short.sum(1) + 1
    if protected is not None:
        count = torch.maximum(count, protected.sum(1))
    return count.clamp(1, scores.shape[1])


def _fake_holding(sums, scores, protected, pad, tau):
    kept = torch.library.get_ctx().new_dynamic_size(min=2)
    torch._check(kept <= scores.shape[1])
    return scores.new_empty((scores.shape[0], kept), dtype=torch.int64)


def _holding_samples(device, dtype):
    make = torch.Generator().manual_seed(0)
    sums = torch.rand(3, 64, generator=make) ** 8
    scores = sums / torch.arange(64, 0, -1)
    protected = torch.rand(3, 64, generator=make) < 0.2
    pad = torch.zeros(3, 64, dtype=torch.bool)
    pad[0, :30] = True
    sums[pad], scores[pad] = 0.0, 0.0
    sums, scores, protected, pad = (t.to(device) for t in (sums, scores, protected & ~pad, pad))
    return [
        Sample("plain", (sums, scores, None, None, 0.9)),
        Sample("protected and padded", (sums, scores, protected, pad, 0.975)),
        Sample("everything", (sums, scores, None, pad, 1.0)),
        Sample("one would do", (torch.eye(3, 64, device=device), scores, None, None, 0.5)),
    ]


@define(
    "tokens_holding(Tensor sums, Tensor scores, Tensor? protected, Tensor? pad, float tau) -> Tensor",
    fake=_fake_holding,
    inputs=_holding_samples,
    tolerance={torch.float32: 0.0},
    plain="Each call's data decide the size of its result, which an exported graph cannot say.",
    check=_check_holding,
)
def tokens_holding(sums, scores, protected, pad, tau):
    """As few of each row's best tokens as hold a share tau of its attention, int64 [B, k], rising.

    sums: [B, n], attention received (`probe_scores`), not below 0. scores: [B, n]: tokens are taken from
    the highest down, protected ones first and all of them, until their sums reach tau of the row's.
    protected, pad: as in `topk_sorted`. k is the largest count of a row, at least 2: what a call brings decides
    it, so a device is waited for, once. Places of rows that need fewer hold -1, last.
    """
    tokens = scores.shape[1]
    order = rank_keys(scores, protected, pad).argsort(1, descending=True)
    mass = sums.double().gather(1, order).cumsum(1)
    count = (mass < tau * mass[:, -1:]).sum(1) + 1
    if protected is not None:
        count = torch.maximum(count, protected.sum(1))
    kept = min(max(2, int(count.max())), tokens)
    place = torch.arange(kept, device=scores.device)
    index = order[:, :kept].masked_fill(place >= count[:, None], tokens).sort(1).values
    return index.masked_fill(index == tokens, -1)
