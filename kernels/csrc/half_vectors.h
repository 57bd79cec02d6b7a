// float16 for kernels that compute in vectors of fp32.
#pragma once

#include "half.h"
#include "simd.h"

namespace {

INLINE float one(Half x) { return widen(x); }
INLINE vf widen(const Half* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vf v;
    for (int lane = 0; lane < V; ++lane) v[lane] = widen(p[lane]);
    return v;
#endif
}
INLINE void put(Half* p, float x) {
#ifdef __F16C__
    p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    const _Float16 half = static_cast<_Float16>(x);
    std::memcpy(p, &half, sizeof half);
#endif
}

}  // namespace
