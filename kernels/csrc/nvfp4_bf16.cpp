// NVFP4 weights times bf16 activations with the bf16 dot products of AVX-512 (VDPBF16PS).
//
// Few rows multiply straight from the codes. The unit of work is a group: 16 blocks of 16, so 256 weights in
// 128 bytes and 16 scales. Two dword shuffles make two vectors whose 32-bit lane is a block, which makes the
// block scale one multiply-add for 256 weights. Many rows: nvfp4_bf16_gemm.h.
//
// bf16 subnormals count as zero here; the products of code and activation are exact, sums are fp32.
#include "nvfp4_bf16.h"
#include "nvfp4_bf16_gemm.h"

#if NVFP4_BF16
namespace {

using namespace nvfp4;

constexpr int kWide = 16, kWideGroup = 256;  // blocks and weights of a group
constexpr int kMostRows = 5;                 // more accumulators than for two times five would spill
constexpr int64_t kCache = 16 << 20;         // bytes of weights that a last-level cache is taken to hold
constexpr int64_t kStrip = 64;               // weight rows that stay in the L2 cache for all activations

// Lane j of 128-bit quarter L holds blocks 2L, 2L + 1, 8 + 2L, 9 + 2L: what the shuffles leave.
constexpr int block_of_lane(int lane) { return lane / 4 * 2 + lane % 2 + (lane % 4 >= 2 ? 8 : 0); }

// x [k] to [group][vector 0..7][lane][2]: vector v holds elements 2v and 2v + 1 of every block.
void lay_out_pairs(const uint16_t* x, int64_t k, int64_t groups, uint16_t* out) {
  std::memset(out, 0, size_t(groups) * kWideGroup * 2);
  for (int64_t g = 0; g < groups; g++)
    for (int lane = 0; lane < kWide; lane++) {
      const int64_t at = g * kWideGroup + block_of_lane(lane) * 16;
      if (at + 16 <= k) {
        for (int v = 0; v < 8; v++) std::memcpy(out + ((g * 8 + v) * kWide + lane) * 2, x + at + 2 * v, 4);
      } else {
        for (int e = 0; at + e < k && e < 16; e++) out[((g * 8 + e / 2) * kWide + lane) * 2 + e % 2] = x[at + e];
      }
    }
}

// NB weight rows times MB activation rows, from weight row `n` and activation row `first`. laid: all
// activation rows, laid out.
template <int NB, int MB>
void tile(const Bf16Product& t, const uint16_t* laid, int64_t n, int64_t first) {
  const int64_t groups = (t.blocks + kWide - 1) / kWide;
  const __m512i table = bf16_of_code();
  const __m512i pick[4] = {nibbles_of_byte(0), nibbles_of_byte(1), nibbles_of_byte(2), nibbles_of_byte(3)};
  const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
  __m512 acc[NB][MB];
  __m128i largest[NB];
  for (int r = 0; r < NB; r++) {
    largest[r] = _mm_setzero_si128();
    for (int m = 0; m < MB; m++) acc[r][m] = _mm512_setzero_ps();
  }
  const uint16_t* rows[MB];
  for (int m = 0; m < MB; m++) rows[m] = laid + (first + m) * groups * kWideGroup;

  const auto group = [&](const uint8_t* const* codes, const uint8_t* const* scales, int64_t g) {
    __m512 part[NB][MB];
    for (int r = 0; r < NB; r++)
      for (int m = 0; m < MB; m++) part[r][m] = _mm512_setzero_ps();
    for (int half = 0; half < 2; half++) {
      __m512i words[NB];
      for (int r = 0; r < NB; r++) {
        const __m512 a = _mm512_loadu_ps(codes[r]), b = _mm512_loadu_ps(codes[r] + 64);
        words[r] = _mm512_castps_si512(half ? _mm512_shuffle_ps(a, b, 0xDD) : _mm512_shuffle_ps(a, b, 0x88));
      }
      for (int p = 0; p < 4; p++) {
        __m512bh w[NB];
        for (int r = 0; r < NB; r++)
          w[r] = (__m512bh)decode_byte(words[r], pick[p], table);
        for (int m = 0; m < MB; m++) {
          const __m512bh v = (__m512bh)_mm512_load_si512(rows[m] + (g * 8 + half * 4 + p) * 2 * kWide);
          for (int r = 0; r < NB; r++) part[r][m] = _mm512_dpbf16_ps(part[r][m], w[r], v);
        }
      }
    }
    for (int r = 0; r < NB; r++) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales[r]));
      largest[r] = _mm_max_epu8(largest[r], bytes);
      // the byte shifted to bits 14..7 is the fp16 of the scale times 2^-8
      const __m512 scale =
          _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_shuffle_epi8(bytes, order)), 7));
      for (int m = 0; m < MB; m++) acc[r][m] = _mm512_fmadd_ps(part[r][m], scale, acc[r][m]);
    }
  };
  const uint8_t *codes[NB], *scales[NB];
  for (int r = 0; r < NB; r++) {
    codes[r] = t.codes + (n + r) * t.blocks * 8;
    scales[r] = t.scales + (n + r) * t.blocks;
  }
  const int64_t whole = t.blocks / kWide, rest = t.blocks % kWide;
  // the weights of the next rows: the hardware does not follow from one row into the next
  constexpr int64_t ahead = 8192;
  for (int64_t g = 0; g < whole; g++) {
    for (int r = 0; r < NB; r++) {
      _mm_prefetch(reinterpret_cast<const char*>(codes[r] + ahead), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(codes[r] + ahead + 64), _MM_HINT_T0);
      if (g % 4 == 0) _mm_prefetch(reinterpret_cast<const char*>(scales[r] + ahead / 8), _MM_HINT_T0);
    }
    group(codes, scales, g);
    for (int r = 0; r < NB; r++) codes[r] += 128, scales[r] += kWide;
  }
  if (rest) {
    alignas(64) uint8_t tail[NB][128] = {}, tail_scales[NB][kWide] = {};
    for (int r = 0; r < NB; r++) {
      std::memcpy(tail[r], codes[r], size_t(rest) * 8);
      std::memcpy(tail_scales[r], scales[r], size_t(rest));
      codes[r] = tail[r], scales[r] = tail_scales[r];
    }
    group(codes, scales, whole);
  }
  for (int r = 0; r < NB; r++) {
    const bool plain = _mm_cmpgt_epi8_mask(largest[r], _mm_set1_epi8(0x7E)) == 0 && _mm_movepi8_mask(largest[r]) == 0;
    for (int m = 0; m < MB; m++)
      plain ? t.put(first + m, n + r, 256.f * _mm512_reduce_add_ps(acc[r][m])) : t.put_carefully(first + m, n + r);
  }
}

template <int MB>
void strip(const Bf16Product& t, const uint16_t* laid, int64_t first, int64_t begin, int64_t end) {
  int64_t n = begin;
  // from main memory one stream of weights is faster than two, and multiplying is not what takes the time
  const bool far = MB == 1 && t.n * t.blocks * 9 > kCache;
  for (; n + 2 <= end && !far; n += 2) tile<2, MB>(t, laid, n, first);
  for (; n < end; n++) tile<1, MB>(t, laid, n, first);
}

void few_rows(const Bf16Product& t) {
  const int64_t groups = (t.blocks + kWide - 1) / kWide;
  Lines memory(size_t(t.m * groups) * kWideGroup);
  uint16_t* laid = memory.data();
  for (int64_t i = 0; i < t.m; i++) lay_out_pairs(t.x + i * t.k, t.k, groups, laid + i * groups * kWideGroup);
#pragma omp parallel for schedule(static) num_threads(t.threads) if (t.threads > 1)
  for (int64_t begin = 0; begin < t.n; begin += kStrip) {
    const int64_t end = std::min(t.n, begin + kStrip);
    for (int64_t at = 0, chunks = (t.m + kMostRows - 1) / kMostRows; chunks > 0; chunks--) {
      const int64_t size = (t.m - at + chunks - 1) / chunks;
      switch (size) {
        case 1: strip<1>(t, laid, at, begin, end); break;
        case 2: strip<2>(t, laid, at, begin, end); break;
        case 3: strip<3>(t, laid, at, begin, end); break;
        case 4: strip<4>(t, laid, at, begin, end); break;
        default: strip<kMostRows>(t, laid, at, begin, end); break;
      }
      at += size;
    }
  }
}

}  // namespace
#endif

extern "C" {

// 1 when this library was built for a CPU that has the instructions.
int nvfp4_bf16_built() { return NVFP4_BF16; }

// y [m, n] = alpha * x [m, k] W^T + bias, all but the weights in bf16; few: multiply straight from the codes.
void nvfp4_bf16_linear(const void* x, const uint8_t* codes, const uint8_t* scales, const float* alpha,
                       const void* bias, void* y, int64_t m, int64_t n, int64_t k, int64_t blocks, int few,
                       int threads) {
#if NVFP4_BF16
  const Bf16Product p{codes, scales, static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(bias),
                      static_cast<uint16_t*>(y), *alpha, m, n, k, blocks, threads};
  if (few)
    few_rows(p);
  else
    many_rows(p, [&](int64_t column, uint16_t* strip) { decode_strip(p, column, strip); });
  for (int64_t row = 0; row < n && !few; row++)
    for (int64_t i = 0; i < m && !p.plain(row); i++) p.put_carefully(i, row);
#endif
}
}
