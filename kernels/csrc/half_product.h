// Products of many rows with dense weights of bf16 or float16, for CPUs that do not multiply these types: PyTorch's take eight
// times as long there as in fp32. A panel of the weight is widened to fp32 once and meets every row while it is in the cache.
#pragma once

#include <omp.h>

#include "half_vectors.h"
#include "step_dense.h"
#include "thread_work.h"

namespace {

#if defined(__AVX512F__)
constexpr int TALL = 12;  // rows of x whose sums stay in registers, beside a panel's columns
#else
constexpr int TALL = 6;
#endif
constexpr int COLUMNS = 2 * V;        // rows of the weight in a panel: columns of the result
constexpr int64_t DEPTH = 512;        // of a panel: it fills most of the first cache
constexpr int64_t BLOCK = 64 * TALL;  // rows of x that one widening of the weight serves: their sums stay in the second cache
constexpr int64_t FEW = 20;           // rows up to which the weight is better read as it lies

// sums [T][COLUMNS] += x [depth][T] transposed . panel [depth][COLUMNS]
template <int T>
INLINE void tall_tile(const float* x, const float* panel, int64_t depth, float* sums) {
    vf low[T], high[T];
    _Pragma("GCC unroll 16") for (int t = 0; t < T; ++t) {
        low[t] = widen(sums + t * COLUMNS);
        high[t] = widen(sums + t * COLUMNS + V);
    }
    for (int64_t k = 0; k < depth; ++k, x += T, panel += COLUMNS) {
        const vf a = widen(panel), b = widen(panel + V);
        _Pragma("GCC unroll 16") for (int t = 0; t < T; ++t) {
            const vf factor = all(x[t]);
            low[t] = multiply_add(a, factor, low[t]);
            high[t] = multiply_add(b, factor, high[t]);
        }
    }
    _Pragma("GCC unroll 16") for (int t = 0; t < T; ++t) {
        std::memcpy(sums + t * COLUMNS, &low[t], sizeof low[t]);
        std::memcpy(sums + t * COLUMNS + V, &high[t], sizeof high[t]);
    }
}

INLINE void tall(int64_t rows, const float* x, const float* panel, int64_t depth, float* sums) {
    switch (rows) {
#define TILE(T) case T: return tall_tile<T>(x, panel, depth, sums)
        TILE(1); TILE(2); TILE(3); TILE(4); TILE(5); TILE(6);
#if defined(__AVX512F__)
        TILE(7); TILE(8); TILE(9); TILE(10); TILE(11); TILE(12);
#endif
#undef TILE
    }
}

#if defined(__AVX2__) && defined(__F16C__)
INLINE __m256 eight(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE __m256 eight(const float* p) { return _mm256_loadu_ps(p); }
INLINE __m256 eight(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

// An 8 x 8 corner of the weight [., K], to columns of a panel.
template <class W>
INLINE void transpose(const W* weight, int64_t K, float* panel) {
    __m256 row[8], pair[8], four[8];
    UNROLL for (int i = 0; i < 8; ++i) row[i] = eight(weight + i * K);
    UNROLL for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) UNROLL for (int j = 0; j < 2; ++j) {
        four[i + 2 * j] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], 0x44);
        four[i + 2 * j + 1] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], 0xEE);
    }
    UNROLL for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(panel + i * COLUMNS, _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
        _mm256_storeu_ps(panel + (i + 4) * COLUMNS, _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
    }
}
#endif

// panel [depth][COLUMNS] of `columns` rows of the weight [., K], zeros behind them.
template <class W>
void widen_panel(const W* weight, int64_t K, int columns, int64_t depth, float* panel) {
    int64_t k = 0;
#if defined(__AVX2__) && defined(__F16C__)
    if (columns == COLUMNS)
        for (; k + 8 <= depth; k += 8)
            for (int c = 0; c < COLUMNS; c += 8) transpose(weight + c * K + k, K, panel + k * COLUMNS + c);
#endif
    for (; k < depth; ++k)
        for (int c = 0; c < COLUMNS; ++c) panel[k * COLUMNS + c] = c < columns ? one(weight[c * K + k]) : 0.0f;
}

// out [tokens, N] = x [tokens, K] . weight [N, K] transposed + bias [N], added up in fp32 and rounded once.
template <class W>
void half_product(const W* x, int64_t tokens, int64_t K, int64_t N, const W* weight, const W* bias, W* out, int threads) {
    if (tokens <= FEW) {
        float* wide = scratch<float, 0>(tokens * K);
        for (int64_t i = 0; i < tokens * K; ++i) wide[i] = one(x[i]);
        return dense(wide, tokens, K, N, weight, bias, out, threads);
    }
    float* laid = scratch<float, 0>(std::min(BLOCK, tokens) * K);  // [K / DEPTH][rows / TALL][DEPTH][TALL]
    for (int64_t first = 0; first < tokens; first += BLOCK) {
        const int64_t rows = std::min(BLOCK, tokens - first);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < rows; t += TALL)
                for (int64_t from = 0; from < K; from += DEPTH) {
                    const int64_t some = std::min<int64_t>(TALL, rows - t), depth = std::min(DEPTH, K - from);
                    float* to = laid + from * rows + t * depth;
                    for (int64_t i = 0; i < some; ++i) {
                        const W* row = x + (first + t + i) * K + from;
                        for (int64_t k = 0; k < depth; ++k) to[k * some + i] = one(row[k]);
                    }
                }
            float* panel = scratch<float, 1>(DEPTH * COLUMNS);
            float* sums = scratch<float, 2>(BLOCK * COLUMNS);
#pragma omp for schedule(static)
            for (int64_t n = 0; n < N; n += COLUMNS) {
                const int columns = int(std::min<int64_t>(COLUMNS, N - n));
                std::fill(sums, sums + rows * COLUMNS, 0.0f);
                for (int64_t from = 0; from < K; from += DEPTH) {
                    const int64_t depth = std::min(DEPTH, K - from);
                    widen_panel(weight + n * K + from, K, columns, depth, panel);
                    for (int64_t t = 0; t < rows; t += TALL)
                        tall(std::min<int64_t>(TALL, rows - t), laid + from * rows + t * depth, panel, depth, sums + t * COLUMNS);
                }
                for (int64_t t = 0; t < rows; ++t)
                    for (int c = 0; c < columns; ++c)
                        put(out + (first + t) * N + n + c, sums[t * COLUMNS + c] + (bias ? one(bias[n + c]) : 0.0f));
            }
        }
    }
}

}  // namespace
