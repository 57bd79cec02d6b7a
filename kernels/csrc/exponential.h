// e^x of one number without a call, so that loops over it become vectors; varlen.h has it for vectors.
#pragma once

#include "half.h"

namespace {

// e^x for -87 <= x <= 88, to 2 ulp (Cephes' polynomial); NaN stays.
inline float exp_within(float x) {
  const float whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
  const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * rest + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * rest * rest + rest + 1.0f;
  return p * as_float(uint32_t(int32_t(whole) + 127) << 23);
}

}  // namespace
