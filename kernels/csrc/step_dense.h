// Products of a few rows with dense weights: each row of the weight is read once, in order, and meets every row of x.
#pragma once

#include <algorithm>

#include "step_values.h"

namespace {

// How many rows of the weight and of x meet at once, by the type of x: their sums stay in registers. And how many rows of the
// weight memory is asked for in advance, where several are walked through: more than it takes, and they push each other out.
template <class X>
struct Tile {
#if defined(__AVX512F__)
    static constexpr int weight = 4, tokens = 4, ahead = 4;
#else
    static constexpr int weight = 3, tokens = 4, ahead = 9;  // sixteen registers: twelve sums, and what they are made of
#endif
};
template <>
struct Tile<bf16> {
    static constexpr int weight = 3, tokens = 8, ahead = 6;
};

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

#if defined(__AVX512F__)
// Lane i of each quarter: a part of the sum of v[i].
INLINE __m512 four_sums(const vf* v) {
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
}
#elif defined(__AVX2__)
INLINE __m128 four_sums(const vf* v) {
    const __m256 ab = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]), cd = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
    const __m256 abcd = _mm256_hadd_ps(ab, cd);
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}
#endif

// out[i] = the sum of v[i]'s lanes. A short row of a weight costs as much to sum up as to multiply, so sixteen or four go at
// once.
template <int N>
INLINE void totals(const vf* v, float* out) {
#if defined(__AVX512F__)
    if constexpr (N >= 16) {
        const __m512 a = four_sums(v), b = four_sums(v + 4), c = four_sums(v + 8), d = four_sums(v + 12);
        const __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
        const __m512 y = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
        _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD)));
        return totals<N - 16>(v + 16, out + 16);
    } else if constexpr (N >= 4) {
        const __m512 a = four_sums(v), b = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0x4E));
        _mm_storeu_ps(out, _mm_add_ps(_mm512_castps512_ps128(b), _mm512_castps512_ps128(_mm512_shuffle_f32x4(b, b, 0xB1))));
        return totals<N - 4>(v + 4, out + 4);
    }
#elif defined(__AVX2__)
    if constexpr (N >= 4) {
        _mm_storeu_ps(out, four_sums(v));
        return totals<N - 4>(v + 4, out + 4);
    }
#endif
    UNROLL for (int i = 0; i < N; ++i) out[i] = total(v[i]);
}

// out[t][r] = row r . x[t] for R rows of the weight and T of x in fp32. ahead: bytes to ask for before they are needed; none with 0.
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
                __builtin_prefetch(reinterpret_cast<const char*>(place) + ahead, 0, 2);
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
    constexpr int parts = R * T >= 4 ? 1 : 2;
    __m512 sum[T * R * parts];
    _Pragma("GCC unroll 32") for (int i = 0; i < T * R * parts; ++i) sum[i] = _mm512_setzero_ps();
    const auto add = [&](int64_t i, __mmask32 there, int p) __attribute__((always_inline)) {
        __m512bh w[R];
        UNROLL for (int r = 0; r < R; ++r) {
            const bf16* place = row + r * k + i;
            w[r] = (__m512bh)_mm512_maskz_loadu_epi16(there, place);
            __builtin_prefetch(reinterpret_cast<const char*>(place) + ahead, 0, 2);
        }
        UNROLL for (int t = 0; t < T; ++t) {
            const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(there, x + t * k + i);
            UNROLL for (int r = 0; r < R; ++r) {
                __m512& s = sum[p * T * R + t * R + r];
                s = _mm512_dpbf16_ps(s, w[r], v);
            }
        }
    };
    int64_t i = 0;
    for (; i + parts * 32 <= k; i += parts * 32) UNROLL for (int p = 0; p < parts; ++p) add(i + 32 * p, ~0u, p);
    for (; i < k; i += 32) add(i, k - i >= 32 ? ~0u : (1u << (k - i)) - 1, 0);
    if constexpr (parts == 2)
        for (int j = 0; j < T * R; ++j) sum[j] = _mm512_add_ps(sum[j], sum[T * R + j]);
    totals<T * R>((const vf*)sum, out);
}
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

template <int R, class W, class X>
INLINE void some(int tokens, const W* row, const X* x, int64_t k, int64_t ahead, float* out) {
    if constexpr (Tile<X>::tokens == 8) switch (tokens) {
        case 8: return dots<R, 8>(row, x, k, ahead, out);
        case 7: return dots<R, 7>(row, x, k, ahead, out);
        case 6: return dots<R, 6>(row, x, k, ahead, out);
        case 5: return dots<R, 5>(row, x, k, ahead, out);
    }
    switch (tokens) {
        case 4: return dots<R, 4>(row, x, k, ahead, out);
        case 3: return dots<R, 3>(row, x, k, ahead, out);
        case 2: return dots<R, 2>(row, x, k, ahead, out);
        default: return dots<R, 1>(row, x, k, ahead, out);
    }
}

// out [n] = x [k] . weight [n, k] transposed + bias [n]: a walk through memory, which goes best in order.
template <class W, class X>
void dense_row(const X* x, int64_t k, int64_t n, const W* weight, const W* bias, W* out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t r = 0; r < n; ++r) {
        float sum;
        dots<1, 1>(weight + r * k, x, k, 4096, &sum);
        put(out + r, sum + (bias ? one(bias[r]) : 0.0f));
    }
}

// out [tokens, n] = x [tokens, k] . weight [n, k] transposed + bias [n]; W and the type of out and bias: float or bf16.
template <class W, class X>
void dense(const X* x, int64_t tokens, int64_t k, int64_t n, const W* weight, const W* bias, W* out, int threads) {
    if (tokens == 1) return dense_row(x, k, n, weight, bias, out, threads);
    using tile = Tile<X>;
    const int64_t whole = n / tile::weight, blocks = whole + n % tile::weight;
    const int64_t ahead = tile::ahead * k * int64_t(sizeof(W));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
        const bool full = b < whole;
        const int64_t first = full ? b * tile::weight : whole * tile::weight + b - whole;
        for (int64_t t = 0; t < tokens; t += tile::tokens) {
            const int here = int(std::min<int64_t>(tile::tokens, tokens - t));
            float sums[tile::weight * tile::tokens];
            if (full) some<tile::weight>(here, weight + first * k, x + t * k, k, t ? 0 : ahead, sums);
            else some<1>(here, weight + first * k, x + t * k, k, t ? 0 : ahead, sums);
            const int rows = full ? tile::weight : 1;
            for (int i = 0; i < here; ++i)
                for (int r = 0; r < rows; ++r)
                    put(out + (t + i) * n + first + r, sums[i * rows + r] + (bias ? one(bias[first + r]) : 0.0f));
        }
    }
}

}  // namespace
