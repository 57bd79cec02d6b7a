"""Triton kernel of packed attention: one program computes a block of queries of one segment and head.

The online softmax of FlashAttention-2 (arXiv 2307.08691), over the keys the block can see and no
others. Keys beyond the segment are never loaded, so nothing outside it reaches a result, and the
order of summation depends on the segment alone: replacing a neighbour changes no bit.
"""

from __future__ import annotations

from ..optional_triton import MISSING

NO_MASK, BOOL_MASK, FLOAT_MASK = 0, 1, 2

if MISSING is None:
    import triton
    import triton.language as tl

    @triton.jit
    def _consume(acc, total, peak, q, k, v, mask, rows, cols, first, last, low, high, k_stride, v_stride,
                 mask_m, mask_n, scale, softcap, window,
                 CHECKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr,
                 MASK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
                 BLOCK_DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
        """Fold the keys low .. high of the segment into (acc, total, peak).

        first: the block's first query, last: the segment's length, both counted within the segment.
        CHECKED: some query of the block may not see some of these keys; else none is tested.
        """
        at_d, at_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        query = first + tl.arange(0, BM)
        in_k = tl.arange(0, BN)[None, :] * k_stride + at_d[:, None]  # k as [BLOCK_D, BN], for the product
        in_v = tl.arange(0, BN)[:, None] * v_stride + at_dv[None, :]
        for start in range(low, high, BN):
            start = tl.multiple_of(start, BN)
            key = start + tl.arange(0, BN)
            inside = key < last
            k_tile = tl.load(
                k + start.to(tl.int64) * k_stride + in_k,
                mask=inside[None, :] & (at_d < D)[:, None],
                other=0.0,
            )
            scores = tl.dot(q, k_tile, input_precision=PRECISION) * scale
            if SOFTCAP:  # softcap * tanh(scores / softcap)
                scores = softcap * (
                    1.0 - 2.0 / (tl.exp2(scores * (2.0 * 1.4426950408889634 / softcap)) + 1.0)
                )
            if MASK != 0:
                col = tl.load(cols + key, mask=inside, other=0).to(tl.int32)
                given = tl.load(
                    mask + rows[:, None] * mask_m + col[None, :] * mask_n,
                    mask=inside[None, :] & (query < last)[:, None],
                    other=0,
                )
                if MASK == 1:
                    scores = tl.where(given != 0, scores, float("-inf"))
                else:
                    scores += given.to(tl.float32)
            scores *= 1.4426950408889634  # log2(e): exp2 is what the hardware has
            if CHECKED:
                distance = query[:, None] - key[None, :]
                seen = inside[None, :]
                if CAUSAL:
                    seen = seen & (distance >= 0)
                if WINDOWED:
                    seen = seen & (distance <= window) & (distance >= -window)
                scores = tl.where(seen, scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # no key seen yet: avoid inf - inf
            weights = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(peak - base)
            total = total * shrink + tl.sum(weights, 1)
            v_tile = tl.load(
                v + start.to(tl.int64) * v_stride + in_v,
                mask=inside[:, None] & (at_dv < DV)[None, :],
                other=0.0,
            )
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
            peak = new_peak
        return acc, total, peak

    @triton.jit
    def varlen_forward(q, k, v, out, cu_seqlens, mask, rows, cols, sinks,
                       q_head, q_token, k_head, k_token, v_head, v_token, out_head, out_token,
                       mask_b, mask_h, mask_m, mask_n, scale, softcap, window,
                       GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
                       BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
                       SOFTCAP: tl.constexpr, MASK: tl.constexpr, SINKS: tl.constexpr, BM: tl.constexpr,
                       BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
        """out[h, t] = attention of token t within its segment.

        Grid (ceil(max_len / BM), Hq, segments). Strides in elements; the last dim of q, k, v, out is
        contiguous. GROUP: query heads per kv head. mask, rows, cols are read only if MASK is not NO_MASK,
        sinks (fp32, one a head: a score that has no value) only if SINKS.
        """
        segment = tl.program_id(2)
        begin = tl.load(cu_seqlens + segment).to(tl.int64)
        length = (tl.load(cu_seqlens + segment + 1) - begin).to(tl.int32)
        first = tl.program_id(0) * BM
        if first >= length:
            return
        head = tl.program_id(1).to(tl.int64)
        at_d, at_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        query = first + tl.arange(0, BM)
        real = query < length
        q += begin * q_token + head * q_head
        k += begin * k_token + head // GROUP * k_head
        v += begin * v_token + head // GROUP * v_head
        out += begin * out_token + head * out_head
        q_tile = tl.load(
            q + first.to(tl.int64) * q_token + tl.arange(0, BM)[:, None] * q_token + at_d[None, :],
            mask=real[:, None] & (at_d < D)[None, :],
            other=0.0,
        )
        row_cols = query
        filler = False
        if MASK != 0:
            cols += begin
            row = tl.load(rows + begin).to(tl.int64)
            filler = row < 0
            mask += tl.maximum(row, 0) * mask_b + head * mask_h
            row_cols = tl.load(cols + query, mask=real, other=0).to(tl.int32)

        # Keys any query of the block sees: low .. high; keys all of them see: whole_low .. whole_high.
        low, high = 0, length
        whole_low, whole_high = 0, length // BN * BN
        if CAUSAL:
            high = tl.minimum(high, first + BM)
            whole_high = tl.minimum(whole_high, (first + 1) // BN * BN)
        if WINDOWED:
            low = tl.maximum(0, first - window) // BN * BN
            whole_low = tl.maximum(0, (first + BM - 1 - window + BN - 1) // BN * BN)
            high = tl.minimum(high, first + BM + window)
            whole_high = tl.minimum(whole_high, (first + window + 1) // BN * BN)
        whole_low = tl.minimum(tl.maximum(whole_low, low), (high + BN - 1) // BN * BN)
        whole_high = tl.maximum(whole_high, whole_low)

        acc = tl.zeros((BM, BLOCK_DV), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        peak = tl.full((BM,), float("-inf"), tl.float32)
        if SINKS:
            peak = tl.full((BM,), 0.0, tl.float32) + tl.load(sinks + head) * 1.4426950408889634
            total += 1.0
        if filler:
            acc = tl.load(
                v + first.to(tl.int64) * v_token + tl.arange(0, BM)[:, None] * v_token + at_dv[None, :],
                mask=real[:, None] & (at_dv < DV)[None, :],
                other=0.0,
            ).to(tl.float32)
            total += 1.0
        else:
            for phase in tl.static_range(3):  # the left edge of the window, the middle, the right edge
                if phase != 0 or WINDOWED:
                    start = low if phase == 0 else whole_low if phase == 1 else whole_high
                    stop = whole_low if phase == 0 else whole_high if phase == 1 else high
                    acc, total, peak = _consume(
                        acc, total, peak, q_tile, k, v, mask, row_cols, cols, first, length, start, stop,
                        k_token, v_token, mask_m, mask_n, scale, softcap, window, phase != 1, CAUSAL,
                        WINDOWED, SOFTCAP, MASK, D, DV, BLOCK_D, BLOCK_DV, BM, BN, PRECISION)  # fmt: skip
        total = tl.where(total == 0.0, 1.0, total)  # a query that sees nothing gives zeros
        tl.store(
            out + first.to(tl.int64) * out_token + tl.arange(0, BM)[:, None] * out_token + at_dv[None, :],
            (acc / total[:, None]).to(out.dtype.element_ty),
            mask=real[:, None] & (at_dv < DV)[None, :],
        )
