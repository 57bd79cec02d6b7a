// The NVFP4 format, shared by its C++ kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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

enum Type { kFloat32, kBFloat16, kFloat16 };

inline float bits_to_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline uint32_t float_to_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline float fp16_to_float(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const float v = exponent == 31 ? (mantissa ? NAN : INFINITY)
                  : exponent     ? std::ldexp(1024.f + mantissa, exponent - 25)
                                 : std::ldexp(float(mantissa), -24);
  return h & 0x8000 ? -v : v;
}

// To nearest, ties to even.
inline uint16_t float_to_fp16(float v) {
  const uint32_t bits = float_to_bits(v), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000) return uint16_t(sign | uint32_t(std::nearbyint(std::fabs(v) * 0x1p24f)));
  return uint16_t(sign | ((magnitude + 0xFFF + ((magnitude >> 13) & 1) - 0x38000000) >> 13));
}

inline uint16_t float_to_bf16(float v) {
  const uint32_t bits = float_to_bits(v);
  if (v != v) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float load(const void* p, int64_t i, Type type) {
  if (type == kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t half = static_cast<const uint16_t*>(p)[i];
  return type == kBFloat16 ? bits_to_float(uint32_t(half) << 16) : fp16_to_float(half);
}

inline void store(void* p, int64_t i, Type type, float v) {
  if (type == kFloat32)
    static_cast<float*>(p)[i] = v;
  else
    static_cast<uint16_t*>(p)[i] = type == kBFloat16 ? float_to_bf16(v) : float_to_fp16(v);
}

}  // namespace nvfp4
