// Activations of one row, laid out for the paths of nvfp4_linear.cpp.
//
// A group is 8 blocks of 16. In a group's vectors each 32-bit lane is one block, in the order that the
// weights' dword shuffles leave them in.
#pragma once

#include "nvfp4_format.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace nvfp4 {

constexpr int kLanes = 8, kGroup = 128;
constexpr int kBlockOfLane[kLanes] = {0, 1, 4, 5, 2, 3, 6, 7};

struct Exact {
  std::vector<float> x;  // [group][element 0..15][lane]
};
struct Rounded {
  int planes;
  std::vector<int8_t> x;    // [group][plane][vector 0..3][lane][4]
  std::vector<int32_t> off;  // [group][plane][lane]: 12 * sum of the block's bytes
  std::vector<float> scale;  // [group][lane]; half the step, for the doubled codes
  bool finite;
};

inline void lay_out(const float* x, int64_t k, int64_t groups, Exact& out) {
  out.x.assign(groups * kGroup, 0.f);
  for (int64_t g = 0; g < groups; g++)
    for (int lane = 0; lane < kLanes; lane++)
      for (int e = 0; e < 16; e++) {
        const int64_t at = g * kGroup + kBlockOfLane[lane] * 16 + e;
        if (at < k) out.x[(g * 16 + e) * kLanes + lane] = x[at];
      }
}

// Element e of a block sits in vector (e / 8) * 2 + e % 2 (low or high nibbles), byte (e % 8) / 2.
inline void lay_out(const float* x, int64_t k, int64_t groups, Rounded& out) {
  const int planes = out.planes;
  const float limit = planes == 1 ? 127.f : 32639.f;  // 127 * 256 + 127: both halves fit a signed byte
  out.x.assign(groups * planes * kGroup, 0);
  out.off.assign(groups * planes * kLanes, 0);
  out.scale.assign(groups * kLanes, 0.f);
  out.finite = true;
  for (int64_t g = 0; g < groups; g++)
    for (int lane = 0; lane < kLanes; lane++) {
      const int64_t at = g * kGroup + kBlockOfLane[lane] * 16;
      const int count = int(std::min<int64_t>(16, std::max<int64_t>(0, k - at)));
      float amax = 0;
      for (int e = 0; e < count; e++) {
        if (!std::isfinite(x[at + e])) out.finite = false;
        amax = std::max(amax, std::fabs(x[at + e]));
      }
      if (amax == 0 || !out.finite) continue;
      const float inverse = std::min(limit / amax, 3.4028235e38f);
      out.scale[g * kLanes + lane] = amax / limit * 0.5f;
      for (int e = 0; e < count; e++) {
        const int q = int(std::nearbyint(x[at + e] * inverse));
        const int high = planes == 1 ? q : (q + 128) >> 8, halves[2] = {high, q - 256 * high};
        for (int p = 0; p < planes; p++) {
          const int64_t plane = g * planes + p;
          out.x[plane * kGroup + ((e / 8) * 2 + e % 2) * 32 + lane * 4 + (e % 8) / 2] = int8_t(halves[p]);
          out.off[plane * kLanes + lane] += 12 * halves[p];
        }
      }
    }
}

// One output from the definition: for rows whose scales need care (NaN, a sign bit).
inline float careful(const uint8_t* codes, const uint8_t* scales, int64_t blocks, const float* x) {
  double sum = 0;
  for (int64_t b = 0; b < blocks; b++) {
    float part = 0;
    for (int e = 0; e < 16; e++)
      part += kValue[(codes[b * 8 + e / 2] >> (e % 2 * 4)) & 15] * x[b * 16 + e];
    sum += double(part) * e4m3(scales[b]);
  }
  return float(sum);
}

}  // namespace nvfp4
