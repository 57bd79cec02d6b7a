// Low-bit linears for a few rows with AVX2: codes stay bytes and meet activations that are integers.
//
// A vector of 32 bytes of a row holds 8 lanes of 32 / bits codes. Its bytes, shifted right by j * bits and masked, are
// unsigned codes in [0, 15]; one instruction multiplies them by signed bytes and adds two neighbours, and no sum of a block
// leaves 16 bits. Codes of 8 bits are widened to 16 and meet integers of 16 bits. Activations become integers of 16 bits (for
// bf16 and fp16) or 24 (for fp32) as in wna16_vnni.h: in steps, powers of two, set by the largest of one block's columns.
// A lane's codes share a scale, and zero points are applied to the groups' sums of the same integers.
#pragma once
#if defined(__AVX2__) && !defined(WNA16_VNNI)
#define WNA16_AVX2 1
#include "wna16_avx2_rounding.h"

namespace bytes {

constexpr int64_t MOST = 16;  // rows; beyond them a weight in fp32 that meets eight rows costs less

// Eight values of V bytes from place `at` of `all`: those behind the end are 0, those behind a row are the next row's.
template <class V>
inline V eight(const void* values, int64_t at, int64_t all) {
    constexpr int64_t kBytes = sizeof(V) / 8;
    const char* const p = static_cast<const char*>(values) + at * kBytes;
    V found{};
    if (at + 8 <= all) std::memcpy(&found, p, sizeof found);
    else std::memcpy(&found, p, (all - at) * kBytes);
    return found;
}

inline __m256 eight_scales(const Weight& w, int64_t at) {
    const int64_t all = w.n * w.groups;
    if (w.scale_kind == 0) return eight<__m256>(w.scales, at, all);
    const __m128i half = eight<__m128i>(w.scales, at, all);
    if (w.scale_kind == 2) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// One row's scales to `scale`. And what its zero points take away, shifts by each of M rows' sums, from `total`.
template <int M>
inline void offsets(const Weight& w, int64_t row, const float* sums, float* scale, __m256* total) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int64_t g = 0; g < w.groups; g += 8) {
        const int64_t at = row * w.groups + g;
        const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(w.groups - g)), lanes);
        const __m256 scales = _mm256_and_ps(eight_scales(w, at), _mm256_castsi256_ps(there));
        _mm256_storeu_ps(scale + g, scales);
        __m256 zeros = _mm256_set1_ps(w.midpoint);
        if (w.zeros)
            zeros = _mm256_cvtepi32_ps(
                _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(eight<int64_t>(w.zeros, at, w.n * w.groups))));
        const __m256 shift = _mm256_mul_ps(scales, zeros);
        ABREAST for (int m = 0; m < M; ++m)
            total[m] = _mm256_fnmadd_ps(shift, _mm256_loadu_ps(sums + m * padded(w.groups) + g), total[m]);
    }
}

inline __m256i load(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// The integer sums of a block's lanes: its codes by one row's activations.
template <int kBits, int P>
inline __m256i products(const __m256i* codes, const int8_t* planes) {
    using S = Shape<kBits>;
    if constexpr (kBits == 8) {
        __m256i sum = _mm256_madd_epi16(codes[0], load(planes));
        ABREAST for (int i = 1; i < 4; ++i) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(codes[i], load(planes + 32 * i)));
        return sum;
    }
    __m256i sum = _mm256_setzero_si256();
    ABREAST for (int q = 0; q < P; ++q) {
        __m256i pairs = _mm256_maddubs_epi16(codes[0], load(planes + q * S::kBlock));
        ABREAST for (int j = 1; j < S::kParts; ++j)
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes[j], load(planes + q * S::kBlock + j * 32)));
        const __m256i lanes = _mm256_madd_epi16(pairs, _mm256_set1_epi16(q + 2 == P ? 256 : 1));
        sum = P == 3 && q == 0 ? _mm256_slli_epi32(lanes, 16) : _mm256_add_epi32(sum, lanes);
    }
    return sum;
}

// out[m, first + r] for R weight rows and M activation rows. held: R rows of `width` floats.
template <int kBits, int P, int R, int M>
void tile(const Weight& w, int64_t first, const Rounded& x, int64_t at_row, const float* bias, float* out, float* held,
          int64_t width) {
    using S = Shape<kBits>;
    constexpr int kBytes = S::kBlock * kBits / 8, kVectors = kBits == 8 ? 4 : S::kParts;
    const int64_t blocks = (w.k + S::kBlock - 1) / S::kBlock, each = P * S::kBlock, group = group_size(w.k, w.groups);
    alignas(32) int32_t lanes[8];
    for (int lane = 0; lane < 8; ++lane) lanes[lane] = int32_t(lane * S::kLane / group);
    const __m256i place = _mm256_load_si256((const __m256i*)lanes), mask = _mm256_set1_epi8((1 << kBits) - 1);
    const bool alone = w.groups == 1;
    const uint8_t* rows[R];
    __m256 total[R][M], away[R][M];
    ABREAST for (int r = 0; r < R; ++r) {
        rows[r] = w.codes + (first + r) * w.row_bytes;
        ABREAST for (int m = 0; m < M; ++m) total[r][m] = away[r][m] = _mm256_setzero_ps();
        offsets<M>(w, first + r, x.sums.data() + at_row * width, held + r * width, away[r]);
    }
    const auto block = [&](int64_t b, int r, const uint8_t* from) __attribute__((always_inline)) {
        __m256i codes[kVectors];
        if constexpr (kBits == 8) {
            ABREAST for (int i = 0; i < 4; ++i)
                codes[i] = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(from + 16 * i)));
        } else {
            const __m256i packed = load((const int8_t*)from);
            ABREAST for (int j = 0; j < S::kParts; ++j)
                codes[j] = _mm256_and_si256(j ? _mm256_srli_epi16(packed, j * kBits) : packed, mask);
        }
        __m256 scale = _mm256_set1_ps(1.0f);
        if (!alone) {
            const float* const near = held + r * width + b * S::kBlock / group;
            scale = group < S::kBlock ? _mm256_permutevar8x32_ps(_mm256_loadu_ps(near), place) : _mm256_broadcast_ss(near);
        }
        ABREAST for (int m = 0; m < M; ++m) {
            const int64_t at = (at_row + m) * blocks + b;
            const __m256 sums = _mm256_cvtepi32_ps(products<kBits, P>(codes, x.planes.data() + at * each));
            total[r][m] = _mm256_fmadd_ps(sums, _mm256_mul_ps(scale, _mm256_broadcast_ss(&x.steps[at])), total[r][m]);
        }
    };
    const int64_t whole = w.row_bytes / kBytes;
    for (int64_t b = 0; b < whole; ++b)
        ABREAST for (int r = 0; r < R; ++r) {
            const uint8_t* const p = rows[r] + b * kBytes;
            _mm_prefetch(reinterpret_cast<const char*>(p + 4096), _MM_HINT_T1);  // rows are short streams
            block(b, r, p);
        }
    for (int64_t b = whole; b < blocks; ++b)
        ABREAST for (int r = 0; r < R; ++r) {
            alignas(32) uint8_t end[kBytes] = {};
            std::memcpy(end, rows[r] + b * kBytes, w.row_bytes - b * kBytes);
            block(b, r, end);
        }
    ABREAST for (int r = 0; r < R; ++r) ABREAST for (int m = 0; m < M; ++m) {
        const __m256 scale = _mm256_set1_ps(alone ? held[r * width] : 1.0f);
        const float result = sum((Floats)_mm256_fmadd_ps(total[r][m], scale, away[r][m]));
        out[m * w.n + first + r] = result + (bias ? bias[first + r] : 0.0f);
    }
}

template <int kBits, int P, int R, int M>
void all_rows(const Weight& w, const Rounded& x, int64_t at_row, const float* bias, float* out, int threads) {
    const int64_t whole = w.n / R, width = padded(w.groups);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> held(R * width);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < whole; ++b) tile<kBits, P, R, M>(w, b * R, x, at_row, bias, out, held.data(), width);
#pragma omp for schedule(static)
        for (int64_t row = whole * R; row < w.n; ++row)
            tile<kBits, P, 1, M>(w, row, x, at_row, bias, out, held.data(), width);
    }
}

template <int kBits, int P>
std::vector<char> linear(const Weight& w, const float* x, int64_t m, const float* bias, float* out, int threads) {
    if (m > MOST || !fits<kBits>(w.k, w.groups)) return {};
    const Rounded rounded = round_all<kBits, P>(x, m, w.k, w.groups);
    for (int64_t at = 0; at < m;) {
        const int64_t step = m - at >= 4 ? 4 : m - at >= 2 ? 2 : 1;
        float* const to = out + at * w.n;
        if (step == 4) all_rows<kBits, P, 2, 4>(w, rounded, at, bias, to, threads);
        if (step == 2) all_rows<kBits, P, 4, 2>(w, rounded, at, bias, to, threads);
        if (step == 1) all_rows<kBits, P, 4, 1>(w, rounded, at, bias, to, threads);
        at += step;
    }
    return rounded.finite;
}

// As in wna16_vnni.h: which rows are right, or empty where another kernel is the faster one or has to do.
inline std::vector<char> linear(const Weight& w, const float* x, int64_t m, const float* bias, float* out, int bits,
                                int planes, int threads) {
    if (bits == 2 && planes == 2) return linear<2, 2>(w, x, m, bias, out, threads);
    if (bits == 2 && planes == 3) return linear<2, 3>(w, x, m, bias, out, threads);
    if (bits == 4 && planes == 2) return linear<4, 2>(w, x, m, bias, out, threads);
    if (bits == 4 && planes == 3) return linear<4, 3>(w, x, m, bias, out, threads);
    if (bits == 8 && planes == 2) return linear<8, 2>(w, x, m, bias, out, threads);
    return {};
}

}  // namespace bytes
#undef ABREAST
#endif
