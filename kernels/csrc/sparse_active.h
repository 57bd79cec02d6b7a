// Which neurons are on: those that some token of a call keeps, found in one reading of the activations.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace {

constexpr int64_t SLACK = 16;  // what `scan` may write beyond the last index

template <class A>
INLINE bool keeps(A a, float threshold) {
    return !(std::fabs(one(a)) <= threshold);  // so written, a NaN is kept
}

// The neurons that some token keeps, ascending, and a coefficient for each and every token.
struct Active {
    const int32_t* index;
    const float* value;  // [count][tokens]
    int64_t count;
};

// Fills `index` and `value` (0 where a token does not keep a neuron that another does) and returns
// the count; stops past `limit` neurons and returns -1.
template <class A>
int64_t scan(const A* act, int64_t tokens, int64_t F, const float* threshold, bool each, int64_t limit,
             int32_t* index, float* value) {
    int64_t count = 0, from = 0;
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 limits = _mm512_set1_ps(*threshold);
    for (; from + V <= F; from += V) {
        if (each) limits = _mm512_loadu_ps(threshold + from);
        __mmask16 on = 0;
        for (int64_t t = 0; t < tokens; ++t)  // not less or equal, or unordered: so a NaN is kept
            on |= _mm512_cmp_ps_mask(_mm512_abs_ps((__m512)widen(act + t * F + from)), limits, _CMP_NLE_UQ);
        const __m512i neurons = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(from)));
        _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(on, neurons));
        count += __builtin_popcount(on);
        if (count > limit) return -1;
    }
#endif
    constexpr int64_t SOME = 256;
    uint8_t keep[SOME];
    for (int64_t first = from; first < F; first += SOME) {
        const int64_t size = std::min(SOME, F - first);
        std::memset(keep, 0, sizeof keep);
        for (int64_t t = 0; t < tokens; ++t) {
            const A* a = act + t * F + first;
            if (each)
                for (int64_t i = 0; i < size; ++i) keep[i] |= keeps(a[i], threshold[first + i]);
            else
                for (int64_t i = 0; i < size; ++i) keep[i] |= keeps(a[i], *threshold);
        }
        for (int64_t group = 0; group < size; group += 8) {
            uint64_t any;
            std::memcpy(&any, keep + group, sizeof any);
            if (!any) continue;
            for (int64_t i = group; i < group + 8; ++i) {
                index[count] = int32_t(first + i);
                count += keep[i];
            }
        }
        if (count > limit) return -1;
    }
    for (int64_t n = 0; n < count; ++n)
        for (int64_t t = 0; t < tokens; ++t) {
            const A a = act[t * F + index[n]];
            value[n * tokens + t] = keeps(a, threshold[each ? index[n] : 0]) ? one(a) : 0.0f;
        }
    return count;
}

}  // namespace
