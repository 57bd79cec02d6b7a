// Magnitude and cosine of a block's update, token by token: x.x, f.f and x.f in one reading of both.
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(BFloat value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline float widen(Half value) {
#ifdef __F16C__
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
  float result;
  if (magnitude < 0x400) {  // zero and subnormals: multiples of 2^-24
    result = float(magnitude) * 5.9604644775390625e-8f;
  } else {
    const uint32_t exponent = magnitude >= 0x7c00 ? 0x7f800000 | (magnitude & 0x3ff) << 13
                                                  : (magnitude << 13) + (112u << 23);
    std::memcpy(&result, &exponent, sizeof result);
  }
  uint32_t bits;
  std::memcpy(&bits, &result, sizeof bits);
  bits |= sign;
  std::memcpy(&result, &bits, sizeof result);
  return result;
#endif
}

constexpr int LANES = 16;  // partial sums, so that the loop vectorises without reordering by the compiler

template <typename T>
void transition(const T* x, const T* fx, float* magnitude, float* cosine, int64_t tokens, int64_t width,
                int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) {
    const T *a = x + t * width, *b = fx + t * width;
    float xx[LANES] = {}, ff[LANES] = {}, xf[LANES] = {};
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES)
      for (int l = 0; l < LANES; ++l) {
        const float u = widen(a[c + l]), v = widen(b[c + l]);
        xx[l] += u * u, ff[l] += v * v, xf[l] += u * v;
      }
    double sxx = 0, sff = 0, sxf = 0;
    for (int l = 0; l < LANES; ++l) sxx += xx[l], sff += ff[l], sxf += xf[l];
    for (; c < width; ++c) {
      const double u = widen(a[c]), v = widen(b[c]);
      sxx += u * u, sff += v * v, sxf += u * v;
    }
    const double size = std::sqrt(sxx), change = std::sqrt(sff), product = size * change;
    const double tiny = 1e-12;
    magnitude[t] = float(change / (size > tiny ? size : tiny));
    cosine[t] = float(sxf / (product > tiny ? product : tiny));
  }
}

}  // namespace

// kind: 0 float, 1 bfloat16, 2 float16. x, fx: [tokens, width], contiguous.
extern "C" void token_transition(const void* x, const void* fx, float* magnitude, float* cosine,
                                 int64_t tokens, int64_t width, int kind, int threads) {
  switch (kind) {
    case 0:
      return transition((const float*)x, (const float*)fx, magnitude, cosine, tokens, width, threads);
    case 1:
      return transition((const BFloat*)x, (const BFloat*)fx, magnitude, cosine, tokens, width, threads);
    case 2:
      return transition((const Half*)x, (const Half*)fx, magnitude, cosine, tokens, width, threads);
  }
}
