// Quantizing to NVFP4 and back: one pass for the tensor's maximum, one that scales, rounds and packs a
// block of 16 while it is in registers. The fp32 operations are those of the named mode, in its order,
// so the bytes equal what kernels/nvfp4/quantize.py computes.
#include "nvfp4_format.h"

#include <algorithm>
#include <cfloat>
#include <cstring>

namespace {

using namespace nvfp4;

enum Mode { kThresher, kTe, kTorchao, kModelopt, kCompressedTensors };

// fp32 in [0, 448] to E4M3, to nearest even.
uint8_t to_e4m3(float v) {
  if (v < 0x1p-6f) return uint8_t(std::nearbyint(v * 512.f));  // subnormals; 8 is the first normal code
  uint32_t bits = float_to_bits(v);
  bits += 0x7FFFF + ((bits >> 20) & 1);
  return uint8_t((bits >> 20) - (120 << 3));
}

float clamp_scale(float v, float least) { return std::min(std::max(v, least), 448.f); }

template <Mode mode, Type type>
uint8_t block_scale(float amax, float g) {
  switch (mode) {
    case kThresher:  // 1.f / 6.f is rounded first, as in the Python arithmetic
      return amax > 0 ? to_e4m3(clamp_scale(amax * (g * (1.f / 6.f)), 0x1p-9f)) : to_e4m3(1.f);
    case kTe:
      return to_e4m3(clamp_scale(amax * (g * (1.f / 6.f)), 0.f));
    case kTorchao:
      return to_e4m3(clamp_scale(amax / 6.f / g, 0x1p-6f));
    case kModelopt: {
      const float scale = amax / (6.f * g);
      return to_e4m3(clamp_scale(scale == 0 ? 1.f : scale, 0x1p-9f));
    }
    default: {
      const float sixth = type == kBFloat16  ? bits_to_float(uint32_t(float_to_bf16(amax / 6.f)) << 16)
                          : type == kFloat16 ? fp16_to_float(float_to_fp16(amax / 6.f))
                                             : amax / 6.f;
      const uint8_t code = to_e4m3(clamp_scale(g * sixth, 0.f));
      return code ? code : to_e4m3(0.125f);
    }
  }
}

// What elements are multiplied by; modelopt and compressed-tensors divide by it instead.
template <Mode mode>
float factor(float s, float g) {
  switch (mode) {
    case kThresher:
    case kTe:
      return std::min(1.f / (s * (1.f / g)), FLT_MAX);
    case kTorchao:
      return 1.f / g / s;
    case kModelopt:
      return s * g;
    default:
      return s / g;
  }
}

template <Type type>
void load_block(const void* x, int64_t at, int count, float* out) {
  if (type == kFloat32) {
    std::memcpy(out, static_cast<const float*>(x) + at, count * sizeof(float));
  } else {
#if NVFP4_SIMD
    if (count == kBlock) {
      const uint16_t* halves = static_cast<const uint16_t*>(x) + at;
      for (int h = 0; h < kBlock; h += 8) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + h));
        const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16);
        _mm256_storeu_ps(out + h, type == kBFloat16 ? _mm256_castsi256_ps(wide) : _mm256_cvtph_ps(eight));
      }
      return;
    }
#endif
    for (int i = 0; i < count; i++) out[i] = load(x, at + i, type);
  }
  std::fill(out + count, out + kBlock, 0.f);
}

#if NVFP4_SIMD
// Eight magnitudes to E2M1 codes: the least of the roundings to the three lines the values lie on.
// NaN (zero times an infinite factor) stays NaN through the minimum and becomes negative, then 0 in `encode`.
__m256i round_e2m1(__m256 v) {
  const __m256 a = _mm256_min_ps(_mm256_set1_ps(6.f), _mm256_andnot_ps(_mm256_set1_ps(-0.f), v));
  const __m256i by_half = _mm256_cvtps_epi32(_mm256_add_ps(a, a));
  const __m256i by_one = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(2));
  const __m256i by_two =
      _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(a, _mm256_set1_ps(.5f))), _mm256_set1_epi32(4));
  return _mm256_min_epi32(_mm256_min_epi32(by_half, by_one), by_two);
}
#endif

// The 16 codes of a block, packed.
template <Mode mode>
void encode(const float* x, float f, uint8_t* out) {
  constexpr bool divides = mode == kModelopt || mode == kCompressedTensors, keep_negative_zero = mode == kTorchao;
#if NVFP4_SIMD
  __m256i halves[2];
  for (int h = 0; h < 2; h++) {
    const __m256 v = _mm256_loadu_ps(x + 8 * h), by = _mm256_set1_ps(f);
    const __m256 scaled = divides ? _mm256_div_ps(v, by) : _mm256_mul_ps(v, by);
    __m256i sign = _mm256_castps_si256(scaled);
    if (!keep_negative_zero)
      sign = _mm256_castps_si256(_mm256_cmp_ps(scaled, _mm256_setzero_ps(), _CMP_LT_OQ));
    const __m256i eight = _mm256_slli_epi32(_mm256_srli_epi32(sign, 31), 3);
    halves[h] = _mm256_or_si256(round_e2m1(scaled), eight);
  }
  // Dwords to bytes, then pairs of nibbles to one byte: low + 16 * high.
  __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(halves[0], halves[1]), _mm256_setzero_si256());
  bytes = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x1001));  // 0 3 | 8 11 || 4 7 | 12 15
  bytes = _mm256_packus_epi16(bytes, bytes);
  const uint32_t low = uint32_t(_mm256_extract_epi32(bytes, 0)), high = uint32_t(_mm256_extract_epi32(bytes, 4));
  const uint64_t packed = (low & 0xFFFFull) | (high & 0xFFFFull) << 16 | (low & 0xFFFF0000ull) << 16 |
                          (high & 0xFFFF0000ull) << 32;
  std::memcpy(out, &packed, 8);
#else
  for (int i = 0; i < 8; i++) {
    uint8_t pair = 0;
    for (int h = 0; h < 2; h++) {
      float v = divides ? x[2 * i + h] / f : x[2 * i + h] * f;
      if (std::isnan(v)) v = 0;  // zero times an infinite factor
      const float a = std::min(std::fabs(v), 6.f);
      const int code = std::min({int(std::nearbyint(2 * a)), int(std::nearbyint(a)) + 2,
                                 int(std::nearbyint(a / 2)) + 4});
      const bool negative = keep_negative_zero ? std::signbit(v) : v < 0;
      pair |= uint8_t(code | (negative ? 8 : 0)) << (4 * h);
    }
    out[i] = pair;
  }
#endif
}

float largest_of(const float* x) {
#if NVFP4_SIMD
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  const __m256 m = _mm256_max_ps(_mm256_and_ps(_mm256_loadu_ps(x), magnitude),
                                 _mm256_and_ps(_mm256_loadu_ps(x + 8), magnitude));
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
#else
  float largest = 0;
  for (int i = 0; i < kBlock; i++) largest = std::max(largest, std::fabs(x[i]));
  return largest;
#endif
}

// Bits of a magnitude order like the magnitude, and those of infinity and NaN above every finite value.
template <class Bits>
Bits largest_bits(const void* x, int64_t count, Bits magnitude, int threads) {
  constexpr int64_t kStep = 1 << 14;
  const Bits* values = static_cast<const Bits*>(x);
  Bits largest = 0;
#pragma omp parallel for reduction(max : largest) num_threads(threads) if (threads > 1)
  for (int64_t from = 0; from < count; from += kStep) {
    Bits lanes[32] = {};  // independent maxima, which the compiler keeps in vector registers
    const int64_t to = std::min(count, from + kStep), whole = from + (to - from) / 32 * 32;
    for (int64_t i = from; i < whole; i += 32)
      for (int j = 0; j < 32; j++) lanes[j] = std::max<Bits>(lanes[j], values[i + j] & magnitude);
    for (int64_t i = whole; i < to; i++) lanes[0] = std::max<Bits>(lanes[0], values[i] & magnitude);
    largest = std::max(largest, *std::max_element(lanes, lanes + 32));
  }
  return largest;
}

struct Job {
  const void* x;
  int64_t rows, k;
  float g;
  uint8_t *codes, *scales;
  int threads;
};

template <Mode mode, Type type>
void quantize(const Job& job) {
  const int64_t k = job.k, blocks = (k + kBlock - 1) / kBlock;
  float table[256], factors[256];
  for (int b = 0; b < 256; b++) {
    table[b] = e4m3(uint8_t(b));
    factors[b] = factor<mode>(table[b], job.g);
  }
#pragma omp parallel for schedule(static) num_threads(job.threads) if (job.threads > 1)
  for (int64_t r = 0; r < job.rows; r++)
    for (int64_t b = 0; b < blocks; b++) {
      float values[kBlock];
      load_block<type>(job.x, r * k + b * kBlock, int(std::min<int64_t>(kBlock, k - b * kBlock)), values);
      const uint8_t scale = block_scale<mode, type>(largest_of(values), job.g);
      job.scales[r * blocks + b] = scale;
      encode<mode>(values, factors[scale], job.codes + (r * blocks + b) * 8);
    }
}

template <Mode mode>
void quantize_type(const Job& job, int type) {
  if (type == kFloat32) quantize<mode, kFloat32>(job);
  if (type == kBFloat16) quantize<mode, kBFloat16>(job);
  if (type == kFloat16) quantize<mode, kFloat16>(job);
}

}  // namespace

extern "C" {

// Largest magnitude of `count` values. Infinite or NaN when one of them is.
float nvfp4_amax(const void* x, int64_t count, int type, int threads) {
  uint32_t bits = type == kFloat32 ? largest_bits<uint32_t>(x, count, 0x7FFFFFFFu, threads)
                                   : largest_bits<uint16_t>(x, count, 0x7FFFu, threads);
  if (type == kFloat16) return fp16_to_float(uint16_t(bits));
  return bits_to_float(type == kBFloat16 ? bits << 16 : bits);
}

// x [rows, k] finite, g the mode's tensor scale; codes [rows, 8 * blocks], scales [rows, blocks].
void nvfp4_quantize(const void* x, int64_t rows, int64_t k, float g, int mode, int type, uint8_t* codes,
                    uint8_t* scales, int threads) {
  const Job job{x, rows, k, g, codes, scales, threads};
  if (mode == kThresher) quantize_type<kThresher>(job, type);
  if (mode == kTe) quantize_type<kTe>(job, type);
  if (mode == kTorchao) quantize_type<kTorchao>(job, type);
  if (mode == kModelopt) quantize_type<kModelopt>(job, type);
  if (mode == kCompressedTensors) quantize_type<kCompressedTensors>(job, type);
}

// x [rows, k] finite, rounded to NVFP4 and back in mode kThresher with tensor scale g and its reciprocal `back`.
// tiled: one scale for each 16 x 16 tile. seed: 0 rounds to nearest; otherwise stochastically, with a
// generator that depends on the seed and the place alone.
void nvfp4_round(const float* x, int64_t rows, int64_t k, float g, float back, int tiled, uint64_t seed, float* out,
                 int threads) {
  const int64_t blocks = (k + kBlock - 1) / kBlock, height = tiled ? kBlock : 1;
  float factors[256], decoded[256];
  for (int b = 0; b < 0x7F; b++) {
    factors[b] = factor<kThresher>(e4m3(uint8_t(b)), g);
    decoded[b] = e4m3(uint8_t(b)) * back;
  }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t top = 0; top < rows; top += height)
    for (int64_t b = 0; b < blocks; b++) {
      const int count = int(std::min<int64_t>(kBlock, k - b * kBlock)), tall = int(std::min(height, rows - top));
      float values[kBlock][kBlock], largest = 0;
      for (int i = 0; i < tall; i++) {
        load_block<kFloat32>(x, (top + i) * k + b * kBlock, count, values[i]);
        largest = std::max(largest, largest_of(values[i]));
      }
      const uint8_t scale = block_scale<kThresher, kFloat32>(largest, g);
      for (int i = 0; i < tall; i++) {
        float* v = values[i];
        float noise[kBlock];
        uint32_t bits[kBlock];
        if (seed) {
          const uint64_t start = seed + uint64_t((top + i) * blocks + b) * 8 * 0x9E3779B97F4A7C15ull;
          for (int e = 0; e < 8; e++) {  // splitmix64, half a word an element
            uint64_t z = start + uint64_t(e + 1) * 0x9E3779B97F4A7C15ull;
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
            z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
            z ^= z >> 31;
            bits[2 * e] = uint32_t(z), bits[2 * e + 1] = uint32_t(z >> 32);
          }
          for (int e = 0; e < kBlock; e++) noise[e] = float(int32_t(bits[e] >> 8)) * 0x1p-24f;
        }
        float step[kBlock], steps[kBlock];
        for (int e = 0; e < kBlock; e++) {
          const float scaled = std::min(std::max(v[e] * factors[scale], -6.f), 6.f), size = std::fabs(scaled);
          step[e] = size < 2 ? .5f : size < 4 ? 1.f : 2.f;
          steps[e] = scaled * (size < 2 ? 2.f : size < 4 ? 1.f : .5f);  // exact; `nearbyint` ties to the even code
        }
        if (seed)
          for (int e = 0; e < kBlock; e++) steps[e] = std::floor(steps[e] + noise[e]);
        else
          for (int e = 0; e < kBlock; e++) steps[e] = std::nearbyint(steps[e]);
        for (int e = 0; e < kBlock; e++) v[e] = steps[e] * step[e] * decoded[scale];
        std::memcpy(out + (top + i) * k + b * kBlock, v, size_t(count) * sizeof(float));
      }
    }
}

// out[r, k] = code * scale as fp32 (exact), for `rows` rows.
void nvfp4_dequantize(const uint8_t* codes, const uint8_t* scales, float* out, int64_t rows, int64_t blocks,
                      int threads) {
  float table[256];
  for (int b = 0; b < 256; b++) table[b] = e4m3(uint8_t(b));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < rows * blocks; b++) {
    const float scale = table[scales[b]];
    float* to = out + b * 16;
#if NVFP4_SIMD
    const __m256 values = _mm256_loadu_ps(kValue);
    uint64_t bits;
    std::memcpy(&bits, codes + b * 8, 8);
    for (int half = 0; half < 2; half++, bits >>= 32) {
      const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(int(uint32_t(bits))),
                                                _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
      const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(nibbles, 3), 31);
      const __m256 v = _mm256_xor_ps(_mm256_permutevar8x32_ps(values, nibbles), _mm256_castsi256_ps(sign));
      _mm256_storeu_ps(to + half * 8, _mm256_mul_ps(v, _mm256_set1_ps(scale)));
    }
#else
    for (int e = 0; e < 16; e++) to[e] = kValue[(codes[b * 8 + e / 2] >> (e % 2 * 4)) & 15] * scale;
#endif
  }
}
}  // extern "C"
