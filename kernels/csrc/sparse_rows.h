// Rows of fp32, bf16, int8 or 4-bit weights, read a vector at a time and widened to fp32.
#pragma once

#include <type_traits>

#include "simd.h"

namespace {

// A place in a row of weights, counted in columns.
template <class W>
struct Row {
    const W* place;
    static constexpr int BITS = 8 * sizeof(W);
    INLINE Row operator+(int64_t columns) const { return {place + columns}; }
    INLINE vf wide() const { return widen(place); }
    INLINE float at(int64_t column) const { return one(place[column]); }
    INLINE const char* bytes() const { return reinterpret_cast<const char*>(place); }
};

// Half types come 2 * V columns at a time, those at even places and then those at odd ones: a shift and a mask widen
// them where a conversion in order would move them across the register as well. `down` puts them back in order.
template <class W>
constexpr bool SPLIT = std::is_same<W, bf16>::value && V == 16;
#if defined(__AVX512F__)
INLINE void wide_pair(Row<bf16> row, vf* even, vf* odd) {
    const __m512i both = _mm512_loadu_si512(row.place);
    *even = (vf)_mm512_slli_epi32(both, 16);
    *odd = (vf)_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000)));
}
// 32 columns out of their split sums, rounded as `put` does.
INLINE __m512i rounded(vf sum) {
    const __m512i u = (__m512i)sum, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)sum, (__m512)sum, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(nearest, nan, u, _mm512_set1_epi32(0x400000));
}
INLINE void put_pair(bf16* out, const float* sums, const bf16* bias) {
    vf even = widen(sums), odd = widen(sums + V), e, o;
    if (bias) {
        wide_pair(Row<bf16>{bias}, &e, &o);
        even += e, odd += o;
    }
    const __m512i high = _mm512_and_si512(rounded(odd), _mm512_set1_epi32(int(0xffff0000)));
    _mm512_storeu_si512(out, _mm512_or_si512(_mm512_srli_epi32(rounded(even), 16), high));
}
#endif
// C * V columns of a row.
template <int C, class W>
INLINE void wide(Row<W> row, vf* out) {
#if defined(__AVX512F__)
    if constexpr (SPLIT<W> && C % 2 == 0) {
        UNROLL for (int c = 0; c < C; c += 2) wide_pair(row + c * V, out + c, out + c + 1);
        return;
    }
#endif
    UNROLL for (int c = 0; c < C; ++c) out[c] = (row + c * V).wide();
}

// Two columns a byte, the first in the low half, each the code less 8. Only even numbers of columns are added.
struct i4 {
    uint8_t pair;
};
template <>
struct Row<i4> {
    const i4* place;
    static constexpr int BITS = 4;
    INLINE Row operator+(int64_t columns) const { return {place + columns / 2}; }
    INLINE float at(int64_t column) const { return float((place[column / 2].pair >> (column % 2 * 4)) & 15) - 8; }
    INLINE const char* bytes() const { return reinterpret_cast<const char*>(place); }
    INLINE vf wide() const {
#if defined(__AVX512F__)
        const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(place)), low = _mm_set1_epi8(15);
        const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
        return (vf)_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(codes), _mm512_set1_epi32(8)));
#else
        vf v;
        for (int i = 0; i < V; ++i) v[i] = at(i);
        return v;
#endif
    }
};

}  // namespace
