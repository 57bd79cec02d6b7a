// A few rows of bf16 by weights of 4 or 8 bits, with the bf16 dot products of AVX-512 (VDPBF16PS).
//
// Codes become bf16 in registers, exactly: 4 bits, less 8, by a table; 8 bits by conversion. A vector of 64 bytes then
// meets every row of x: up to eight of 8 bits, two of 4. Words of 16 bits hold four codes of four columns on end, of which part
// j of a block takes the j-th: x is laid out to match, once a call. Scales apply to sums: to a row's where it has one, else
// to each group's. Zero points apply to the sums of x, as in the other kernels.
#pragma once

#include <type_traits>

#include "step_dense.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__F16C__)
#define WNA16_FEW_BF16 1

namespace few {

struct Weight {
    const uint8_t* codes;  // [n, row_bytes]
    const void* scales;    // [n, groups]: 0 fp32, 1 bf16, 2 fp16
    const uint8_t* zeros;  // [n, groups], or null for the middle code
    int kind;
    int64_t n, k, row_bytes, groups;
};

// Sixteen scales from place `at` on, zero where `there` says so.
inline __m512 scales(const Weight& w, int64_t at, __mmask16 there) {
    if (w.kind == 0) return _mm512_maskz_loadu_ps(there, static_cast<const float*>(w.scales) + at);
    const __m256i half = _mm256_maskz_loadu_epi16(there, static_cast<const uint16_t*>(w.scales) + at);
    if (w.kind == 2) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <int kBits>
struct Form {
    static constexpr int kCodes = 512 / kBits;      // a block: 64 bytes of a row
    static constexpr int kParts = kCodes / 32;      // vectors of 32 codes
    static constexpr float kBase = kBits == 4 ? 8 : 0;      // what is taken from a code
    static constexpr float kMiddle = kBits == 4 ? 8 : 128;  // where there are no zero points

    // Column of the block that word i of part j has.
    static int64_t column(int j, int i) { return kBits == 4 ? 4 * i + j : 32 * j + i; }

    // What a block is read as: a vector, or for 8 bits the place, which conversions load from.
    using Block = std::conditional_t<kBits == 4, __m512i, const uint8_t*>;

    template <int J>
    static INLINE __m512bh part(Block block, __m512i table) {
        if constexpr (kBits == 4) {
            return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(block, 4 * J), table);
        } else {
            const __m128i* const p = reinterpret_cast<const __m128i*>(block) + 2 * J;
            const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p)));
            const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p + 1)));
            return _mm512_cvtne2ps_pbh(high, low);
        }
    }
};

// VPERMW reads five bits of an index; the fifth is the next code's, so the table stands twice.
inline __m512i table_of_codes() {
    alignas(64) static const uint16_t values[32] = {
        0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0,
        0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};
    return _mm512_load_si512(values);
}

// sums[t][r] += codes of part J . x, and of the parts behind it; chain: which of several sums that do not wait for each other.
template <int kBits, int R, int M, int C, int J = 0>
INLINE void parts(const typename Form<kBits>::Block* block, const uint16_t* x, int64_t apart, __m512i table, __m512 (*sums)[R * C]) {
    __m512bh w[R];
    UNROLL for (int r = 0; r < R; ++r) w[r] = Form<kBits>::template part<J>(block[r], table);
    UNROLL for (int t = 0; t < M; ++t) {
        const __m512bh v = (__m512bh)_mm512_load_si512(x + t * apart + J * 32);
        UNROLL for (int r = 0; r < R; ++r) {
            __m512& sum = sums[t][r * C + J % C];
            sum = _mm512_dpbf16_ps(sum, w[r], v);
        }
    }
    if constexpr (J + 1 < Form<kBits>::kParts) parts<kBits, R, M, C, J + 1>(block, x, apart, table, sums);
}

// out[t * 16 + r]: R rows of the weight by M of x [M, apart]. sums: of x over each group [M, groups].
template <int kBits, bool kAlone, int R, int M>
INLINE void tile(const Weight& w, const int64_t* row, const uint16_t* x, int64_t apart, const float* sums, float* out) {
    using F = Form<kBits>;
    constexpr int C = kAlone && R * M < 8 ? 2 : 1;
    const int64_t blocks = (w.k + F::kCodes - 1) / F::kCodes, group = w.k / w.groups;
    const __m512i table = table_of_codes();
    alignas(64) int32_t lanes[16];
    for (int l = 0; l < 16; ++l) lanes[l] = kBits == 4 ? int32_t(8 * l / std::min<int64_t>(group, 128)) : 0;
    const __m512i place = _mm512_load_si512(lanes);
    __m512 total[M][R * C];
    _Pragma("GCC unroll 16") for (int t = 0; t < M; ++t) UNROLL for (int r = 0; r < R * C; ++r) total[t][r] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; ++b) {
        typename F::Block block[R];
        alignas(64) uint8_t rest_of_row[R][64];
        const int64_t left = w.row_bytes - b * 64;
        UNROLL for (int r = 0; r < R; ++r) {
            const uint8_t* p = w.codes + row[r] * w.row_bytes + b * 64;
            const __mmask64 there = left >= 64 ? ~0ull : (1ull << left) - 1;
            if constexpr (kBits == 4) {
                block[r] = left >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(there, p);
            } else {
                block[r] = left >= 64 ? p : rest_of_row[r];
                if (left < 64) _mm512_store_si512(rest_of_row[r], _mm512_maskz_loadu_epi8(there, p));
            }
            __builtin_prefetch(p + 4096, 0, 2);
        }
        const uint16_t* const at = x + b * F::kCodes;
        if constexpr (kAlone) {
            parts<kBits, R, M, C>(block, at, apart, table, total);
            continue;
        }
        __m512 here[M][R * C];
        UNROLL for (int t = 0; t < M; ++t) UNROLL for (int r = 0; r < R; ++r) here[t][r] = _mm512_setzero_ps();
        parts<kBits, R, M, C>(block, at, apart, table, here);
        const int64_t g = b * F::kCodes / group, rest = w.groups - g;
        const __mmask16 there = rest >= 16 ? 0xFFFF : (__mmask16)((1u << rest) - 1);
        UNROLL for (int r = 0; r < R; ++r) {
            const __m512 scale = _mm512_permutexvar_ps(place, scales(w, row[r] * w.groups + g, there));
            UNROLL for (int t = 0; t < M; ++t) total[t][r] = _mm512_fmadd_ps(here[t][r], scale, total[t][r]);
        }
    }
    if (!kAlone && (w.zeros || F::kBase != F::kMiddle)) {
        for (int64_t g = 0; g < w.groups; g += 16) {
            const int64_t rest = w.groups - g;
            const __mmask16 there = rest >= 16 ? 0xFFFF : (__mmask16)((1u << rest) - 1);
            UNROLL for (int r = 0; r < R; ++r) {
                const int64_t first = row[r] * w.groups + g;
                const __m512 zero = w.zeros ? _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, w.zeros + first)))
                                            : _mm512_set1_ps(F::kMiddle);
                const __m512 shift = _mm512_mul_ps(_mm512_sub_ps(zero, _mm512_set1_ps(F::kBase)), scales(w, first, there));
                for (int t = 0; t < M; ++t)
                    total[t][r] = _mm512_fnmadd_ps(shift, _mm512_maskz_loadu_ps(there, sums + t * w.groups + g), total[t][r]);
            }
        }
    }
    vf all[M * R];
    UNROLL for (int t = 0; t < M; ++t) UNROLL for (int r = 0; r < R; ++r)
        all[t * R + r] = (vf)(C == 2 ? _mm512_add_ps(total[t][r * C], total[t][r * C + C - 1]) : total[t][r * C]);
    float found[M * R];
    totals<M * R>(all, found);
    for (int t = 0; t < M; ++t) for (int r = 0; r < R; ++r) out[t * 16 + r] = found[t * R + r];
}

// M rows of x, of which `real` are stored. out [real, n] in bf16.
template <int kBits, bool kAlone, int M>
void rows(const Weight& w, const uint16_t* x, int64_t apart, const float* sums, const uint16_t* bias, uint16_t* out,
          int real, int threads) {
    constexpr int R = M == 8 ? (kAlone ? 2 : 1) : M == 4 && !kAlone ? 2 : 4;
    const int64_t blocks = (w.n + 15) / 16;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
        float found[M * 16];
        for (int part = 0; part < 16; part += R) {
            int64_t row[R];
            for (int r = 0; r < R; ++r) row[r] = std::min(b * 16 + part + r, w.n - 1);
            tile<kBits, kAlone, R, M>(w, row, x, apart, sums, found + part);
        }
        const int64_t first = b * 16, rest = w.n - first;
        const __mmask16 there = rest >= 16 ? 0xFFFF : (__mmask16)((1u << rest) - 1);
        for (int t = 0; t < real; ++t) {
            __m512 y = _mm512_loadu_ps(found + t * 16);
            if (kAlone) {
                const __m512 zero = w.zeros ? _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, w.zeros + first)))
                                            : _mm512_set1_ps(Form<kBits>::kMiddle);
                y = _mm512_fnmadd_ps(_mm512_sub_ps(zero, _mm512_set1_ps(Form<kBits>::kBase)), _mm512_set1_ps(sums[t]), y);
                y = _mm512_mul_ps(y, scales(w, first, there));
            }
            if (bias) {
                const __m256i half = _mm256_maskz_loadu_epi16(there, bias + first);
                y = _mm512_add_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
            }
            _mm256_mask_storeu_epi16(out + t * w.n + first, there, (__m256i)_mm512_cvtneps_pbh(y));
        }
    }
}

// Of bf16 values, in an order of its own.
inline float sum(const uint16_t* x, int64_t count) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
    __m512 all = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 32) {
        const __mmask32 there = count - i >= 32 ? ~0u : (1u << (count - i)) - 1;
        all = _mm512_dpbf16_ps(all, (__m512bh)_mm512_maskz_loadu_epi16(there, x + i), ones);
    }
    return _mm512_reduce_add_ps(all);
}

template <int kBits, bool kAlone>
void linear(const Weight& w, const uint16_t* x, int64_t m, const uint16_t* bias, uint16_t* out, int threads) {
    using F = Form<kBits>;
    const int64_t blocks = (w.k + F::kCodes - 1) / F::kCodes, apart = blocks * F::kCodes, group = w.k / w.groups;
    thread_local std::vector<uint16_t> memory;
    thread_local std::vector<float> sums;
    memory.resize(8 * apart + 32);
    uint16_t* const laid = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63));
    for (int64_t begin = 0; begin < m; begin += 8) {
        const int real = int(std::min<int64_t>(8, m - begin)), taken = real <= 2 ? real : real <= 4 ? 4 : 8;
        sums.assign(taken * w.groups, 0.0f);
        std::fill(laid + real * apart, laid + taken * apart, uint16_t(0));  // rows that are not there
        for (int t = 0; t < real; ++t) {
            const uint16_t* const from = x + (begin + t) * w.k;
            for (int64_t g = 0; g < w.groups; ++g) sums[t * w.groups + g] = sum(from + g * group, group);
            uint16_t* at = laid + t * apart;
            int64_t b = 0;
            for (; (b + 1) * F::kCodes <= w.k; ++b, at += F::kCodes)
                for (int i = 0; i < 32; ++i)
                    for (int j = 0; j < F::kParts; ++j) at[j * 32 + i] = from[b * F::kCodes + F::column(j, i)];
            if (b == blocks) continue;
            std::fill(at, at + F::kCodes, uint16_t(0));  // beyond k
            for (int i = 0; i < 32; ++i)
                for (int j = 0; j < F::kParts; ++j) {
                    const int64_t column = b * F::kCodes + F::column(j, i);
                    if (column < w.k) at[j * 32 + i] = from[column];
                }
        }
        uint16_t* const to = out + begin * w.n;
        if (real == 1) rows<kBits, kAlone, 1>(w, laid, apart, sums.data(), bias, to, real, threads);
        else if (real == 2) rows<kBits, kAlone, 2>(w, laid, apart, sums.data(), bias, to, real, threads);
        else if constexpr (kBits == 4) return;  // more rows of 4 bits go by lanes: see `wna16_lanes_bf16.h`
        else if (real <= 4) rows<kBits, kAlone, 4>(w, laid, apart, sums.data(), bias, to, real, threads);
        else rows<kBits, kAlone, 8>(w, laid, apart, sums.data(), bias, to, real, threads);
    }
}

// Whether the kernel takes groups of this size: lanes of a block share a scale in one pattern.
inline bool takes(int bits, int64_t k, int64_t groups) {
    const int64_t group = k / groups;
    if (bits == 8) return groups == 1 || group % 64 == 0;
    return bits == 4 && (groups == 1 || (group % 8 == 0 && (128 % group == 0 || group % 128 == 0)));
}

}  // namespace few
#else
#define WNA16_FEW_BF16 0
#endif
