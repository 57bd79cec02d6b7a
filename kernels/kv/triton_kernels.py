"""Triton kernels of attention over quantized pools: one program a block of slots, then a merge.

Decoding has few queries and many slots, so the slots are split over programs (flash-decoding): each
leaves a running maximum, a mass and a weighted sum of values, which the last kernel brings together.
Codes are widened in registers. Rows are the queries that share one key-value head, at least 16 of
them, as the tensor cores want.
"""

from __future__ import annotations

from ..optional_triton import MISSING

if MISSING is None:
    import triton
    import triton.language as tl

    @triton.jit
    def _unpack(codes, ROWS: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
        """uint8 [ROWS, D * BITS / 8] to fp32 [ROWS, D]: part p of a row is bits p * BITS of every byte."""
        # no early return: Triton compiles what stands behind one, for which the shapes do not fit
        if BITS == 8:
            flat = codes
        elif BITS == 4:
            both = tl.join(codes & 15, codes >> 4)
            flat = tl.reshape(tl.permute(both, (0, 2, 1)), [ROWS, D])
        else:
            low = tl.join(codes & 3, (codes >> 2) & 3)
            high = tl.join((codes >> 4) & 3, codes >> 6)
            flat = tl.reshape(tl.permute(tl.join(low, high), (0, 3, 2, 1)), [ROWS, D])
        return flat.to(tl.float32)

    @triton.jit
    def _fold(peak, mass, acc, scores, values, PRECISION: tl.constexpr):
        """The running softmax with the scores [R, BN] and values [BN, DV] of more slots."""
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # not (-inf) - (-inf)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(peak - base)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
        return higher, mass * shrink + tl.sum(weights, 1), acc

    @triton.jit
    def _leave(peaks, masses, sums, part, parts, peak, mass, acc, R: tl.constexpr, DV: tl.constexpr):
        """Store one program's share: peaks, masses [heads, parts, R] and sums [heads, parts, R, DV]."""
        row, d = tl.arange(0, R), tl.arange(0, DV)
        at = (tl.program_id(1).to(tl.int64) * parts + part) * R + row
        tl.store(peaks + at, peak)
        tl.store(masses + at, mass)
        tl.store(sums + at[:, None] * DV + d[None, :], acc)

    @triton.jit
    def pool_part(q, k_codes, k_affine, v_codes, v_affine, ends, visible, peaks, masses, sums,
                  kv_heads, slots, blocks, seen_row, seen_from, part_from, parts, scale,
                  MASKED: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
                  DV: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
        """One block of one pool. Grid (blocks, B * kv_heads); q [B * kv_heads, R, D]."""
        block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
        row, d = tl.arange(0, R), tl.arange(0, D)
        KW: tl.constexpr = D * BITS // 8
        VW: tl.constexpr = DV * BITS // 8
        tile = tl.load(q + (head * R + row)[:, None] * D + d[None, :])
        affine = k_affine + (head * blocks + block) * 2 * D + d
        step, low = tl.load(affine).to(tl.float32), tl.load(affine + D).to(tl.float32)
        first = tl.load(ends + block - 1, mask=block > 0, other=0)
        last = tl.load(ends + block)
        peak = tl.full([R], float("-inf"), tl.float32)
        mass = tl.zeros([R], tl.float32)
        acc = tl.zeros([R, DV], tl.float32)
        for start in range(first, last, BN):
            slot = start + tl.arange(0, BN)
            inside = slot < last
            at = head * slots + slot
            codes = tl.load(
                k_codes + at[:, None] * KW + tl.arange(0, KW)[None, :], mask=inside[:, None], other=0
            )
            keys = _unpack(codes, BN, D, BITS) * step[None, :] + low[None, :]
            scores = tl.dot(tile, tl.trans(keys.to(tile.dtype)), input_precision=PRECISION) * scale
            if MASKED:
                shown = tl.load(
                    visible + (head // kv_heads) * seen_row + seen_from + slot, mask=inside, other=0
                )
                inside = inside & (shown != 0)
            scores = tl.where(inside[None, :], scores, float("-inf"))
            held = slot < last
            codes = tl.load(
                v_codes + at[:, None] * VW + tl.arange(0, VW)[None, :], mask=held[:, None], other=0
            )
            v_step = tl.load(v_affine + at * 2, mask=held, other=0.0).to(tl.float32)
            v_low = tl.load(v_affine + at * 2 + 1, mask=held, other=0.0).to(tl.float32)
            values = (_unpack(codes, BN, DV, BITS) * v_step[:, None] + v_low[:, None]).to(tile.dtype)
            peak, mass, acc = _fold(peak, mass, acc, scores, values, PRECISION)
        _leave(peaks, masses, sums, part_from + block, parts, peak, mass, acc, R, DV)

    @triton.jit
    def tail_part(q, k, v, visible, peaks, masses, sums, kv_heads, queries, slots, seen_row, seen_from,
                  k_batch, k_head, k_row, v_batch, v_head, v_row, part_from, parts, span, scale,
                  MASKED: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                  BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
        """`span` slots of the tail. Grid (ceil(slots / span), B * kv_heads). Row r is query r % queries."""
        head = tl.program_id(1).to(tl.int64)
        batch = head // kv_heads
        row, d, dv = tl.arange(0, R), tl.arange(0, D), tl.arange(0, DV)
        tile = tl.load(q + (head * R + row)[:, None] * D + d[None, :])
        k += batch * k_batch + head % kv_heads * k_head
        v += batch * v_batch + head % kv_heads * v_head
        peak = tl.full([R], float("-inf"), tl.float32)
        mass = tl.zeros([R], tl.float32)
        acc = tl.zeros([R, DV], tl.float32)
        first = tl.program_id(0) * span
        for start in range(first, tl.minimum(first + span, slots), BN):
            slot = start + tl.arange(0, BN)
            inside = slot < slots
            keys = tl.load(
                k + slot[None, :].to(tl.int64) * k_row + d[:, None], mask=inside[None, :], other=0.0
            )
            scores = tl.dot(tile, keys, input_precision=PRECISION) * scale
            past = inside[None, :] & (slot[None, :] <= (slots - queries + row % queries)[:, None])
            if MASKED:
                shown = tl.load(visible + batch * seen_row + seen_from + slot, mask=inside, other=0)
                past = past & (shown != 0)[None, :]
            scores = tl.where(past, scores, float("-inf"))
            values = tl.load(
                v + slot[:, None].to(tl.int64) * v_row + dv[None, :], mask=inside[:, None], other=0.0
            )
            peak, mass, acc = _fold(peak, mass, acc, scores, values, PRECISION)
        _leave(peaks, masses, sums, part_from + tl.program_id(0), parts, peak, mass, acc, R, DV)

    @triton.jit
    def merge(peaks, masses, sums, out, parts, R: tl.constexpr, DV: tl.constexpr):
        """out [heads, R, DV] from all parts; zero where nothing was seen. Grid (R, heads)."""
        row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
        d = tl.arange(0, DV)
        peak = float("-inf")
        mass = 0.0
        acc = tl.zeros([DV], tl.float32)
        for part in range(parts):
            at = (head * parts + part) * R + row
            theirs = tl.load(peaks + at)
            higher = tl.maximum(peak, theirs)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            mine, other = tl.exp(peak - base), tl.exp(theirs - base)
            mass = mass * mine + tl.load(masses + at) * other
            acc = acc * mine + tl.load(sums + at * DV + d) * other
            peak = higher
        tl.store(out + (head * R + row) * DV + d, acc / tl.where(mass > 0, mass, 1.0))
