// Magnitude and cosine of a block's update, token by token: x.x, f.f and x.f in one reading of both.
#include <cmath>
#include <cstdint>

#include "half.h"

namespace {

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
