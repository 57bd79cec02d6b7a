// Attention over packed sequences in bf16: products of pairs of bf16 numbers, added up in fp32 (VDPBF16PS where the CPU
// has it, else in two steps). The softmax is fp32; its weights are rounded to bf16 for the product with the values.
#include "varlen.h"

namespace {

// Pairs of numbers in 32 bits, the even one below. Of widths that are odd the last has zero above.
struct Scratch {
    uint32_t *keys, *values;
    float* scores;
    uint32_t *weights, *queries;
};

int64_t half(int64_t n) { return (n + 1) / 2; }

// acc + the two products of each lane's pair
INLINE vf add_products(vf acc, vu a, vu b) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc = multiply_add(bits<vf>(a << 16), bits<vf>(b << 16), acc);
    return multiply_add(bits<vf>(a & 0xffff0000u), bits<vf>(b & 0xffff0000u), acc);
#endif
}

INLINE vu pairs_at(const uint32_t* p) {
    vu v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// pair number p of a row of `width` numbers
INLINE uint32_t pair_of(const bf16* row, int64_t p, int64_t width) {
    uint32_t pair = 0;
    std::memcpy(&pair, row + 2 * p, 2 * p + 1 < width ? 4 : 2);
    return pair;
}

INLINE void narrow(const float* from, bf16* to) {  // V numbers
#if defined(__AVX512BF16__)
    const __m256bh narrowed = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
    std::memcpy(to, &narrowed, sizeof narrowed);
#else
    for (int i = 0; i < V; ++i) put(to + i, from[i]);
#endif
}

// keys low .. high as panels [panel][pair][NR], zero-filled to a whole panel
void pack_keys(const Call<bf16>& c, const Task& t, int64_t low, int64_t high, uint32_t* to) {
    const int64_t pairs = half(c.width), whole = c.width / 2;
    for (int64_t j = low; j < low + padded(high - low); ++j) {
        uint32_t* column = to + (j - low) / NR * pairs * NR + (j - low) % NR;
        if (j >= high) {
            for (int64_t p = 0; p < pairs; ++p) column[p * NR] = 0;
            continue;
        }
        const bf16* key = c.k.at(t.kv_head, t.begin + j);
        for (int64_t p = 0; p < whole; ++p) std::memcpy(column + p * NR, key + 2 * p, 4);
        if (pairs != whole) column[whole * NR] = key[c.width - 1].bits;
    }
}

// n numbers of two rows, side by side; n is NR but at the end of a row
INLINE void interleave(const bf16* even, const bf16* odd, int64_t n, uint32_t* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = even[i].bits | uint32_t(odd[i].bits) << 16;
}

// values low .. high as panels [panel][pair of keys][NR] over the value's width, zero-filled to whole panels and pairs
void pack_values(const Call<bf16>& c, const Task& t, int64_t low, int64_t high, uint32_t* to) {
    const bf16 none[NR] = {};
    for (int64_t d = 0; d < c.value_width; d += NR) {
        const int64_t n = std::min<int64_t>(NR, c.value_width - d);
        for (int64_t j = low; j < high; j += 2, to += NR) {
            const bf16* even = c.v.at(t.kv_head, t.begin + j) + d;
            const bf16* odd = j + 1 < high ? c.v.at(t.kv_head, t.begin + j + 1) + d : none;
            if (n == NR) {
                interleave(even, odd, NR, to);
            } else {
                interleave(even, odd, n, to);
                std::fill(to + n, to + NR, 0);
            }
        }
    }
}

// [MR, NR] = a [MR, pairs] times b [pairs, NR]; a is read along its rows, `stride` apart
INLINE void product(const uint32_t* a, int64_t stride, const uint32_t* b, int64_t pairs, vf acc[MR][2]) {
    vf low[MR], high[MR];  // of their own: the compiler keeps these in registers
    UNROLL for (int r = 0; r < MR; ++r) low[r] = high[r] = vf{};
    for (int64_t p = 0; p < pairs; ++p) {
        const vu b0 = pairs_at(b + p * NR), b1 = pairs_at(b + p * NR + V);
        UNROLL for (int r = 0; r < MR; ++r) {
            const vu x = a[r * stride + p] - vu{};
            low[r] = add_products(low[r], x, b0);
            high[r] = add_products(high[r], x, b1);
        }
    }
    UNROLL for (int r = 0; r < MR; ++r) {
        acc[r][0] = low[r];
        acc[r][1] = high[r];
    }
}

void run(const Call<bf16>& c, const Task& t, const Scratch& s) {
    const int64_t group = c.heads / c.kv_heads, pairs = half(c.width);
    if (c.mask_kind && c.rows[t.begin] < 0) {
        for (int64_t h = t.kv_head * group; h < (t.kv_head + 1) * group; ++h) copy_values(c, t, h);
        return;
    }
    const Seen<bf16> seen_by{c, t};
    const int64_t begin = seen_by.lowest(t.first), end = seen_by.highest(t.last - 1), keys = end - begin;
    pack_keys(c, t, begin, end, s.keys);
    pack_values(c, t, begin, end, s.values);
    vf acc[MR][2];
    for (int64_t h = t.kv_head * group; h < (t.kv_head + 1) * group; ++h) {
        for (int64_t i = t.first; i < t.last; i += MR) {
            const int64_t count = std::min<int64_t>(MR, t.last - i);
            for (int64_t r = 0; r < MR; ++r) {  // rows beyond the last query repeat it and are dropped
                const bf16* query = c.q.at(h, t.begin + i + std::min(r, count - 1));
                for (int64_t p = 0; p < pairs; ++p) s.queries[r * pairs + p] = pair_of(query, p, c.width);
            }
            // whole panels around the keys this block sees, counted from `begin`
            const int64_t from = (seen_by.lowest(i) - begin) / NR * NR;
            const int64_t size = padded(seen_by.highest(i + count - 1) - begin - from);
            for (int64_t j = 0; j < size; j += NR) {
                product(s.queries, pairs, s.keys + (from + j) * pairs, pairs, acc);
                for (int r = 0; r < MR; ++r) {
                    store(s.scores + r * size + j, acc[r][0] * c.scale);
                    store(s.scores + r * size + j + V, acc[r][1] * c.scale);
                }
            }
            float inverse[MR];
            for (int64_t r = 0; r < MR; ++r) {
                float* row = s.scores + r * size;
                const int64_t query = i + std::min(r, count - 1);
                if (c.softcap > 0) softcap(row, size, c.softcap);
                if (c.mask_kind) apply_mask(c, h, t.begin + query, c.cols + t.begin, t.length, row);
                inverse[r] = softmax(row, seen_by.lowest(query) - begin - from,
                                     seen_by.highest(query) - begin - from, size,
                                     c.sink(h));
                bf16* narrowed = reinterpret_cast<bf16*>(s.weights + r * (size / 2));
                for (int64_t j = 0; j < size; j += V) narrow(row + j, narrowed + j);
            }
            const int64_t seen = half(std::min(size, keys - from));
            for (int64_t d = 0; d < c.value_width; d += NR) {
                product(s.weights, size / 2, s.values + d * half(keys) + from / 2 * NR, seen, acc);
                const int64_t n = std::min<int64_t>(NR, c.value_width - d);
                for (int64_t r = 0; r < count; ++r) {
                    float wide[NR];
                    bf16 row[NR];
                    store(wide, acc[r][0] * inverse[r]);
                    store(wide + V, acc[r][1] * inverse[r]);
                    narrow(wide, row);
                    narrow(wide + V, row + V);
                    std::memcpy(c.out + h * c.out_head + (t.begin + i + r) * c.out_token + d, row, n * sizeof(bf16));
                }
            }
        }
    }
}

}  // namespace

// See `call_of`. Returns 0, or 1 when memory ran out.
extern "C" int thresher_varlen_bf16(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out,
                                    const int32_t* offsets, const int64_t* sizes, const int64_t* strides,
                                    float scale, int causal, int64_t window, float softcap, int mask_kind,
                                    const void* mask, const int64_t* rows, const int64_t* cols, const float* sinks,
                                    int threads) {
    const auto as = [](const uint16_t* p) { return reinterpret_cast<const bf16*>(p); };
    const Call<bf16> c = call_of(as(q), as(k), as(v), reinterpret_cast<bf16*>(out), offsets, sizes, strides, scale,
                                 causal, window, softcap, mask_kind, mask, rows, cols, sinks);
    int64_t keys = 0, values = 0, scores = 0, weights = 0;
    const auto words = [&](int64_t room) {
        keys = room * half(c.width), values = half(room) * padded(c.value_width);
        scores = room * MR, weights = half(room) * MR;
        return keys + values + scores + weights + half(c.width) * MR;
    };
    return over_tasks(c, threads, words, [&](const Task& t, float* mine) {
        uint32_t* rest = reinterpret_cast<uint32_t*>(mine);
        run(c, t, {rest, rest + keys, mine + keys + values, rest + keys + values + scores,
                   rest + keys + values + scores + weights});
    });
}

extern "C" int thresher_varlen_bf16_products() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}
