"""Triton kernels of NVFP4: A16W4 for GPUs without FP4 tensor cores, W4A4 through `tl.dot_scaled`.

Decoding costs a few integer operations: an E2M1 code moved to the top bits of an fp16 is its value times
2^-14, and a non-negative E4M3 byte shifted by 7 is its scale times 2^-8. With 2^14 on the scales, the
product is the weight times 2^-8, exact in fp16 and bf16 (six significant bits); 2^8 and the tensor scale
multiply the fp32 accumulator. Scales travel as uint8: sm_80 has no fp8 type. An E4M3 NaN (0x7F) decodes
to an fp16 NaN, so poisoned blocks stay visible.
"""

from __future__ import annotations

from ..optional_triton import MISSING

if MISSING is None:
    import triton
    import triton.language as tl

    @triton.jit
    def _decode_codes(packed):
        """uint8 [..., n] packed codes to fp16 [..., 2n], values * 2^-14."""
        wide = packed.to(tl.uint16)
        low = ((wide & 8) << 12) | ((wide & 7) << 9)
        high = ((wide & 0x80) << 8) | ((wide & 0x70) << 5)
        pair = tl.join(low, high)
        shape: tl.constexpr = [packed.shape[0], packed.shape[1] * 2]
        return tl.reshape(pair, shape).to(tl.float16, bitcast=True)

    @triton.jit
    def _decode_scales(scales):
        """uint8 E4M3 bytes to fp16, values * 2^6; NaN stays NaN."""
        bits = tl.where(scales == 0x7F, 0x7E00, scales.to(tl.uint16) << 7).to(tl.uint16)
        return bits.to(tl.float16, bitcast=True) * 16384.0

    @triton.jit
    def _weight_tile(codes, scales, rows, k, N, blocks, BN: tl.constexpr, BK: tl.constexpr):
        """fp16 [BN, BK] weights * 2^-8 from column k on. Whole blocks beyond the end decode to zero."""
        in_n = rows[:, None] < N
        row = rows[:, None].to(tl.int64)  # a large head has more than 2^31 bytes of codes
        byte = k // 2 + tl.arange(0, BK // 2)[None, :]
        block = k // 16 + tl.arange(0, BK // 16)[None, :]
        packed = tl.load(codes + row * (blocks * 8) + byte, mask=in_n & (byte < blocks * 8), other=0)
        scale = tl.load(scales + row * blocks + block, mask=in_n & (block < blocks), other=0)
        values = tl.reshape(_decode_codes(packed), [BN, BK // 16, 16])
        return tl.reshape(values * _decode_scales(scale)[:, :, None], [BN, BK])

    @triton.jit
    def gemv(x, codes, scales, global_scale, bias, y, N, K, blocks, stride_x, stride_y,
             HAS_BIAS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
        """y[m, n] for BN weight rows and one activation row a program; fp32 accumulation.

        Grid (ceil(N / BN), M). x [M, K] fp16, bf16 or fp32; codes uint8 [N, 8 * blocks]; scales uint8.
        """
        rows = tl.program_id(0) * BN + tl.arange(0, BN)
        in_n = rows[:, None] < N
        row = rows[:, None].to(tl.int64)  # a large head has more than 2^31 bytes of codes
        line = tl.program_id(1).to(tl.int64)
        x += line * stride_x
        # a block's sum lies in one thread and takes its scale once
        total = tl.zeros((BN, BK // 16), tl.float32)
        for k in range(0, K, BK):
            column = k + tl.arange(0, BK)
            byte = k // 2 + tl.arange(0, BK // 2)[None, :]
            block = k // 16 + tl.arange(0, BK // 16)[None, :]
            packed = tl.load(codes + row * (blocks * 8) + byte, mask=in_n & (byte < blocks * 8), other=0)
            scale = tl.load(scales + row * blocks + block, mask=in_n & (block < blocks), other=0)
            value = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
            product = _decode_codes(packed).to(tl.float32) * value[None, :]
            sums = tl.sum(tl.reshape(product, [BN, BK // 16, 16]), axis=2)
            total += sums * _decode_scales(scale).to(tl.float32)
        result = tl.sum(total, axis=1) * (tl.load(global_scale) * 256.0)
        if HAS_BIAS:
            result += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
        tl.store(y + line * stride_y + rows, result.to(y.dtype.element_ty), mask=rows < N)

    @triton.jit
    def gemm(x, codes, scales, global_scale, bias, y, M, N, K, blocks, stride_x, stride_y,
             HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
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
            weights = _weight_tile(codes, scales, rows, k, N, blocks, BN, BK).to(left.dtype)
            total = tl.dot(left, tl.trans(weights), total)
        result = total * (tl.load(global_scale) * 256.0)
        if HAS_BIAS:
            result += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]
        inside = (lines[:, None] < M) & (rows[None, :] < N)
        tl.store(y + line * stride_y + rows[None, :], result.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def gemm_w4a4(a, a_scales, codes, scales, alpha, bias, y, M, N, K, blocks, stride_y,
                  HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
        """Both operands in NVFP4, on the block-scaled FP4 tensor cores (sm_100, sm_120).

        a uint8 [M, 8 * blocks] and codes uint8 [N, 8 * blocks]; scales float8e4nv [., blocks], not
        swizzled; alpha fp32 [], the product of the tensor scales. Grid (ceil(M / BM), ceil(N / BN)).
        """
        lines = tl.program_id(0) * BM + tl.arange(0, BM)
        rows = tl.program_id(1) * BN + tl.arange(0, BN)
        in_m, in_n = lines[:, None] < M, rows[:, None] < N
        line, row = lines[:, None].to(tl.int64), rows[:, None].to(tl.int64)
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            byte = k // 2 + tl.arange(0, BK // 2)[None, :]
            block = k // 16 + tl.arange(0, BK // 16)[None, :]
            in_bytes, in_blocks = byte < blocks * 8, block < blocks
            left = tl.load(a + line * (blocks * 8) + byte, mask=in_m & in_bytes, other=0)
            right = tl.load(codes + row * (blocks * 8) + byte, mask=in_n & in_bytes, other=0)
            s_left = tl.load(a_scales + line * blocks + block, mask=in_m & in_blocks, other=0.0)
            s_right = tl.load(scales + row * blocks + block, mask=in_n & in_blocks, other=0.0)
            total = tl.dot_scaled(left, s_left, "e2m1", tl.trans(right), s_right, "e2m1", total)
        result = total * tl.load(alpha)
        if HAS_BIAS:
            result += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]
        inside = in_m & (rows[None, :] < N)
        tl.store(y + line * stride_y + rows[None, :], result.to(y.dtype.element_ty), mask=inside)
