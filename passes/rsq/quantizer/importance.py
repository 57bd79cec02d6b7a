"""Which tokens matter: the importance strategies of RSQ (section 3.2), as pure functions.

A strategy gives each token of each sequence a raw score [batch, length]; `weights` maps the scores of one
sequence linearly onto [r_min, r_max] and divides by their mean. The weights multiply the squared error:
H = 2/n sum_i w_i x_i x_i^T, so features are scaled by sqrt(w_i). (The paper writes H = 2 X R^2 X^T: its R is
the square root of these weights.)

real: bool [batch, length], false at padding; None means that every token is real.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from thresher.errors import ArgumentError

_BLOCK = 1 << 22  # attention probabilities held at a time: 16 MiB in fp32
_QUERIES = 128  # multiplied at a time at most: what lies behind them in a causal map is not computed


def attention_concentration(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float | None = None,
    causal: bool = True,
    window_left: int = -1,
    softcap: float = 0.0,
    real: torch.Tensor | None = None,
    normalize: bool = False,
) -> torch.Tensor:
    """AttnCon: fp32 [batch, length], the attention each key receives, summed over heads and queries.

    q: [batch, heads, length, dim] after rope; k: [batch, kv_heads, length, dim]. scale: of the scores, by
    default dim ** -0.5. window_left: -1 for none, else a query sees at most that many keys before itself
    (and with causal=False as many after). softcap: 0 for none. normalize: divide by the number of queries
    that see the key, which the paper does not.
    Some queries of the heads that share keys are held at a time, never a [length, length] map of all heads.
    """
    batch, heads, length, dim = q.shape
    if k.shape[0] != batch or k.shape[2:] != q.shape[2:] or heads % k.shape[1]:
        raise ArgumentError(
            "k",
            f"shape {tuple(k.shape)}",
            f"[{batch}, kv_heads, {length}, {dim}] with kv_heads a divisor of {heads}",
            "Pass the queries and keys of one layer.",
        )
    real = _real(real, q, (batch, length))
    at = torch.arange(length, device=q.device)
    all_real = bool(real.all())

    def seen(first: int, last: int, heads: slice) -> torch.Tensor:
        distance = at[first:last, None] - at
        found = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if window_left >= 0:
            found = found & (distance.abs() <= window_left)
        if all_real:
            return found[None, None]
        return (found & real[:, None, :] & real[:, first:last, None])[:, None]

    received, seen_by = _received(q, k, seen, scale, softcap, None)
    return received / seen_by.clamp_min(1) if normalize else received


def masked_concentration(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None = None,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """AttnCon under any mask: fp32 [batch, keys], some queries of some heads at a time.

    q: [batch, heads, length, dim]; k: [batch, kv_heads, keys, dim]. mask: as scaled_dot_product_attention
    takes it, bool (True is seen) or added to the scores, and broadcast to [batch, heads, length, keys].
    """
    mask = mask.expand(torch.broadcast_shapes(mask.shape, (1, 1, q.shape[2], k.shape[2])))

    def part(first: int, last: int, heads: slice) -> torch.Tensor:
        return mask[:, heads if mask.shape[1] > 1 else slice(None), first:last]

    return _received(q, k, part, scale, 0.0, real)[0]


def _received(
    q: torch.Tensor,
    k: torch.Tensor,
    mask_of: Callable[[int, int, slice], torch.Tensor],
    scale: float | None,
    softcap: float,
    real: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [batch, keys] each: the attention that keys receive, and how many queries see them.

    mask_of(first, last, heads): of some queries of some heads, broadcast to [batch, heads, queries, keys], bool or added to
    the scores. Keys behind the last that any of these queries sees are left out: half of a causal map. A query that sees
    nothing gives nothing. Heads that share keys are multiplied together, and never more than _BLOCK scores are held.
    """
    batch, heads, length, dim = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    received = torch.zeros(batch, keys, device=q.device)
    seen_by = torch.zeros(batch, keys, device=q.device)
    step = max(1, min(length, _QUERIES, _BLOCK // max(1, batch * keys * group)))
    for first in range(0, length, step):
        last = min(first + step, length)
        for shared in range(k.shape[1]):
            own = slice(shared * group, (shared + 1) * group)
            mask = mask_of(first, last, own)
            seen = mask if mask.dtype == torch.bool else mask > -torch.inf
            reached = seen.flatten(0, 2).any(0).nonzero()
            if not len(reached):
                continue
            end = int(reached[-1]) + 1
            seen = seen[..., :end]
            rows = (q[:, own, first:last].float() * scale).reshape(batch, -1, dim)
            scores = rows @ k[:, shared, :end].float().transpose(1, 2)
            if softcap > 0:
                scores.div_(softcap).tanh_().mul_(softcap)
            scores = scores.view(batch, group, last - first, end)
            if mask.dtype != torch.bool:
                scores += mask[..., :end]
            scores.masked_fill_(~seen, -torch.inf)  # whatever a pad computes
            share = torch.softmax(scores, -1)
            if real is not None or not bool(seen.any(-1).all()):
                share.nan_to_num_(0.0)  # of a query that sees nothing, and of a pad
            if real is not None:
                share *= real[:, None, first:last, None]
            received[:, :end] += share.sum((1, 2))
            if not shared:
                seen_by[:, :end] += seen[:, 0].sum(-2)
    return received, seen_by


def chunks(real: torch.Tensor, parts: int, chosen: tuple[int, ...]) -> torch.Tensor:
    """FirstN and First&LastN: 1 for the real tokens in the chosen of `parts` equal parts, else 0.

    real: bool [batch, length]. Parts are counted over each sequence's real tokens; FirstN with an eighth is
    `chunks(real, 8, (0,))`, First&LastN `chunks(real, 32, (0, 31))`.
    """
    if parts < 1 or not chosen or not all(0 <= c < parts for c in chosen):
        raise ArgumentError(
            "chosen", chosen, f"part numbers from 0 to {parts - 1}", "Name at least one part."
        )
    rank = real.long().cumsum(1) - 1
    part = rank * parts // real.long().sum(1, keepdim=True).clamp_min(1)
    return (torch.isin(part, torch.tensor(chosen, device=real.device)) & real).float()


def token_rarity(tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """TokenFreq: minus how often each token occurs in the calibration set. tokens: ids [batch, length];
    counts: [vocabulary], as `torch.bincount` of the whole set gives."""
    return -counts.to(tokens.device)[tokens].float()


def activation_norm(x: torch.Tensor) -> torch.Tensor:
    """ActNorm: the norm of the layer's input. x: [batch, length, d]."""
    return x.float().norm(dim=-1)


def activation_change(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """ActDiff: minus the distance between the layer's input and output: little change is important."""
    return -(x.float() - y.float()).norm(dim=-1)


def token_distance(x: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """TokenSim: the mean squared distance from each token to its sequence's tokens.

    Taken from mean and mean square, without a [length, length] matrix: the mean over j of |x_i - x_j|^2 is
    |x_i|^2 - 2 x_i . mean(x) + mean |x|^2.
    """
    wide = x.double()
    keep = _real(real, x, x.shape[:2]).double()[..., None]
    count = keep.sum(1, keepdim=True).clamp_min(1)
    square = (wide * wide).sum(-1, keepdim=True)
    mean = (wide * keep).sum(1, keepdim=True) / count
    mean_square = (square * keep).sum(1, keepdim=True) / count
    return (square - 2 * (wide * mean).sum(-1, keepdim=True) + mean_square)[..., 0].float()


def weights(
    scores: torch.Tensor,
    r_min: float,
    r_max: float = 1.0,
    real: torch.Tensor | None = None,
    power: float = 1.0,
) -> torch.Tensor:
    """fp32 [batch, length] with mean 1 over each sequence's real tokens, 0 at padding.

    scores: raw importance. power: applied to non-negative scores before the mapping. A sequence whose
    scores are all equal, like r_min = r_max, gives exactly 1 everywhere: plain GPTQ.
    """
    if not 0 < r_min <= r_max:
        raise ArgumentError(
            "r_min", r_min, f"0 < r_min <= r_max = {r_max}", "The paper searches 0.005 to 0.1."
        )
    keep = _real(real, scores, scores.shape)
    scores = scores.float()
    if not bool(torch.isfinite(scores[keep]).all()):
        raise ArgumentError("scores", "NaN or inf", "finite numbers", "Check the layer's activations.")
    if power != 1.0:
        if bool((scores[keep] < 0).any()):
            raise ArgumentError("power", power, "1 for scores that are negative", "Leave power at 1.")
        scores = scores.clamp_min(0) ** power
    low = scores.masked_fill(~keep, torch.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~keep, -torch.inf).amax(1, keepdim=True)
    flat = (high <= low) | (r_min == r_max)
    unit = (scores - low) / torch.where(flat, torch.ones_like(high), high - low)
    mapped = (r_min + (r_max - r_min) * unit).masked_fill(~keep, 0.0)
    mean = mapped.double().sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp_min(1)
    out = torch.where(flat, torch.ones_like(mapped), (mapped / mean.clamp_min(1e-30)).float())
    return out.masked_fill(~keep, 0.0)


def shift_sequences(tokens: torch.Tensor, copies: int) -> torch.Tensor:
    """Data-set expansion: each sequence rolled by 0, 1/copies, 2/copies ... of its length.

    tokens: [sequences, length] without padding -> [sequences * copies, length]. Early positions attract
    attention, whatever stands there; shifted copies let every token stand early once.
    """
    length = tokens.shape[1]
    if not 1 <= copies <= length:
        raise ArgumentError("copies", copies, f"1 to the sequence length {length}", "The paper uses a few.")
    rolled = [tokens.roll(c * (length // copies), dims=1) for c in range(copies)]
    return torch.stack(rolled, dim=1).flatten(0, 1)


def _real(real: torch.Tensor | None, like: torch.Tensor, shape) -> torch.Tensor:
    if real is None:
        return torch.ones(tuple(shape), dtype=torch.bool, device=like.device)
    if real.dtype != torch.bool or real.shape != tuple(shape):
        raise ArgumentError(
            "real", f"{real.dtype} {tuple(real.shape)}", f"bool {tuple(shape)}", "True marks a real token."
        )
    return real
