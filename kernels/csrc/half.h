// Reading float, bfloat16 and float16 as float, with or without F16C.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline float widen(float value) { return value; }

inline float widen(BFloat value) { return as_float(uint32_t(value.bits) << 16); }

inline float widen(Half value) {
#ifdef __F16C__
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
  if (magnitude < 0x400) {  // zero and subnormals: multiples of 2^-24
    const float size = float(magnitude) * 5.9604644775390625e-8f;
    return sign ? -size : size;
  }
  const bool special = magnitude >= 0x7c00;  // inf and NaN
  return as_float(sign | (special ? 0x7f800000 | (magnitude & 0x3ff) << 13 : (magnitude << 13) + (112u << 23)));
#endif
}
