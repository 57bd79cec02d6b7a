// 4-bit weights times many rows of bf16 activations with the bf16 dot products of AVX-512 (VDPBF16PS): a strip of 32
// weight rows at a time is decoded into pairs of bf16 and multiplied by all activation rows from the L2 cache, as the
// many rows of NVFP4 are. A weight, (code - zero) * scale, is rounded to bf16 once.
#include "nvfp4_bf16.h"
#include "nvfp4_bf16_gemm.h"
#include "wna16_few_bf16.h"
#include "wna16_lanes_bf16.h"

#if NVFP4_BF16
namespace {

using namespace nvfp4;

struct FourBits {
  const uint8_t* codes;          // [n, row_bytes], the even column's code in a byte's low half
  const float *scales, *shifts;  // [n, groups]; a shift is the zero point times the scale
  int64_t row_bytes, groups, columns;  // columns: that share a scale, a multiple of 8 where there are several
};

// One group's numbers of 16 weight rows, a lane each; 0 for rows beyond the last.
inline __m512 of_rows(const float* from, int64_t groups, int64_t first, int64_t n, int64_t group) {
  alignas(64) float found[16] = {};
  for (int r = 0; r < 16 && first + r < n; r++) found[r] = from[(first + r) * groups + group];
  return _mm512_load_ps(found);
}

// Weight rows first .. first + 31 to out [pairs][32 rows][2]; rows beyond the last are zero.
void decode(const FourBits& w, int64_t n, int64_t pairs, int64_t first, uint16_t* out) {
  const __m512i four = _mm512_set1_epi32(15);
  // a vector of the even columns below and the odd ones above, into pairs
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; i++) order[i] = uint16_t(i / 2 + i % 2 * 16);
  const __m512i side_by_side = _mm512_load_si512(order);
  for (int side = 0; side < 2; side++) {
    const int64_t begin = first + side * 16;
    int64_t group = -1;
    __m512 scale = _mm512_setzero_ps(), shift = scale;
    for (int64_t at = 0; at < w.row_bytes; at += 64) {
      const int count = int(std::min<int64_t>(64, w.row_bytes - at));
      const __mmask64 bytes = count == 64 ? ~0ull : (1ull << count) - 1;
      __m512i v[16];
      for (int r = 0; r < 16; r++)
        v[r] = begin + r < n ? _mm512_maskz_loadu_epi8(bytes, w.codes + (begin + r) * w.row_bytes + at)
                             : _mm512_setzero_si512();
      transpose16(v);  // v[d]: eight columns of 16 rows
      for (int d = 0; d < count / 4; d++) {
        const int64_t column = at * 2 + d * 8, here = std::min(column / w.columns, w.groups - 1);
        if (here != group) {
          group = here;
          scale = of_rows(w.scales, w.groups, begin, n, group);
          shift = of_rows(w.shifts, w.groups, begin, n, group);
        }
        for (int i = 0; i < 4 && column / 2 + i < pairs; i++) {
          const __m512i byte = _mm512_srli_epi32(v[d], 8 * i);
          const auto even = _mm512_cvtepi32_ps(_mm512_and_si512(byte, four));
          const auto odd = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(byte, 4), four));
          const auto both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_fmsub_ps(odd, scale, shift), _mm512_fmsub_ps(even, scale, shift));
          _mm512_store_si512(out + ((column / 2 + i) * kStripRows + side * 16) * 2, _mm512_permutexvar_epi16(side_by_side, both));
        }
      }
    }
    for (int64_t pair = w.row_bytes; pair < pairs; pair++)  // up to whole blocks of 16 columns
      _mm512_store_si512(out + (pair * kStripRows + side * 16) * 2, _mm512_setzero_si512());
  }
}

}  // namespace
#endif

extern "C" {

// Whether `wna16_bf16_few` takes codes of so many bits, in so many groups of k columns, on the CPU it was built for.
int wna16_bf16_few_takes(int bits, int64_t k, int64_t groups) {
#if WNA16_FEW_BF16
  return few::takes(bits, k, groups);
#else
  return 0;
#endif
}

// y [m, n] = x [m, k] W^T + bias in bf16 for few rows; W from codes [n, row_bytes] of `bits`, scales of `kind` [n, groups].
void wna16_bf16_few(const uint16_t* x, const uint8_t* codes, const void* scales, const uint8_t* zeros,
                    const uint16_t* bias, uint16_t* y, int64_t m, int64_t n, int64_t k, int64_t row_bytes,
                    int64_t groups, int bits, int kind, int threads) {
#if WNA16_FEW_BF16
  const few::Weight w{codes, scales, zeros, kind, n, k, row_bytes, groups};
  for (; bits == 4 && m > 2; m -= std::min<int64_t>(m, 8), x += 8 * k, y += 8 * n) {
    if (m > 4) lanes::linear<8>(w, x, std::min<int64_t>(m, 8), bias, y, threads);
    else lanes::linear<4>(w, x, m, bias, y, threads);
  }
  if (m == 0) return;
  if (bits == 4 && groups == 1) few::linear<4, true>(w, x, m, bias, y, threads);
  if (bits == 4 && groups != 1) few::linear<4, false>(w, x, m, bias, y, threads);
  if (bits == 8 && groups == 1) few::linear<8, true>(w, x, m, bias, y, threads);
  if (bits == 8 && groups != 1) few::linear<8, false>(w, x, m, bias, y, threads);
#endif
}

// 1 when this library was built for a CPU that has the instructions.
int wna16_bf16_built() { return NVFP4_BF16; }

// y [m, n] = x [m, k] W^T + bias in bf16, W from codes [n, row_bytes] of four bits.
void wna16_bf16_linear(const uint16_t* x, const uint8_t* codes, const float* scales, const float* shifts,
                       const uint16_t* bias, uint16_t* y, int64_t m, int64_t n, int64_t k, int64_t row_bytes,
                       int64_t groups, int threads) {
#if NVFP4_BF16
  const int64_t blocks = (k + 15) / 16;
  const Bf16Product p{nullptr, nullptr, x, bias, y, 1.f / 256, m, n, k, blocks, threads};
  const FourBits w{codes, scales, shifts, row_bytes, groups, k / groups};
  many_rows(p, [&](int64_t column, uint16_t* strip) { decode(w, n, blocks * 8, column, strip); });
#endif
}
}
