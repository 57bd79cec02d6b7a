// Many rows of bf16 activations: a strip of 32 weight rows at a time is decoded, scale included, into pairs of
// bf16 with the weight row as the lane, and multiplied by all activation rows from the L2 cache.
//
// code * scale has at most six significant bits, so the decoded weights are exact in bf16.
#pragma once

#include "nvfp4_bf16.h"

#if NVFP4_BF16
namespace nvfp4 {

constexpr int kStripRows = 32, kChunk = 128;  // weight rows of a strip; columns decoded at a time
constexpr int kTileRows = 14;                 // activation rows of a tile: 28 accumulators

// 16 vectors of 16 dwords, transposed in place.
inline void transpose16(__m512i* v) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; i++) {  // v[4q + i]: dword i of each 128-bit quarter, from rows 4q .. 4q + 3
    const __m512i a = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88), b = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88), d = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xDD);
    t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(a, c, 0xDD);
    t[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
  for (int i = 0; i < 16; i++) v[i] = t[i];
}

// The scales of 16 rows (8 bytes each) to fp32 * 2^-8, block by block: the byte shifted to bits 14..7 is that fp16.
inline void scales_by_block(const uint64_t* rows, __m512* out) {
  alignas(64) static const uint8_t order[64] = {
      0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96,  104, 112, 120, 1, 9,  17, 25, 33, 41, 49, 57, 65, 73, 81, 89, 97,  105, 113, 121,
      2, 10, 18, 26, 34, 42, 50, 58, 66, 74, 82, 90, 98, 106, 114, 122, 3, 11, 19, 27, 35, 43, 51, 59, 67, 75, 83, 91, 99, 107, 115, 123};
  const __m512i a = _mm512_load_si512(rows), b = _mm512_load_si512(rows + 8), first = _mm512_load_si512(order);
  for (int half = 0; half < 2; half++) {
    const __m512i index = half ? _mm512_add_epi8(first, _mm512_set1_epi8(4)) : first;
    alignas(64) uint8_t bytes[4][16];
    _mm512_store_si512(bytes, _mm512_permutex2var_epi8(a, index, b));
    for (int i = 0; i < 4; i++) {
      const __m256i wide = _mm256_cvtepu8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[i])));
      out[half * 4 + i] = _mm512_cvtph_ps(_mm256_slli_epi16(wide, 7));
    }
  }
}

// code * scale in bf16 is an addition: half of the codes are powers of two, the others 1.5 times one. Each entry is
// the code's sign, its exponent plus two, and in the last bit whether it is one of the others; 0 for zeros.
inline __m512i steps_of_code() {
  alignas(64) static const uint16_t steps[32] = {
      0, 0x080, 0x100, 0x101, 0x180, 0x181, 0x200, 0x201, 0, 0x8080, 0x8100, 0x8101, 0x8180, 0x8181, 0x8200, 0x8201,
      0, 0x080, 0x100, 0x101, 0x180, 0x181, 0x200, 0x201, 0, 0x8080, 0x8100, 0x8101, 0x8180, 0x8181, 0x8200, 0x8201};
  return _mm512_load_si512(steps);
}

// What the steps of a block's codes are added to: a quarter of the scale, and a quarter of 1.5 times it less that bit.
struct ScaleBits {
  __m512i once, more;
  __mmask32 nonzero;

  ScaleBits() = default;
  explicit ScaleBits(__m512 scale) {
    const auto bits = [](__m512 v) {
      const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(v), 16);
      return _mm512_or_si512(high, _mm512_slli_epi32(high, 16));
    };
    once = bits(scale);
    nonzero = _mm512_test_epi16_mask(once, once);
    once = _mm512_sub_epi16(once, _mm512_set1_epi16(0x100));
    more = _mm512_sub_epi16(bits(_mm512_mul_ps(scale, _mm512_set1_ps(1.5f))), _mm512_set1_epi16(0x101));
  }
  __m512i times(__m512i step) const {
    const __mmask32 odd = _mm512_test_epi16_mask(step, _mm512_set1_epi16(1));
    const __mmask32 counts = _mm512_mask_test_epi16_mask(nonzero, step, step);
    return _mm512_maskz_add_epi16(counts, step, _mm512_mask_blend_epi16(odd, once, more));
  }
};

// Weight rows first .. first + 31, times 2^-8, to out [8 * blocks pairs][32 rows][2]; rows beyond the last are zero.
inline void decode_strip(const Bf16Product& p, int64_t first, uint16_t* out) {
  const __m512i table = steps_of_code();
  const __m512i pick[4] = {nibbles_of_byte(0), nibbles_of_byte(1), nibbles_of_byte(2), nibbles_of_byte(3)};
  for (int side = 0; side < 2; side++)
    for (int64_t block = 0; block < p.blocks; block += kChunk / 16) {
      const int count = int(std::min<int64_t>(kChunk / 16, p.blocks - block));
      const __mmask64 bytes = count == 8 ? ~0ull : (1ull << (8 * count)) - 1;
      __m512i v[16];
      __m512 scale[8];
      alignas(64) uint64_t rows[16] = {};
      for (int r = 0; r < 16; r++) {
        const int64_t row = first + side * 16 + r;
        if (row >= p.n) {
          v[r] = _mm512_setzero_si512();
          continue;
        }
        v[r] = _mm512_maskz_loadu_epi8(bytes, p.codes + (row * p.blocks + block) * 8);
        if (count == 8)
          std::memcpy(rows + r, p.scales + row * p.blocks + block, 8);
        else
          std::memcpy(rows + r, p.scales + row * p.blocks + block, size_t(count));
      }
      transpose16(v);
      scales_by_block(rows, scale);
      for (int d = 0; d < 2 * count; d++) {
        const ScaleBits bits(scale[d / 2]);
        for (int i = 0; i < 4; i++) {
          const int64_t pair = (block * 2 + d) * 4 + i;
          const __m512i weights = bits.times(decode_byte(v[d], pick[i], table));
          _mm512_store_si512(out + (pair * kStripRows + side * 16) * 2, weights);
        }
      }
    }
}

// Activation rows in tiles, each [pair][row of the tile][2]: read in order, where rows of 4096 columns, side by side,
// would all want the same lines of the L1 cache.
struct Tiles {
  int64_t count, pairs, m;
  Lines memory;
  int64_t begin(int64_t tile) const { return m * tile / count; }
  const uint16_t* at(int64_t tile) const { return const_cast<Lines&>(memory).data() + begin(tile) * pairs * 2; }
};

inline void fill_tile(const Bf16Product& p, const Tiles& tiles, int64_t tile, uint16_t* out) {
  const int64_t first = tiles.begin(tile), size = tiles.begin(tile + 1) - first;
  const auto inside = __mmask16((1u << size) - 1);
  for (int64_t k = 0; k < tiles.pairs * 2; k += 32) {
    const __mmask32 columns = k + 32 <= p.k ? ~0u : k < p.k ? (1u << (p.k - k)) - 1 : 0;
    __m512i v[16];
    for (int64_t r = 0; r < 16; r++)
      v[r] = r < size ? _mm512_maskz_loadu_epi16(columns, p.x + (first + r) * p.k + k) : _mm512_setzero_si512();
    transpose16(v);
    for (int64_t pair = k / 2; pair < std::min(k / 2 + 16, tiles.pairs); pair++)
      _mm512_mask_storeu_epi32(out + pair * size * 2, inside, v[pair - k / 2]);
  }
}

// MB activation rows, as a tile holds them, times a decoded strip.
template <int MB>
void multiply_strip(const Bf16Product& p, const uint16_t* x, int64_t pairs, const uint16_t* weights, int64_t row,
                    int64_t column) {
  __m512 acc[MB][2];
  for (int m = 0; m < MB; m++) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < pairs; pair++) {
    const auto w0 = (__m512bh)_mm512_load_si512(weights + pair * kStripRows * 2);
    const auto w1 = (__m512bh)_mm512_load_si512(weights + pair * kStripRows * 2 + 32);
    for (int m = 0; m < MB; m++) {
      int32_t both;
      std::memcpy(&both, x + (pair * MB + m) * 2, 4);
      const auto v = (__m512bh)_mm512_set1_epi32(both);
      acc[m][0] = _mm512_dpbf16_ps(acc[m][0], w0, v);
      acc[m][1] = _mm512_dpbf16_ps(acc[m][1], w1, v);
    }
  }
  const __m512 alpha = _mm512_set1_ps(256.f * p.alpha);
  for (int side = 0; side < 2; side++) {
    const int64_t at = column + side * 16, width = std::min<int64_t>(16, p.n - at);
    if (width <= 0) break;
    const auto inside = __mmask16((1u << width) - 1);
    __m512 bias = _mm512_setzero_ps();
    if (p.bias)
      bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, p.bias + at)), 16));
    for (int m = 0; m < MB; m++) {
      const auto rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_fmadd_ps(acc[m][side], alpha, bias));
      _mm256_mask_storeu_epi16(p.y + (row + m) * p.n + at, inside, rounded);
    }
  }
}

template <int MB>
void multiply_rows(const Bf16Product& p, int64_t size, const uint16_t* x, int64_t pairs, const uint16_t* weights,
                   int64_t row, int64_t column) {
  if (size == MB) return multiply_strip<MB>(p, x, pairs, weights, row, column);
  if constexpr (MB > 1) multiply_rows<MB - 1>(p, size, x, pairs, weights, row, column);
}

// decode(column, strip): what decode_strip does, for this or another format of weights.
template <class Decode>
void many_rows(const Bf16Product& p, Decode decode) {
  const int64_t pairs = p.blocks * 8;
  Tiles tiles{(p.m + kTileRows - 1) / kTileRows, pairs, p.m, Lines(size_t(p.m * pairs) * 2)};
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles.count; tile++) fill_tile(p, tiles, tile, const_cast<uint16_t*>(tiles.at(tile)));
    Lines memory(size_t(pairs) * kStripRows * 2);
    uint16_t* strip = memory.data();
#pragma omp for schedule(static)
    for (int64_t column = 0; column < p.n; column += kStripRows) {
      decode(column, strip);
      for (int64_t tile = 0; tile < tiles.count; tile++) {
        const int64_t row = tiles.begin(tile);
        multiply_rows<kTileRows>(p, tiles.begin(tile + 1) - row, tiles.at(tile), pairs, strip, row, column);
      }
    }
  }
}

}  // namespace nvfp4
#endif
