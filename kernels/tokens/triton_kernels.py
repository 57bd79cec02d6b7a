"""Triton kernels of token scoring: attention received from probe rows, and transitions.

Scores take two passes over the keys, because a key's share needs its row's softmax denominator:
first each probe row's log-sum-exp, then, per block of keys, the shares of all rows and heads added
up in registers. The map is never written and no sum is atomic, so results repeat bit for bit.
"""

from __future__ import annotations

from ..optional_triton import MISSING

if MISSING is None:
    import triton
    import triton.language as tl

    @triton.jit
    def _rows(q, probes, segments, first, P, q_row, D,
              SEGMENTED: tl.constexpr, BP: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
        """A block of probe rows: queries [BP, BLOCK_D], columns [BP] (-1: sees nothing), sequences [BP]."""
        at, d = first + tl.arange(0, BP), tl.arange(0, BLOCK_D)
        column = tl.load(probes + at, mask=at < P, other=-1)
        own = tl.zeros([BP], tl.int32)
        if SEGMENTED:
            own = tl.load(segments + column, mask=column >= 0, other=-1)
            column = tl.where(own >= 0, column, -1)
        tile = tl.load(q + at[:, None].to(tl.int64) * q_row + d[None, :],
                       mask=(at < P)[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
        return tile, column, own

    @triton.jit
    def _scores(tile, column, own, k, segments, start, n, k_row, D, scale,
                SEGMENTED: tl.constexpr, BN: tl.constexpr, BLOCK_D: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
        """Scores [BP, BN] of keys start .. start + BN, -inf where a row does not see the key."""
        key, d = start + tl.arange(0, BN), tl.arange(0, BLOCK_D)
        keys = tl.load(k + key[None, :].to(tl.int64) * k_row + d[:, None],
                       mask=(key < n)[None, :] & (d < D)[:, None], other=0.0)  # fmt: skip
        scores = tl.dot(tile, keys, input_precision=PRECISION) * scale
        seen = (key[None, :] <= column[:, None]) & (key < n)[None, :]
        if SEGMENTED:
            theirs = tl.load(segments + key, mask=key < n, other=-1)
            seen = seen & (theirs[None, :] == own[:, None])
        return tl.where(seen, scores, float("-inf"))

    @triton.jit
    def row_lse(q, k, probes, segments, lse, heads, group, P, n, D, scale,
                q_batch, q_head, q_row, k_batch, k_head, k_row,
                SEGMENTED: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BLOCK_D: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
        """lse [B, heads, P], the log of each row's softmax denominator; +inf for a row that sees nothing.

        Grid (ceil(P / BP), B * heads). With lse +inf, every share exp(score - lse) is zero.
        """
        first = tl.program_id(0) * BP
        batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
        probes += batch * P
        segments += batch * n
        k += batch.to(tl.int64) * k_batch + (head // group).to(tl.int64) * k_head
        q += batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
        tile, column, own = _rows(q, probes, segments, first, P, q_row, D, SEGMENTED, BP, BLOCK_D)
        peak = tl.full([BP], float("-inf"), tl.float32)
        total = tl.zeros([BP], tl.float32)
        for start in range(0, tl.max(column) + 1, BN):
            scores = _scores(tile, column, own, k, segments, start, n, k_row, D, scale,
                             SEGMENTED, BN, BLOCK_D, PRECISION)  # fmt: skip
            higher = tl.maximum(peak, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # not (-inf) - (-inf)
            total = total * tl.exp(peak - base) + tl.sum(tl.exp(scores - base[:, None]), 1)
            peak = higher
        at = first + tl.arange(0, BP)
        value = tl.where(total > 0, peak + tl.log(total), float("inf"))
        tl.store(lse + tl.program_id(1) * P + at, value, mask=at < P)

    @triton.jit
    def key_sums(q, k, probes, segments, lse, sums, seen, heads, group, P, n, D, scale,
                 q_batch, q_head, q_row, k_batch, k_head, k_row,
                 SEGMENTED: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BLOCK_D: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
        """sums [B, n], shares added over rows and averaged over heads; seen [B, n], rows that see the key.

        Grid (ceil(n / BN), B).
        """
        start = tl.program_id(0) * BN
        batch = tl.program_id(1)
        probes += batch * P
        segments += batch * n
        lse += batch * heads * P
        q += batch.to(tl.int64) * q_batch
        k += batch.to(tl.int64) * k_batch
        share = tl.zeros([BN], tl.float32)
        count = tl.zeros([BN], tl.int32)
        for first in range(0, P, BP):
            at = first + tl.arange(0, BP)
            for head in range(heads):
                tile, column, own = _rows(q + head * q_head, probes, segments, first, P, q_row, D,
                                          SEGMENTED, BP, BLOCK_D)  # fmt: skip
                scores = _scores(tile, column, own, k + head // group * k_head, segments, start, n,
                                 k_row, D, scale, SEGMENTED, BN, BLOCK_D, PRECISION)  # fmt: skip
                norm = tl.load(lse + head * P + at, mask=at < P, other=float("inf"))
                share += tl.sum(tl.exp(scores - norm[:, None]), 0)
                if head == 0:
                    count += tl.sum((scores > float("-inf")).to(tl.int32), 0)
        key = start + tl.arange(0, BN)
        tl.store(sums + batch * n + key, share / heads, mask=key < n)
        tl.store(seen + batch * n + key, count, mask=key < n)

    @triton.jit
    def transition(x, fx, magnitude, cosine, width, BLOCK: tl.constexpr):
        """|fx| / |x| and cos(x, fx) of one token a program. x, fx [tokens, width], contiguous."""
        token = tl.program_id(0).to(tl.int64)
        x += token * width
        fx += token * width
        xx = tl.zeros([BLOCK], tl.float32)
        ff = tl.zeros([BLOCK], tl.float32)
        xf = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            a = tl.load(x + at, mask=at < width, other=0.0).to(tl.float32)
            b = tl.load(fx + at, mask=at < width, other=0.0).to(tl.float32)
            xx += a * a
            ff += b * b
            xf += a * b
        size = tl.sqrt(tl.sum(xx, 0))
        change = tl.sqrt(tl.sum(ff, 0))
        tl.store(magnitude + token, change / tl.maximum(size, 1e-12))
        tl.store(cosine + token, tl.sum(xf, 0) / tl.maximum(size * change, 1e-12))
