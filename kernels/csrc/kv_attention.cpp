// Attention over 4-, 2- or 8-bit pools of keys and values and a full-precision tail, in one pass.
//
// Codes are never turned into keys or values. With key = mid + step * c, per channel,
//   q . key = q . mid + (q * step) . c,
// so a block of slots costs one scaled copy of q; with value = mid + step * c, per slot,
//   sum p * value = sum (p * step) * c + sum p * mid.
// c is the code less half its range and mid the middle of the range: measured from `low`, the two sums
// would be large and cancel. The softmax runs online over chunks of slots.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "exponential.h"
#include "half.h"

struct Pool {
  const uint8_t *k_codes;
  const Half *k_affine;
  const uint8_t *v_codes;
  const Half *v_affine;
  const int32_t *ends;
  int64_t slots, blocks, bits;
};

namespace {

constexpr int CHUNK = 128;
constexpr int LANES = 16;
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// e^x for x <= 0; 0 below -87.
inline float exp_negative(float x) { return x < -87.0f ? 0.0f : exp_within(x < -87.0f ? -87.0f : x); }

inline float dot(const float *a, const float *b, int64_t width) {
  float lanes[LANES] = {};
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES)
    for (int l = 0; l < LANES; ++l) lanes[l] += a[c + l] * b[c + l];
  for (int half = LANES / 2; half; half /= 2)  // in pairs: one after the other would wait for every addition
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  float sum = lanes[0];
  for (; c < width; ++c) sum += a[c] * b[c];
  return sum;
}

template <int BITS>
inline void unpack(const uint8_t *codes, float *out, int64_t width) {
  constexpr int parts = 8 / BITS;
  constexpr uint8_t mask = (1 << BITS) - 1;
  constexpr float half = 0.5f * mask;
  const int64_t part = width / parts;
  for (int p = 0; p < parts; ++p)
    for (int64_t i = 0; i < part; ++i) out[p * part + i] = float((codes[i] >> (p * BITS)) & mask) - half;
}

inline void unpack(const uint8_t *codes, float *out, int64_t width, int64_t bits) {
  if (bits == 4) return unpack<4>(codes, out, width);
  if (bits == 2) return unpack<2>(codes, out, width);
  unpack<8>(codes, out, width);
}

// The queries that share one key-value head, and their running softmax.
struct Rows {
  int64_t count, dim, dim_v;
  const float *q;                   // [count, dim], scaled
  std::vector<float> folded, bias;  // q * step [count, dim] and q . mid [count] of the block at hand
  std::vector<float> score;         // [count, CHUNK]: scores, then weights
  std::vector<float> acc, constant; // sum of weight * c [count, dim_v], and of weight * mid [count]
  std::vector<float> top, mass, row;

  Rows(const float *q, int64_t count, int64_t dim, int64_t dim_v)
      : count(count), dim(dim), dim_v(dim_v), q(q), folded(count * dim), bias(count), score(count * CHUNK),
        acc(count * dim_v), constant(count), top(count, NEVER), mass(count), row(std::max(dim, dim_v)) {}

  void fold(const Half *affine, float half) {
    for (int64_t c = 0; c < dim; ++c) row[c] = widen(affine[dim + c]) + half * widen(affine[c]);
    for (int64_t r = 0; r < count; ++r) {
      bias[r] = dot(q + r * dim, row.data(), dim);
      for (int64_t c = 0; c < dim; ++c) folded[r * dim + c] = q[r * dim + c] * widen(affine[c]);
    }
  }

  // Turns scores of `width` slots into weights and makes room for them in the running sums.
  void soften(int64_t width, const uint8_t *visible) {
    for (int64_t r = 0; r < count; ++r) {
      float *s = &score[r * CHUNK], high = top[r];
      if (visible)
        for (int64_t j = 0; j < width; ++j) s[j] = visible[j] ? s[j] : NEVER;
      for (int64_t j = 0; j < width; ++j) high = s[j] > high ? s[j] : high;
      if (high == NEVER) {
        std::fill(s, s + width, 0.0f);
        continue;
      }
      if (high > top[r]) {
        const float shrink = top[r] == NEVER ? 0.0f : exp_negative(top[r] - high);
        for (int64_t c = 0; c < dim_v; ++c) acc[r * dim_v + c] *= shrink;
        mass[r] *= shrink;
        constant[r] *= shrink;
        top[r] = high;
      }
      for (int64_t j = 0; j < width; ++j) s[j] = exp_negative(s[j] - high);
      float sum = 0;
      for (int64_t j = 0; j < width; ++j) sum += s[j];
      mass[r] += sum;
    }
  }

  void add(int64_t r, float weight) {
    float *a = &acc[r * dim_v];
    for (int64_t c = 0; c < dim_v; ++c) a[c] += weight * row[c];
  }

  void attend(const Pool &pool, int64_t head, const uint8_t *visible) {
    const int64_t k_width = dim * pool.bits / 8, v_width = dim_v * pool.bits / 8;
    const uint8_t *k_codes = pool.k_codes + head * pool.slots * k_width;
    const uint8_t *v_codes = pool.v_codes + head * pool.slots * v_width;
    const Half *v_affine = pool.v_affine + head * pool.slots * 2;
    const float half = 0.5f * float((1 << pool.bits) - 1);
    for (int64_t block = 0, slot = 0; block < pool.blocks; ++block) {
      fold(pool.k_affine + (head * pool.blocks + block) * 2 * dim, half);
      for (; slot < pool.ends[block]; slot += CHUNK) {
        const int64_t width = std::min<int64_t>(CHUNK, pool.ends[block] - slot);
        for (int64_t j = 0; j < width; ++j) {
          unpack(k_codes + (slot + j) * k_width, row.data(), dim, pool.bits);
          for (int64_t r = 0; r < count; ++r)
            score[r * CHUNK + j] = bias[r] + dot(&folded[r * dim], row.data(), dim);
        }
        soften(width, visible ? visible + slot : nullptr);
        for (int64_t j = 0; j < width; ++j) {
          const float step = widen(v_affine[2 * (slot + j)]);
          const float mid = widen(v_affine[2 * (slot + j) + 1]) + half * step;
          unpack(v_codes + (slot + j) * v_width, row.data(), dim_v, pool.bits);
          for (int64_t r = 0; r < count; ++r) {
            const float weight = score[r * CHUNK + j];
            constant[r] += weight * mid;
            add(r, weight * step);
          }
        }
      }
      slot = pool.ends[block];
    }
  }

  // k, v: rows of the tail at a stride. Row r is query r % queries, and sees the tail up to its own token.
  template <typename T>
  void attend_tail(const T *k, const T *v, int64_t k_stride, int64_t v_stride, int64_t slots, int64_t queries,
                   const uint8_t *visible) {
    for (int64_t slot = 0; slot < slots; slot += CHUNK) {
      const int64_t width = std::min<int64_t>(CHUNK, slots - slot);
      if (visible && !std::memchr(visible + slot, 1, width)) continue;  // a stretch of padding
      for (int64_t j = 0; j < width; ++j) {
        if (visible && !visible[slot + j]) {
          for (int64_t r = 0; r < count; ++r) score[r * CHUNK + j] = NEVER;
          continue;
        }
        for (int64_t c = 0; c < dim; ++c) row[c] = widen(k[(slot + j) * k_stride + c]);
        for (int64_t r = 0; r < count; ++r) {
          const bool past = slot + j <= slots - queries + r % queries;
          score[r * CHUNK + j] = past ? dot(q + r * dim, row.data(), dim) : NEVER;
        }
      }
      soften(width, visible ? visible + slot : nullptr);
      for (int64_t j = 0; j < width; ++j) {
        if (visible && !visible[slot + j]) continue;
        for (int64_t c = 0; c < dim_v; ++c) row[c] = widen(v[(slot + j) * v_stride + c]);
        for (int64_t r = 0; r < count; ++r) add(r, score[r * CHUNK + j]);
      }
    }
  }

  void finish(float *out) const {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < dim_v; ++c)
        out[r * dim_v + c] = mass[r] > 0 ? (acc[r * dim_v + c] + constant[r]) / mass[r] : mass[r];
  }
};

}  // namespace

// A tail of [batch, heads, slots, width]; strides in elements, the last one 1. kind: 0 float, 1 bfloat16, 2 float16.
struct Tail {
  const void *data;
  int64_t batch_stride, head_stride, slot_stride;
};

template <typename T>
static void attend_tail(Rows &rows, const Tail &k, const Tail &v, int64_t b, int64_t h, int64_t slots,
                        int64_t queries, const uint8_t *visible) {
  rows.attend_tail((const T *)k.data + b * k.batch_stride + h * k.head_stride,
                   (const T *)v.data + b * v.batch_stride + h * v.head_stride, k.slot_stride, v.slot_stride, slots,
                   queries, visible);
}

// q: float [batch, heads, queries, dim], scaled; out: float [batch, heads, queries, dim_v]; both contiguous.
// visible: bytes [batch, all slots] or null.
extern "C" void kv_attention(const float *q, const Pool *pools, int64_t pool_count, const Tail *k_tail,
                             const Tail *v_tail, int64_t tail, int kind, const uint8_t *visible, float *out,
                             int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t dim,
                             int64_t dim_v, int threads) {
  const int64_t group = heads / kv_heads;
  int64_t all = tail;
  for (int64_t p = 0; p < pool_count; ++p) all += pools[p].slots;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t head = 0; head < batch * kv_heads; ++head) {
    const int64_t b = head / kv_heads, h = head % kv_heads, first = head * group * queries;
    Rows rows(q + first * dim, group * queries, dim, dim_v);
    const uint8_t *seen = visible ? visible + b * all : nullptr;
    for (int64_t p = 0; p < pool_count; ++p) {
      rows.attend(pools[p], head, seen);
      if (seen) seen += pools[p].slots;
    }
    if (kind == 0) attend_tail<float>(rows, *k_tail, *v_tail, b, h, tail, queries, seen);
    if (kind == 1) attend_tail<BFloat>(rows, *k_tail, *v_tail, b, h, tail, queries, seen);
    if (kind == 2) attend_tail<Half>(rows, *k_tail, *v_tail, b, h, tail, queries, seen);
    rows.finish(out + first * dim_v);
  }
}
