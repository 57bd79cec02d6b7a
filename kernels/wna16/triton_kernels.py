"""Triton kernels of the low-bit linear: weights of 2, 3, 4 or 8 bits, activations as they are.

Codes are a bit stream (see `thresher.formats.bitpack`). Widths that divide 32 are read word by word, each word once, and
spread over a new axis; 3-bit codes straddle words, so each code reads the word it begins in and the one it ends
in, which the cache serves. `code - zero` is exact in fp16 and bf16; its product with the scale is rounded to the
type of the tensor cores.
"""

from __future__ import annotations

from ..optional_triton import MISSING

if MISSING is None:
    import triton
    import triton.language as tl

    @triton.jit
    def _codes(codes, rows, k, N, words, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
        """int32 [BN, BK] codes of columns k ...; zero beyond the last row and the last word. k: a multiple of BK."""
        in_n = rows[:, None] < N
        start = codes + rows[:, None].to(tl.int64) * words
        if BITS == 3:
            bit = (k + tl.arange(0, BK)) * 3
            word, shift = bit // 32, (bit % 32).to(tl.uint32)
            low = tl.load(start + word[None, :], mask=in_n & (word < words)[None, :], other=0)
            last = (bit + 2) // 32
            high = tl.load(start + last[None, :], mask=in_n & (last < words)[None, :], other=0)
            joined = (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True)
            same = (last == word)[None, :]
            alone = low.to(tl.uint32, bitcast=True).to(tl.uint64)
            return ((tl.where(same, alone, joined) >> shift[None, :].to(tl.uint64)) & 7).to(tl.int32)
        else:
            each: tl.constexpr = 32 // BITS
            word = k // each + tl.arange(0, BK // each)
            packed = tl.load(start + word[None, :], mask=in_n & (word < words)[None, :], other=0)
            shift = (tl.arange(0, each) * BITS).to(tl.uint32)
            spread = packed.to(tl.uint32, bitcast=True)[:, :, None] >> shift[None, None, :]
            return tl.reshape((spread & ((1 << BITS) - 1)).to(tl.int32), [BN, BK])

    @triton.jit
    def _tile(codes, scales, zeros, rows, k, N, K, words, groups, size, BITS: tl.constexpr, ZEROS: tl.constexpr,
              BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
        """(code - zero) and scale, both fp32 [BN, BK // 32, 32]; a scale of zero beyond the ends.

        size: columns that share a scale, a multiple of 32 or all of them.
        """
        spread = tl.reshape(_codes(codes, rows, k, N, words, BITS, BN, BK).to(tl.float32), [BN, BK // 32, 32])
        first = k + tl.arange(0, BK // 32) * 32
        at = rows[:, None].to(tl.int64) * groups + (first // size)[None, :]
        inside = (rows[:, None] < N) & (first < K)[None, :]
        scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
        if ZEROS:
            zero = tl.load(zeros + at, mask=inside, other=0).to(tl.float32)
            return spread - zero[:, :, None], scale
        return spread - (1 << (BITS - 1)), scale

    @triton.jit
    def gemv(x, codes, scales, zeros, bias, y, N, K, words, groups, size, stride_x, stride_y, BITS: tl.constexpr,
             ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
        """y[m, n] for BN weight rows and one activation row a program; fp32 accumulation.

        Grid (ceil(N / BN), M). x [M, K] floating; codes int32 [N, words]; scales floating and zeros uint8 [N, groups].
        """
        rows = tl.program_id(0) * BN + tl.arange(0, BN)
        line = tl.program_id(1).to(tl.int64)
        x += line * stride_x
        total = tl.zeros((BN, BK // 32), tl.float32)
        for k in range(0, K, BK):
            column = k + tl.arange(0, BK)
            value = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
            spread, scale = _tile(
                codes, scales, zeros, rows, k, N, K, words, groups, size, BITS, ZEROS, BN, BK
            )
            total += tl.sum(spread * tl.reshape(value, [1, BK // 32, 32]), axis=2) * scale
        result = tl.sum(total, axis=1)
        if HAS_BIAS:
            result += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
        tl.store(y + line * stride_y + rows, result.to(y.dtype.element_ty), mask=rows < N)

    @triton.jit
    def gemm(x, codes, scales, zeros, bias, y, M, N, K, words, groups, size, stride_x, stride_y, BITS: tl.constexpr,
             ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
             GROUP: tl.constexpr):  # fmt: skip
        """One [BM, BN] tile of y a program, on the fp16 or bf16 tensor cores.

        Grid (ceil(M / BM) * ceil(N / BN),), GROUP tiles of M sharing weights in the L2 cache.
        """
        tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
        pid = tl.program_id(0)
        first = pid // (GROUP * tiles_n) * GROUP
        height = tl.minimum(tiles_m - first, GROUP)
        tile_m = first + pid % (GROUP * tiles_n) % height
        tile_n = pid % (GROUP * tiles_n) // height
        lines = tile_m * BM + tl.arange(0, BM)
        rows = tile_n * BN + tl.arange(0, BN)
        line = lines[:, None].to(tl.int64)
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            column = k + tl.arange(0, BK)
            mask = (lines[:, None] < M) & (column[None, :] < K)
            left = tl.load(x + line * stride_x + column[None, :], mask=mask, other=0.0)
            spread, scale = _tile(
                codes, scales, zeros, rows, k, N, K, words, groups, size, BITS, ZEROS, BN, BK
            )
            weights = tl.reshape(spread * scale[:, :, None], [BN, BK]).to(left.dtype)
            total = tl.dot(left, tl.trans(weights), total)
        if HAS_BIAS:
            total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]
        inside = (lines[:, None] < M) & (rows[None, :] < N)
        tl.store(y + line * stride_y + rows[None, :], total.to(y.dtype.element_ty), mask=inside)
