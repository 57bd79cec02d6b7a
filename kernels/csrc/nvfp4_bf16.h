// What the bf16 kernels of NVFP4 share: codes to bf16 in two instructions for 32 weights.
//
// VPMULTISHIFTQB pulls the two codes of byte p of every 32-bit lane into two 16-bit indices, and VPERMW turns
// those into two bf16 values, exactly.
#pragma once

#include "nvfp4_activations.h"
#include "nvfp4_format.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__F16C__)
#define NVFP4_BF16 1
#else
#define NVFP4_BF16 0
#endif

#if NVFP4_BF16
namespace nvfp4 {

// A product to compute: y [m, n] = alpha * x [m, k] W^T + bias, all but the weights in bf16.
struct Bf16Product {
  const uint8_t *codes, *scales;  // [n, 8 * blocks], [n, blocks]
  const uint16_t *x, *bias;       // bias may be null
  uint16_t* y;
  float alpha;
  int64_t m, n, k, blocks;
  int threads;

  // NaN scales, and scales with their sign bit set, want the definition.
  bool plain(int64_t row) const {
    const uint8_t* s = scales + row * blocks;
    uint8_t most = 0;
    for (int64_t b = 0; b < blocks; b++) most = std::max(most, s[b]);
    return most < 0x7F;
  }
  void put(int64_t row, int64_t column, float sum) const {
    store(y, row * n + column, kBFloat16, alpha * sum + (bias ? load(bias, column, kBFloat16) : 0.f));
  }
  void put_carefully(int64_t row, int64_t column) const {
    std::vector<float> wide(size_t(blocks) * 16, 0.f);
    for (int64_t i = 0; i < k; i++) wide[i] = load(x, row * k + i, kBFloat16);
    put(row, column, careful(codes + column * blocks * 8, scales + column * blocks, blocks, wide.data()));
  }
};

inline __m512i bf16_of_code() {
  alignas(64) static const uint16_t values[32] = {
      0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0,
      0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};
  return _mm512_load_si512(values);
}

// Bit offsets for VPMULTISHIFTQB: byte p of both dwords of a qword, its low and its high nibble.
// VPERMW reads five bits of an index; the fifth is the next nibble's, so its table stands twice.
inline __m512i nibbles_of_byte(int p) {
  const int64_t low = 8 * p, high = low + 4;
  return _mm512_set1_epi64(low | high << 16 | (32 + low) << 32 | (32 + high) << 48);
}

inline __m512i decode_byte(__m512i codes, __m512i nibbles, __m512i table) {
  return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(nibbles, codes), table);
}

// Memory that starts at a cache line: a load that straddles two takes twice as long.
class Lines {
 public:
  explicit Lines(size_t halves) : memory_(halves + 32) {}
  uint16_t* data() {
    return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) & ~uintptr_t(63));
  }

 private:
  std::vector<uint16_t> memory_;
};

}  // namespace nvfp4
#endif
