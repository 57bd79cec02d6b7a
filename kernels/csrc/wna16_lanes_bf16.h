// Three to eight rows of bf16 by weights of 4 bits, a weight's row a lane: sixteen rows of codes are transposed in registers, so
// that every vector of them meets a number of each row of x from memory, and sums come out side by side, with nothing to add up across.
//
// Fewer rows are bound by the bytes of codes, and keep the form that reads rows in order (wna16_few_bf16.h).
#pragma once

#include "nvfp4_bf16_gemm.h"
#include "wna16_few_bf16.h"

#if WNA16_FEW_BF16  // which asks for all that NVFP4_BF16 does

namespace lanes {

using few::Weight;
constexpr int kColumns = 128;  // that are transposed at a time: 64 bytes of a row

// Sixteen numbers of each of rows first .. first + 15, place by place: out[i] has the i-th of each row. 0 beyond the last.
template <class Read>
INLINE void by_place(const Weight& w, int64_t first, int64_t g, __m512* out, Read read) {
    const int64_t rest = w.groups - g;
    const __mmask16 there = rest >= 16 ? 0xFFFF : (__mmask16)((1u << rest) - 1);
    __m512i v[16];
    for (int r = 0; r < 16; ++r)
        v[r] = first + r < w.n ? _mm512_castps_si512(read((first + r) * w.groups + g, there)) : _mm512_setzero_si512();
    nvfp4::transpose16(v);
    for (int i = 0; i < 16; ++i) out[i] = _mm512_castsi512_ps(v[i]);
}

// Rows first .. first + 15 of the weight by M rows of x [pairs][M], to total [M] of 16 lanes. sums: of x, [M, groups].
template <int M>
inline void tile(const Weight& w, int64_t first, const uint32_t* x, const float* sums, __m512* total) {
    const __m512i table = few::table_of_codes();
    const int64_t group = w.k / w.groups, segment = w.groups == 1 ? kColumns : std::min<int64_t>(group, kColumns);
    __m512 all[M], scale[16], shift[16];
    UNROLL for (int t = 0; t < M; ++t) all[t] = _mm512_setzero_ps();
    int64_t held = -1;  // the group that scale[0] belongs to
    for (int64_t column = 0; column < w.k; column += kColumns) {
        const int64_t byte = column / 2, left = w.row_bytes - byte;
        const __mmask64 bytes = left >= 64 ? ~0ull : (1ull << left) - 1;
        __m512i codes[16];
        for (int r = 0; r < 16; ++r) {
            const uint8_t* const at = w.codes + std::min(first + r, w.n - 1) * w.row_bytes + byte;
            codes[r] = left >= 64 ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(bytes, at);
            _mm_prefetch(reinterpret_cast<const char*>(at) + 16 * w.row_bytes, _MM_HINT_T0);
        }
        nvfp4::transpose16(codes);  // codes[d]: eight columns of 16 rows
        for (int64_t begin = column; begin < std::min(column + kColumns, w.k); begin += segment) {
            const int64_t g = w.groups == 1 ? 0 : begin / group;
            if (held < 0 || g >= held + 16) {
                held = g;
                by_place(w, first, g, scale, [&](int64_t at, __mmask16 there) { return few::scales(w, at, there); });
                if (w.zeros)
                    by_place(w, first, g, shift, [&](int64_t at, __mmask16 there) {
                        const __m512 zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, w.zeros + at)));
                        return _mm512_sub_ps(zero, _mm512_set1_ps(few::Form<4>::kBase));
                    });
            }
            constexpr int C = M < 8 ? 2 : 1;  // sums of a row that do not wait for each other
            __m512 here[M * C];
            UNROLL for (int t = 0; t < M * C; ++t) here[t] = _mm512_setzero_ps();
            const int from = int(begin - column) / 8, count = int(std::min(segment, w.k - begin) + 7) / 8;
            for (int d = from; d < from + count; ++d) {
                const uint32_t* const at = x + (column / 2 + 4 * d) * M;
                UNROLL for (int i = 0; i < 4; ++i) {  // columns i and i + 4 of the eight
                    const __m512bh v = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes[d], 4 * i), table);
                    UNROLL for (int t = 0; t < M; ++t)
                        here[t + i % C * M] =
                            _mm512_dpbf16_ps(here[t + i % C * M], v, (__m512bh)_mm512_set1_epi32(int32_t(at[i * M + t])));
                }
            }
            if constexpr (C == 2)
                UNROLL for (int t = 0; t < M; ++t) here[t] = _mm512_add_ps(here[t], here[t + M]);
            const __m512 s = scale[g - held];
            UNROLL for (int t = 0; t < M; ++t) all[t] = _mm512_fmadd_ps(here[t], s, all[t]);
            if (w.zeros && begin == g * group) {
                const __m512 less = _mm512_mul_ps(shift[g - held], s);
                UNROLL for (int t = 0; t < M; ++t) all[t] = _mm512_fnmadd_ps(less, _mm512_set1_ps(sums[t * w.groups + g]), all[t]);
            }
        }
    }
    UNROLL for (int t = 0; t < M; ++t) total[t] = all[t];
}

// y [m, n] = x [m, k] W^T + bias in bf16, m of at most M.
template <int M>
void linear(const Weight& w, const uint16_t* x, int64_t m, const uint16_t* bias, uint16_t* out, int threads) {
    const int64_t whole = (w.k + kColumns - 1) / kColumns * kColumns, group = w.k / w.groups, blocks = (w.n + 15) / 16;
    thread_local std::vector<uint32_t> memory;
    thread_local std::vector<float> added;
    memory.resize(whole / 2 * M);
    added.assign(M * w.groups, 0.0f);
    uint32_t* const laid = memory.data();
    float* const sums = added.data();
    for (int64_t c = 0; c < whole; c += 8) {  // zero beyond k, and for rows that are not there
        const int64_t left = w.k - c;
        const __mmask8 there = left >= 8 ? 0xFF : left > 0 ? (__mmask8)((1u << left) - 1) : 0;
        for (int t = 0; t < M; t += 4) {
            __m128 pairs[4];  // of a row: columns i and i + 4
            UNROLL for (int j = 0; j < 4; ++j) {
                const __m128i v = t + j < m ? _mm_maskz_loadu_epi16(there, x + (t + j) * w.k + c) : _mm_setzero_si128();
                pairs[j] = _mm_castsi128_ps(_mm_unpacklo_epi16(v, _mm_unpackhi_epi64(v, v)));
            }
            _MM_TRANSPOSE4_PS(pairs[0], pairs[1], pairs[2], pairs[3]);
            UNROLL for (int i = 0; i < 4; ++i)
                _mm_storeu_ps(reinterpret_cast<float*>(laid + (c / 2 + i) * M + t), pairs[i]);
        }
    }
    if (w.zeros)
        for (int64_t t = 0; t < m; ++t)
            for (int64_t g = 0; g < w.groups; ++g) sums[t * w.groups + g] = few::sum(x + t * w.k + g * group, group);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
        __m512 total[M];
        const int64_t first = b * 16, rest = w.n - first;
        tile<M>(w, first, laid, sums, total);
        const __mmask16 there = rest >= 16 ? 0xFFFF : (__mmask16)((1u << rest) - 1);
        __m512 more = _mm512_setzero_ps();
        if (bias) more = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, bias + first)), 16));
        for (int64_t t = 0; t < m; ++t)
            _mm256_mask_storeu_epi16(out + t * w.n + first, there, (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(total[t], more)));
    }
}

}  // namespace lanes
#endif
