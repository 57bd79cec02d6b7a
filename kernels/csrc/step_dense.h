// Products of a few rows with dense weights: each row of the weight is read once, in order, and meets every row of x.
#pragma once

#include <algorithm>

#include "step_values.h"

namespace {

constexpr int kAbreast = 4;   // rows of the weight
constexpr int kTogether = 4;  // rows of x: with four of the weight sixteen sums, which registers hold

// out[r][t] = row r . x[t] for R rows of the weight and T of x in fp32. ahead: bytes to ask for before they are needed.
template <int R, int T, class W>
INLINE void dots(const W* row, const float* x, int64_t k, int64_t ahead, float* out) {
    constexpr int parts = R * T >= 8 ? 1 : R * T >= 4 ? 2 : 4;  // a chain of additions waits for itself
    vf sum[R][T][parts] = {};
    int64_t i = 0;
    for (; i + parts * V <= k; i += parts * V)
        UNROLL for (int p = 0; p < parts; ++p) {
            vf w[R];
            UNROLL for (int r = 0; r < R; ++r) {
                const W* place = row + r * k + i + p * V;
                w[r] = widen(place);
                if (ahead) __builtin_prefetch(reinterpret_cast<const char*>(place) + ahead, 0, 2);
                IN_REGISTER(w[r]);
            }
            UNROLL for (int t = 0; t < T; ++t) {
                const vf v = widen(x + t * k + i + p * V);
                UNROLL for (int r = 0; r < R; ++r) sum[r][t][p] = multiply_add(w[r], v, sum[r][t][p]);
            }
        }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) {
            vf all = sum[r][t][0];
            for (int p = 1; p < parts; ++p) all += sum[r][t][p];
            float total = 0;
            for (int lane = 0; lane < V; ++lane) total += all[lane];
            for (int64_t rest = i; rest < k; ++rest) total = multiply_add(one(row[r * k + rest]), x[t * k + rest], total);
            out[r * T + t] = total;
        }
}

#if defined(__AVX512BF16__)
// The same for x in bf16 too: two products an instruction and lane.
template <int R, int T>
INLINE void dots(const bf16* row, const bf16* x, int64_t k, int64_t ahead, float* out) {
    __m512 sum[R][T];
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int t = 0; t < T; ++t) sum[r][t] = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 32) {
        const __mmask32 there = k - i >= 32 ? 0xFFFFFFFFu : (1u << (k - i)) - 1;
        __m512bh w[R];
        UNROLL for (int r = 0; r < R; ++r) {
            const bf16* place = row + r * k + i;
            w[r] = (__m512bh)_mm512_maskz_loadu_epi16(there, place);
            if (ahead) __builtin_prefetch(reinterpret_cast<const char*>(place) + ahead, 0, 2);
        }
        UNROLL for (int t = 0; t < T; ++t) {
            const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(there, x + t * k + i);
            UNROLL for (int r = 0; r < R; ++r) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], w[r], v);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) out[r * T + t] = _mm512_reduce_add_ps(sum[r][t]);
}
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

template <int R, class W, class X>
INLINE void some(int tokens, const W* row, const X* x, int64_t k, int64_t ahead, float* out) {
    switch (tokens) {
        case 4: return dots<R, 4>(row, x, k, ahead, out);
        case 3: return dots<R, 3>(row, x, k, ahead, out);
        case 2: return dots<R, 2>(row, x, k, ahead, out);
        default: return dots<R, 1>(row, x, k, ahead, out);
    }
}

// out [tokens, n] = x [tokens, k] . weight [n, k] transposed + bias [n]; W and the type of out and bias: float or bf16.
template <class W, class X>
void dense(const X* x, int64_t tokens, int64_t k, int64_t n, const W* weight, const W* bias, W* out, int threads) {
    const int64_t abreast = tokens == 1 ? 1 : kAbreast;  // one row is a walk through memory, which goes best in order
    const int64_t whole = n / abreast, blocks = whole + n % abreast;
    const int64_t ahead = tokens == 1 ? 4096 : abreast * k * int64_t(sizeof(W));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b < whole ? b * abreast : whole * abreast + b - whole;
        const bool four = b < whole && abreast == kAbreast;
        for (int64_t t = 0; t < tokens; t += kTogether) {
            const int here = int(std::min<int64_t>(kTogether, tokens - t));
            float sums[kAbreast * kTogether];
            if (four) some<kAbreast>(here, weight + first * k, x + t * k, k, t ? 0 : ahead, sums);
            else some<1>(here, weight + first * k, x + t * k, k, t ? 0 : ahead, sums);
            for (int r = 0; r < (four ? kAbreast : 1); ++r)
                for (int i = 0; i < here; ++i)
                    put(out + (t + i) * n + first + r, sums[r * here + i] + (bias ? one(bias[first + r]) : 0.0f));
        }
    }
}

}  // namespace
