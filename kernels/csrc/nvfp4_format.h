// The NVFP4 format, shared by its C++ kernels.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define NVFP4_SIMD 1
#include <immintrin.h>
#else
#define NVFP4_SIMD 0
#endif

namespace nvfp4 {

constexpr int kBlock = 16;

// E2M1: sign, two exponent bits, one mantissa bit.
inline constexpr float kValue[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};

inline float e4m3(uint8_t b) {
  const int exponent = (b >> 3) & 15, mantissa = b & 7;
  if ((b & 0x7F) == 0x7F) return NAN;
  const float v = exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
  return b & 0x80 ? -v : v;
}

}  // namespace nvfp4
