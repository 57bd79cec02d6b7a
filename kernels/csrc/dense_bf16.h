// A product with neuron-major bf16 weights that reads every neuron, for calls that keep too many to skip any.
#pragma once

#if defined(__AVX512BF16__)
#include <omp.h>

#include <algorithm>

#include "thread_work.h"

namespace {

constexpr int64_t PAIRS = 64;  // of neurons a panel; 32 columns of them fill a quarter of the first cache
constexpr int BATCH = 12;      // tokens whose sums stay in registers

// 32 columns of a panel of neuron pairs, side by side as the products want them: rows lie a power of two apart, and
// so would meet in one place of the cache if every batch of tokens read them anew.
void pack(const bf16* weight, int64_t D, int64_t neurons, __m512i* panel) {
    const __m512i none = _mm512_setzero_si512();
    for (int64_t n = 0; n < neurons; n += 2) {
        const __m512i a = _mm512_loadu_si512(weight + n * D);
        const __m512i b = n + 1 < neurons ? _mm512_loadu_si512(weight + (n + 1) * D) : none;
        _mm512_store_si512(panel + n, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(panel + n + 1, _mm512_unpackhi_epi16(a, b));
    }
}

// acc [T][32] += panel . coef [pairs][T]: sums of products of neuron pairs, in the order the interleaving leaves them.
// Asks for a line of each neuron of the next panel, from `next` on.
template <int T>
void dense_tile(const __m512i* panel, int64_t pairs, const uint32_t* coef, float* acc, const bf16* next, int64_t D) {
    __m512 low[T], high[T];
    _Pragma("GCC unroll 16") for (int t = 0; t < T; ++t) {
        low[t] = _mm512_loadu_ps(acc + t * 2 * V);
        high[t] = _mm512_loadu_ps(acc + t * 2 * V + V);
    }
    for (int64_t n = 0; n < pairs; ++n) {
        const __m512bh lower = (__m512bh)_mm512_load_si512(panel + 2 * n);
        const __m512bh upper = (__m512bh)_mm512_load_si512(panel + 2 * n + 1);
        const uint32_t* pair = coef + n * T;
        __builtin_prefetch(next + 2 * n * D, 0, 2);
        __builtin_prefetch(next + (2 * n + 1) * D, 0, 2);
        _Pragma("GCC unroll 16") for (int t = 0; t < T; ++t) {
            const __m512bh k = (__m512bh)_mm512_set1_epi32(int(pair[t]));
            low[t] = _mm512_dpbf16_ps(low[t], lower, k);
            high[t] = _mm512_dpbf16_ps(high[t], upper, k);
        }
    }
    _Pragma("GCC unroll 16") for (int t = 0; t < T; ++t) {
        _mm512_storeu_ps(acc + t * 2 * V, low[t]);
        _mm512_storeu_ps(acc + t * 2 * V + V, high[t]);
    }
}

// out[t] = act[t] . weight + bias with every neuron read, D a multiple of 32. Where a weight of this layout
// meets several tokens, PyTorch reorders it at every call, which costs twice the product.
void dense(const bf16* act, int64_t tokens, int64_t F, int64_t D, const bf16* weight, const bf16* bias, bf16* out,
           int threads) {
    constexpr int64_t COLS = 2 * V;
    // Batches of tokens lie one after the other, in `coef` [batch][pair][token] as in `acc` [columns / 32][token][32]:
    // with the strides of a whole row their places in a cache would be the same few.
    float* acc = scratch<float, 0>(tokens * D);
    const int64_t pairs = (F + 1) / 2, batches = (tokens + BATCH - 1) / BATCH;
    uint32_t* coef = scratch<uint32_t, 4>(pairs * tokens);
    constexpr int64_t SOME = LINE / sizeof(uint32_t);  // pairs
    for (int64_t batch = 0; batch < batches; ++batch) {
        const int64_t from = tokens * batch / batches, to = tokens * (batch + 1) / batches;
        for (int64_t first = 0; first < pairs; first += SOME)
            for (int64_t t = from; t < to; ++t)
                for (int64_t n = first; n < std::min(first + SOME, pairs); ++n) {
                    const bf16* a = act + t * F + 2 * n;
                    coef[from * pairs + n * (to - from) + t - from] =
                        a[0].bits | (2 * n + 1 < F ? uint32_t(a[1].bits) << 16 : 0);
                }
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;
        alignas(LINE) __m512i panel[2 * PAIRS];
        share(D, omp_get_num_threads(), omp_get_thread_num(), &begin, &end, COLS);
        std::fill(acc + begin * tokens, acc + end * tokens, 0.0f);
        for (int64_t first = 0; first < F; first += 2 * PAIRS) {
            const int64_t neurons = std::min(2 * PAIRS, F - first);
            for (int64_t col = begin; col < end; col += COLS) {
                pack(weight + first * D + col, D, neurons, panel);
                // After the last columns come the next neurons. A prefetch beyond the weight's end does nothing.
                const bf16* next = weight + (col + COLS < end ? first * D + col + COLS : (first + neurons) * D + begin);
                for (int64_t batch = 0; batch < batches; ++batch) {
                    const int64_t t = tokens * batch / batches, some = tokens * (batch + 1) / batches - t;
                    const uint32_t* k = coef + t * pairs + first / 2 * some;
                    float* sums = acc + col * tokens + t * COLS;
                    switch (some) {
#define TILE(T) case T: dense_tile<T>(panel, (neurons + 1) / 2, k, sums, batch ? act : next, batch ? 0 : D); break
                        TILE(1); TILE(2); TILE(3); TILE(4); TILE(5); TILE(6);
                        TILE(7); TILE(8); TILE(9); TILE(10); TILE(11); TILE(12);
#undef TILE
                    }
                }
            }
        }
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t col = begin; col < end; col += COLS)
                for (int64_t c = 0; c < COLS; ++c) {
                    // column c was summed in half (c / 4) % 2, at place c % 4 of group c / 8
                    const int64_t at = (c / 4) % 2 * V + c / 8 * 4 + c % 4;
                    put(out + t * D + col + c, acc[col * tokens + t * COLS + at] + (bias ? one(bias[col + c]) : 0.0f));
                }
    }
}

}  // namespace
#endif
