// y[m, n] = alpha * sum_k x[m, k] * code[n, k] * scale[n, k / 16] + bias[n], on weights in the
// interchange layout: codes uint8 [n, 8 * blocks] (even k in the low nibble), scales E4M3 [n, blocks].
//
// The unit of work is a group: 8 blocks of 16, so 128 weights in 64 bytes and 8 scales. Two dword
// shuffles turn the 64 bytes into two vectors whose 32-bit lane is a block, which makes the block
// scale one vector multiply for 128 weights and needs no repacked copy of the weights. Blocks then
// stand in the lane order 0 1 4 5 2 3 6 7; activations are laid out once a call to match.
//
// Two paths: fp32 activations, and activations rounded to signed bytes with one scale a block. The
// latter takes one plane of bytes (int8) or two (int16 = 256 * high + low), each a u8 x s8 dot product
// with 2 * E2M1 + 12, which is unsigned; 12 * sum(x) is taken off again.
#include "nvfp4_activations.h"
#include "nvfp4_format.h"

#include <cstring>

namespace {

using namespace nvfp4;

#if NVFP4_SIMD

__m256i shuffled_pair(const uint8_t* codes, int which) {
  const __m256 a = _mm256_loadu_ps(reinterpret_cast<const float*>(codes));
  const __m256 b = _mm256_loadu_ps(reinterpret_cast<const float*>(codes + 32));
  return _mm256_castps_si256(which ? _mm256_shuffle_ps(a, b, 0xDD) : _mm256_shuffle_ps(a, b, 0x88));
}

// Eight E4M3 bytes to fp32 * 2^-8, in lane order: the byte shifted to bits 14..7 is that fp16.
__m256 lane_scales(__m128i bytes) {
  const __m128i order = _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 2, -1, 3, -1, 6, -1, 7, -1);
  return _mm256_cvtph_ps(_mm_slli_epi16(_mm_shuffle_epi8(bytes, order), 7));
}

float sum_of(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

__m256i both(__m128i v) { return _mm256_broadcastsi128_si256(v); }

// One weight row against MB exact activation rows.
template <int MB>
struct ExactRow {
  const float* const* x;
  __m256 acc[MB];

  void start() {
    for (auto& a : acc) a = _mm256_setzero_ps();
  }

  // The two bytes of each value's bf16 pattern come from two byte tables. Interleaved they make two
  // bf16 a lane, which a mask and a shift widen to fp32; `spread` first brings each block's elements
  // into neighbouring byte pairs.
  void group(const uint8_t* codes, __m128i scale_bytes, int64_t g) {
    const __m256i high_table = both(_mm_setr_epi8(0, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, char(0x80),
                                                  char(0xBF), char(0xBF), char(0xBF), char(0xC0), char(0xC0),
                                                  char(0xC0), char(0xC0)));
    const __m256i low_table = both(_mm_setr_epi8(0, 0, char(0x80), char(0xC0), 0, 0x40, char(0x80), char(0xC0), 0,
                                                 0, char(0x80), char(0xC0), 0, 0x40, char(0x80), char(0xC0)));
    const __m256i spread = both(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    const __m256i nibble = _mm256_set1_epi8(15), upper = _mm256_set1_epi32(int(0xFFFF0000));
    const __m256 scale = lane_scales(scale_bytes);
    constexpr bool kFewRows = MB <= 2;  // too few chains of adds to hide their latency: split them by nibble
    __m256 part[2][MB];
    for (int m = 0; m < MB; m++) part[0][m] = part[1][m] = _mm256_setzero_ps();
    for (int half = 0; half < 2; half++) {
      const __m256i bytes = _mm256_shuffle_epi8(shuffled_pair(codes, half), spread);
      for (int odd = 0; odd < 2; odd++) {
        const __m256i index = _mm256_and_si256(odd ? _mm256_srli_epi16(bytes, 4) : bytes, nibble);
        const __m256i high = _mm256_shuffle_epi8(high_table, index), low = _mm256_shuffle_epi8(low_table, index);
        const __m256i words[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
        for (int j = 0; j < 4; j++) {
          const __m256i pair = words[j / 2];
          const __m256 w =
              _mm256_castsi256_ps(j % 2 ? _mm256_and_si256(pair, upper) : _mm256_slli_epi32(pair, 16));
          const int64_t at = (g * 16 + half * 8 + 2 * j + odd) * kLanes;
          // code * scale is exact in fp32, so scaling first loses nothing
          const __m256 scaled = kFewRows ? w : _mm256_mul_ps(w, scale);
          for (int m = 0; m < MB; m++) {
            __m256& sum = kFewRows ? part[odd][m] : acc[m];
            sum = _mm256_fmadd_ps(scaled, _mm256_loadu_ps(x[m] + at), sum);
          }
        }
      }
    }
    if (kFewRows)
      for (int m = 0; m < MB; m++)
        acc[m] = _mm256_fmadd_ps(_mm256_add_ps(part[0][m], part[1][m]), scale, acc[m]);
  }

  float finish(int m) const { return 256.f * sum_of(acc[m]); }
};

// acc + the dot products of four unsigned and four signed bytes in each 32-bit lane.
struct Dot {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  __m256i sum;
  explicit Dot(__m256i less) : sum(_mm256_sub_epi32(_mm256_setzero_si256(), less)) {}
  void add(__m256i u, __m256i s) { sum = _mm256_dpbusd_epi32(sum, u, s); }
  __m256i value() const { return sum; }
#else
  // Four products of at most 24 * 128 * 2 stay below 2^15, so one widening add serves four vectors.
  __m256i sum = _mm256_setzero_si256(), less;
  explicit Dot(__m256i less_) : less(less_) {}
  void add(__m256i u, __m256i s) { sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(u, s)); }
  __m256i value() const { return _mm256_sub_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), less); }
#endif
};

// One weight row against MB rounded activation rows of PLANES byte planes.
template <int PLANES, int MB>
struct RoundedRow {
  const Rounded* const* x;
  __m256 acc[MB];

  void start() {
    for (auto& a : acc) a = _mm256_setzero_ps();
  }

  void group(const uint8_t* codes, __m128i scale_bytes, int64_t g) {
    const __m256i table = both(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256 scale = lane_scales(scale_bytes);
    __m256i w[4];
    for (int half = 0; half < 2; half++) {
      const __m256i bytes = shuffled_pair(codes, half);
      w[half * 2] = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, nibble));
      w[half * 2 + 1] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble));
    }
    for (int m = 0; m < MB; m++) {
      __m256i total = _mm256_setzero_si256();
      for (int p = 0; p < PLANES; p++) {
        const int64_t plane = g * PLANES + p;
        const auto* bytes = reinterpret_cast<const __m256i*>(x[m]->x.data() + plane * kGroup);
        Dot dot(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[m]->off.data() + plane * kLanes)));
        for (int v = 0; v < 4; v++) dot.add(w[v], _mm256_loadu_si256(bytes + v));
        total = p + 1 < PLANES ? _mm256_slli_epi32(dot.value(), 8) : _mm256_add_epi32(total, dot.value());
      }
      const __m256 step = _mm256_mul_ps(scale, _mm256_loadu_ps(x[m]->scale.data() + g * kLanes));
      acc[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), step, acc[m]);
    }
  }

  float finish(int m) const { return 256.f * sum_of(acc[m]); }
};

// Runs one row through `path`; false when a scale is NaN or has its sign bit set.
template <class Path>
bool run_row(Path& path, const uint8_t* codes, const uint8_t* scales, int64_t blocks) {
  const int64_t whole = blocks / kLanes, rest = blocks % kLanes;
  __m128i largest = _mm_setzero_si128();
  path.start();
  for (int64_t g = 0; g < whole; g++) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + g * kLanes));
    largest = _mm_max_epu8(largest, bytes);
    // the hardware does not follow from one row into the next
    _mm_prefetch(reinterpret_cast<const char*>(codes + g * 64 + 4096), _MM_HINT_T0);
    if (g % 8 == 0) _mm_prefetch(reinterpret_cast<const char*>(scales + g * kLanes + 512), _MM_HINT_T0);
    path.group(codes + g * 64, bytes, g);
  }
  if (rest) {
    alignas(32) uint8_t tail[64] = {}, tail_scales[16] = {};
    std::memcpy(tail, codes + whole * 64, rest * 8);
    std::memcpy(tail_scales, scales + whole * kLanes, rest);
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(tail_scales));
    largest = _mm_max_epu8(largest, bytes);
    path.group(tail, bytes, whole);
  }
  alignas(16) uint8_t each[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(each), largest);
  return *std::max_element(each, each + kLanes) < 0x7F;
}

#else  // portable: the same sums, one lane at a time

template <int MB>
struct ExactRow {
  const float* const* x;
  float acc[MB];

  void start() { std::fill(acc, acc + MB, 0.f); }
  void group(const uint8_t* codes, const uint8_t* scales, int64_t g) {
    for (int lane = 0; lane < kLanes; lane++) {
      const uint8_t* block = codes + kBlockOfLane[lane] * 8;
      const float scale = e4m3(scales[kBlockOfLane[lane]]);
      for (int m = 0; m < MB; m++) {
        float part = 0;
        for (int e = 0; e < 16; e++)
          part += kValue[(block[e / 2] >> (e % 2 * 4)) & 15] * x[m][(g * 16 + e) * kLanes + lane];
        acc[m] += part * scale;
      }
    }
  }
  float finish(int m) const { return acc[m]; }
};

template <int PLANES, int MB>
struct RoundedRow {
  const Rounded* const* x;
  float acc[MB];

  void start() { std::fill(acc, acc + MB, 0.f); }
  void group(const uint8_t* codes, const uint8_t* scales, int64_t g) {
    for (int lane = 0; lane < kLanes; lane++) {
      const uint8_t* block = codes + kBlockOfLane[lane] * 8;
      const float scale = e4m3(scales[kBlockOfLane[lane]]);
      for (int m = 0; m < MB; m++) {
        int32_t total = 0;
        for (int p = 0; p < PLANES; p++) {
          const int8_t* bytes = x[m]->x.data() + (g * PLANES + p) * kGroup + lane * 4;
          int32_t dot = 0;
          for (int e = 0; e < 16; e++)
            dot += int(2 * kValue[(block[e / 2] >> (e % 2 * 4)) & 15]) *
                   bytes[((e / 8) * 2 + e % 2) * 32 + (e % 8) / 2];
          total = total * 256 + dot;
        }
        acc[m] += float(total) * (scale * x[m]->scale[g * kLanes + lane]);
      }
    }
  }
  float finish(int m) const { return acc[m]; }
};

template <class Path>
bool run_row(Path& path, const uint8_t* codes, const uint8_t* scales, int64_t blocks) {
  const int64_t whole = blocks / kLanes, rest = blocks % kLanes;
  path.start();
  for (int64_t g = 0; g < whole; g++) path.group(codes + g * 64, scales + g * kLanes, g);
  if (rest) {
    uint8_t tail[64] = {}, tail_scales[kLanes] = {};
    std::memcpy(tail, codes + whole * 64, rest * 8);
    std::memcpy(tail_scales, scales + whole * kLanes, rest);
    path.group(tail, tail_scales, whole);
  }
  return blocks == 0 || *std::max_element(scales, scales + blocks) < 0x7F;
}

#endif

struct Problem {
  const float* x;  // [m, 16 * blocks], zero-padded
  const uint8_t *codes, *scales;
  float alpha;
  const void* bias;  // [n] or null
  void* y;           // [m, n], like bias in `type`
  Type type;
  int64_t m, n, blocks;
  int threads;

  void put(int64_t row, int64_t column, float sum) const {
    store(y, row * n + column, type, alpha * sum + (bias ? load(bias, column, type) : 0.f));
  }
};

template <class Path, int MB, class Rows>
void run_chunk(const Problem& p, const Rows& rows, int64_t first) {
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t n = 0; n < p.n; n++) {
    const uint8_t *codes = p.codes + n * p.blocks * 8, *scales = p.scales + n * p.blocks;
    Path path;
    path.x = rows.data() + first;
    const bool plain = run_row(path, codes, scales, p.blocks);
    for (int m = 0; m < MB; m++) {
      const float* x = p.x + (first + m) * p.blocks * 16;
      p.put(first + m, n, plain ? path.finish(m) : careful(codes, scales, p.blocks, x));
    }
  }
}

// Four rows at a time: with eight, the activations outgrow the L1 cache and nothing is gained.
template <template <int> class Path, class Rows>
void run_all(const Problem& p, const Rows& rows) {
  int64_t at = 0;
  for (; at + 4 <= p.m; at += 4) run_chunk<Path<4>, 4>(p, rows, at);
  for (; at + 2 <= p.m; at += 2) run_chunk<Path<2>, 2>(p, rows, at);
  for (; at < p.m; at++) run_chunk<Path<1>, 1>(p, rows, at);
}

template <int MB>
using Int8Row = RoundedRow<1, MB>;
template <int MB>
using Int16Row = RoundedRow<2, MB>;

}  // namespace

extern "C" {

// x [m, k] and y [m, n] of `type`, k <= 16 * blocks; planes: 0 exact, 1 int8, 2 int16.
void nvfp4_linear(const void* x, const uint8_t* codes, const uint8_t* scales, const float* alpha, const void* bias,
                  void* y, int type, int64_t m, int64_t n, int64_t k, int64_t blocks, int planes, int threads) {
  const int64_t width = blocks * kBlock, groups = (blocks + kLanes - 1) / kLanes;
  std::vector<float> wide(m * width, 0.f);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < k; j++) wide[i * width + j] = load(x, i * k + j, Type(type));
  const Problem p{wide.data(), codes, scales, *alpha, bias, y, Type(type), m, n, blocks, threads};
  if (planes == 0) {
    std::vector<Exact> laid(m);
    std::vector<const float*> rows(m);
    for (int64_t i = 0; i < m; i++) {
      lay_out(p.x + i * width, width, groups, laid[i]);
      rows[i] = laid[i].x.data();
    }
    run_all<ExactRow>(p, rows);
    return;
  }
  std::vector<Rounded> laid(m);
  std::vector<const Rounded*> rows(m);
  for (int64_t i = 0; i < m; i++) {
    laid[i].planes = planes;
    lay_out(p.x + i * width, width, groups, laid[i]);
    rows[i] = &laid[i];
  }
  planes == 1 ? run_all<Int8Row>(p, rows) : run_all<Int16Row>(p, rows);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n && !laid[i].finite; j++) p.put(i, j, NAN);
}
}
