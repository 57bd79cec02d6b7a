// Products of a few rows with dense weights: each row of the weight is read once, in order, and meets every row of x.
#pragma once

#include <algorithm>

#include "step_values.h"

namespace {

constexpr int kAbreast = 4;   // rows of the weight
constexpr int kTogether = 4;  // rows of x: with four of the weight sixteen sums, which registers hold

// The sum of a vector's lanes, in pairs: one after the other would wait for every addition.
INLINE float total(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lanes[V];
    std::memcpy(lanes, &v, sizeof v);
    for (int half = V / 2; half; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
#endif
}

// out[i] = the sum of v[i]'s lanes. A short row of a weight costs as much to sum up as to multiply, so sixteen go at once.
template <int N>
INLINE void totals(const vf* v, float* out) {
#if defined(__AVX512F__)
    if constexpr (N == 16) {
        __m512 four[4];
        UNROLL for (int i = 0; i < 4; ++i) {
            const __m512 a = (__m512)v[4 * i], b = (__m512)v[4 * i + 1], c = (__m512)v[4 * i + 2], d = (__m512)v[4 * i + 3];
            const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
            const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
            four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
        }
        const __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x44), _mm512_shuffle_f32x4(four[0], four[1], 0xEE));
        const __m512 y = _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x44), _mm512_shuffle_f32x4(four[2], four[3], 0xEE));
        _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD)));
        return;
    }
#endif
    for (int i = 0; i < N; ++i) out[i] = total(v[i]);
}

// out[t][r] = row r . x[t] for R rows of the weight and T of x in fp32. ahead: bytes to ask for before they are needed.
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
    vf all[T * R];
    UNROLL for (int t = 0; t < T; ++t) UNROLL for (int r = 0; r < R; ++r) {
        all[t * R + r] = sum[r][t][0];
        for (int p = 1; p < parts; ++p) all[t * R + r] += sum[r][t][p];
    }
    totals<T * R>(all, out);
    for (; i < k; ++i)
        for (int t = 0; t < T; ++t)
            for (int r = 0; r < R; ++r) out[t * R + r] = multiply_add(one(row[r * k + i]), x[t * k + i], out[t * R + r]);
}

#if defined(__AVX512BF16__)
// The same for x in bf16 too: two products an instruction and lane.
template <int R, int T>
INLINE void dots(const bf16* row, const bf16* x, int64_t k, int64_t ahead, float* out) {
    __m512 sum[T * R];
    _Pragma("GCC unroll 16") for (int i = 0; i < T * R; ++i) sum[i] = _mm512_setzero_ps();
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
            UNROLL for (int r = 0; r < R; ++r) sum[t * R + r] = _mm512_dpbf16_ps(sum[t * R + r], w[r], v);
        }
    }
    totals<T * R>((const vf*)sum, out);
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
            const int rows = four ? kAbreast : 1;
            for (int i = 0; i < here; ++i)
                for (int r = 0; r < rows; ++r)
                    put(out + (t + i) * n + first + r, sums[i * rows + r] + (bias ? one(bias[first + r]) : 0.0f));
        }
    }
}

}  // namespace
