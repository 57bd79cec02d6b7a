// Many rows of bf16 activations: a strip of 32 weight rows at a time is decoded, scale included, into pairs of
// bf16 with the weight row as the lane, and multiplied by all activation rows from the L2 cache.
//
// code * scale has at most six significant bits, so the decoded weights are exact in bf16.
#pragma once

#include "nvfp4_bf16.h"

#if NVFP4_BF16
namespace nvfp4 {

constexpr int kStripRows = 32, kChunk = 128;  // weight rows of a strip; columns decoded at a time
constexpr int kTileRows = 12;                 // activation rows of a tile: 24 accumulators

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

// Weight rows first .. first + 31, times 2^-8, to out [8 * blocks pairs][32 rows][2]; rows beyond the last are zero.
inline void decode_strip(const Bf16Product& p, int64_t first, uint16_t* out) {
  const __m512i table = bf16_of_code(), upper = _mm512_set1_epi32(int(0xFFFF0000));
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
        const __m512 s = scale[d / 2];
        for (int i = 0; i < 4; i++) {
          const __m512i w = decode_byte(v[d], pick[i], table);
          const __m512i even = _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), s));
          const __m512i odd = _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(w, upper)), s));
          const int64_t pair = (block * 2 + d) * 4 + i;
          _mm512_store_si512(out + (pair * kStripRows + side * 16) * 2, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
        }
      }
    }
}

// MB activation rows [MB, 2 * pairs] times a decoded strip.
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
      std::memcpy(&both, x + (m * pairs + pair) * 2, 4);
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
  if (size == MB) return multiply_strip<MB>(p, x + row * pairs * 2, pairs, weights, row, column);
  if constexpr (MB > 1) multiply_rows<MB - 1>(p, size, x, pairs, weights, row, column);
}

inline void many_rows(const Bf16Product& p) {
  const int64_t pairs = p.blocks * 8;
  const uint16_t* x = p.x;
  std::vector<uint16_t> padded;
  if (p.k != 2 * pairs) {
    padded.assign(size_t(p.m * pairs) * 2, 0);
    for (int64_t m = 0; m < p.m; m++) std::memcpy(padded.data() + m * pairs * 2, x + m * p.k, size_t(p.k) * 2);
    x = padded.data();
  }
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Lines memory(size_t(pairs) * kStripRows * 2);
    uint16_t* strip = memory.data();
#pragma omp for schedule(static)
    for (int64_t column = 0; column < p.n; column += kStripRows) {
      decode_strip(p, column, strip);
      for (int64_t row = 0, chunks = (p.m + kTileRows - 1) / kTileRows; chunks > 0; chunks--) {
        const int64_t size = (p.m - row + chunks - 1) / chunks;
        multiply_rows<kTileRows>(p, size, x, pairs, strip, row, column);
        row += size;
      }
    }
  }
}

}  // namespace nvfp4
#endif
