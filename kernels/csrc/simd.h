// One vector type for kernels that read fp32, bf16 or int8 and compute in fp32, on any CPU.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"                // all users are inlined: no ABI is involved
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own AVX-512 header
#endif

namespace {

#if defined(__AVX512F__)
constexpr int V = 16;
#else
constexpr int V = 8;  // compilers split it where registers are narrower
#endif

typedef float vf __attribute__((vector_size(V * 4)));
typedef int32_t vi __attribute__((vector_size(V * 4)));
typedef uint32_t vu __attribute__((vector_size(V * 4)));
typedef uint16_t vh __attribute__((vector_size(V * 2)));
typedef int8_t vb __attribute__((vector_size(V)));
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#if defined(__AVX2__)
#define IN_REGISTER(v) asm("" : "+v"(v))  // load once, rather than again for each use
#else
#define IN_REGISTER(v)
#endif

struct bf16 {
    uint16_t bits;
};

template <class To, class From>
INLINE To bits(From from) {
    To to;
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
    std::memcpy(&to, &from, sizeof to);
    return to;
}

INLINE vf widen(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
// The intrinsics are what compilers should make of the plain form after them, and do not.
INLINE vf widen(const bf16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    vh h;
    std::memcpy(&h, p, sizeof h);
    return bits<vf>(__builtin_convertvector(h, vu) << 16);
#endif
}
INLINE vf widen(const int8_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    vb b;
    std::memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
#endif
}
INLINE float one(float x) { return x; }
INLINE float one(bf16 x) { return bits<float>(uint32_t(x.bits) << 16); }
INLINE float one(int8_t x) { return x; }

// a * w + sum with one rounding where the CPU can, in every place alike: left to the compiler, it
// would fuse some and not others, and the same neuron would add different bits in different loops.
INLINE float multiply_add(float a, float w, float sum) {
#if defined(__FMA__)
    return __builtin_fmaf(a, w, sum);
#else
    return a * w + sum;
#endif
}
INLINE vf multiply_add(vf a, vf w, vf sum) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)w, (__m512)sum);
#elif defined(__FMA__) && defined(__AVX2__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)w, (__m256)sum);
#else
    return a * w + sum;
#endif
}
INLINE vf all(float x) { return x - vf{}; }

INLINE void put(float* p, float x) { *p = x; }
INLINE void put(bf16* p, float x) {
    uint32_t u = bits<uint32_t>(x);
    // Round to nearest even; a NaN keeps its sign and stays a NaN.
    p->bits = x != x ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

}  // namespace
