// Attention over packed sequences in fp32, for any x86-64 or other CPU GCC and Clang have vectors for.
#include "varlen.h"

namespace {

struct Scratch {
    float *keys, *values, *scores, *queries;
};

// keys low .. high as panels [panel][width][NR], zero-filled to a whole panel
void pack_keys(const Call<float>& c, const Task& t, int64_t low, int64_t high, float* to) {
    for (int64_t j = low; j < low + padded(high - low); ++j) {
        float* column = to + (j - low) / NR * c.width * NR + (j - low) % NR;
        const float* key = j < high ? c.k.at(t.kv_head, t.begin + j) : nullptr;
        for (int64_t d = 0; d < c.width; ++d) column[d * NR] = key ? key[d] : 0.0f;
    }
}

// values low .. high as panels [panel][key][NR] over the value's width, zero-filled to a whole panel
void pack_values(const Call<float>& c, const Task& t, int64_t low, int64_t high, float* to) {
    for (int64_t d = 0; d < c.value_width; d += NR) {
        const int64_t n = std::min<int64_t>(NR, c.value_width - d);
        for (int64_t j = low; j < high; ++j, to += NR) {
            std::memcpy(to, c.v.at(t.kv_head, t.begin + j) + d, n * sizeof(float));
            std::fill(to + n, to + NR, 0.0f);
        }
    }
}

// [MR, NR] = a [MR, depth] times b [depth, NR]; a is read along its rows, `stride` apart
INLINE void product(const float* a, int64_t stride, const float* b, int64_t depth, vf acc[MR][2]) {
    for (int r = 0; r < MR; ++r) acc[r][0] = acc[r][1] = vf{};
    for (int64_t d = 0; d < depth; ++d) {
        const vf b0 = widen(b + d * NR), b1 = widen(b + d * NR + V);
        for (int r = 0; r < MR; ++r) {
            const vf x = all(a[r * stride + d]);
            acc[r][0] += x * b0;
            acc[r][1] += x * b1;
        }
    }
}

void run(const Call<float>& c, const Task& t, const Scratch& s) {
    const int64_t group = c.heads / c.kv_heads;
    if (c.mask_kind && c.rows[t.begin] < 0) {
        for (int64_t h = t.kv_head * group; h < (t.kv_head + 1) * group; ++h) copy_values(c, t, h);
        return;
    }
    const Seen<float> seen_by{c, t};
    const int64_t begin = seen_by.lowest(t.first), end = seen_by.highest(t.last - 1), keys = end - begin;
    pack_keys(c, t, begin, end, s.keys);
    pack_values(c, t, begin, end, s.values);
    vf acc[MR][2];
    for (int64_t h = t.kv_head * group; h < (t.kv_head + 1) * group; ++h) {
        for (int64_t i = t.first; i < t.last; i += MR) {
            const int64_t count = std::min<int64_t>(MR, t.last - i);
            for (int64_t r = 0; r < MR; ++r) {  // rows beyond the last query repeat it and are dropped
                const float* query = c.q.at(h, t.begin + i + std::min(r, count - 1));
                for (int64_t d = 0; d < c.width; ++d) s.queries[r * c.width + d] = query[d] * c.scale;
            }
            // whole panels around the keys this block sees, counted from `begin`
            const int64_t from = (seen_by.lowest(i) - begin) / NR * NR;
            const int64_t size = padded(seen_by.highest(i + count - 1) - begin - from);
            for (int64_t j = 0; j < size; j += NR) {
                product(s.queries, c.width, s.keys + (from + j) * c.width, c.width, acc);
                for (int r = 0; r < MR; ++r) {
                    store(s.scores + r * size + j, acc[r][0]);
                    store(s.scores + r * size + j + V, acc[r][1]);
                }
            }
            float inverse[MR];
            for (int64_t r = 0; r < MR; ++r) {
                float* row = s.scores + r * size;
                const int64_t query = i + std::min(r, count - 1);
                if (c.softcap > 0) softcap(row, size, c.softcap);
                if (c.mask_kind) apply_mask(c, h, t.begin + query, c.cols + t.begin, t.length, row);
                inverse[r] = softmax(row, seen_by.lowest(query) - begin - from, seen_by.highest(query) - begin - from, size,
                                     c.sink(h));
            }
            const int64_t seen = std::min(size, keys - from);
            for (int64_t d = 0; d < c.value_width; d += NR) {
                product(s.scores, size, s.values + d * keys + from * NR, seen, acc);
                const int64_t n = std::min<int64_t>(NR, c.value_width - d);
                for (int64_t r = 0; r < count; ++r) {
                    float wide[NR];
                    store(wide, acc[r][0] * inverse[r]);
                    store(wide + V, acc[r][1] * inverse[r]);
                    std::memcpy(c.out + h * c.out_head + (t.begin + i + r) * c.out_token + d, wide, n * sizeof(float));
                }
            }
        }
    }
}

}  // namespace

// See `call_of`. Returns 0, or 1 when memory ran out.
extern "C" int thresher_varlen_attention(const float* q, const float* k, const float* v, float* out,
                                         const int32_t* offsets, const int64_t* sizes, const int64_t* strides,
                                         float scale, int causal, int64_t window, float softcap, int mask_kind,
                                         const void* mask, const int64_t* rows, const int64_t* cols, const float* sinks,
                                         int threads) {
    const Call<float> c = call_of(q, k, v, out, offsets, sizes, strides, scale, causal, window, softcap, mask_kind,
                                  mask, rows, cols, sinks);
    int64_t keys = 0, values = 0, scores = 0;
    const auto words = [&](int64_t room) {
        keys = room * c.width, values = room * padded(c.value_width), scores = room * MR;
        return keys + values + scores + c.width * MR;
    };
    return over_tasks(c, threads, words, [&](const Task& t, float* mine) {
        run(c, t, {mine, mine + keys, mine + keys + values, mine + keys + values + scores});
    });
}
