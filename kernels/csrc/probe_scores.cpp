// Attention that keys receive from a few probe rows: column sums of a softmax whose map is never written.
//
// Rows stand in the lanes of vectors, so a row's maximum and sum need no shuffles, and a key is a broadcast
// that two vectors of rows share: query heads of one group and neighbouring probes. A block of LANES rows
// keeps its scores in a stripe the second-level cache holds (LANES * keys floats), written once, turned into
// e^(score - maximum) in place, and added up by key. Rows are sorted by column: a block ends at the last key
// any of its rows sees, and masks only behind the last key all of them see.
//
// A key-value head is one task, and heads add up in their order: results do not depend on threads or batch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <omp.h>

#include "simd.h"

namespace {

constexpr int LANES = 2 * V;
#if defined(__AVX512F__)
constexpr int KEYS = 12;  // 24 sums, two vectors of rows and a broadcast fit in 32 registers
#else
constexpr int KEYS = 6;
#endif
#define UNROLL_KEYS _Pragma("GCC unroll 12")
constexpr float LOG2E = 1.44269504088896341f;

INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// 2^x for x <= 0, to 2 units of the last place; below -126 it stays there, which no sum of floats notices.
INLINE vf power_of_two(vf x) {
#if defined(__AVX512F__)
    x = (vf)_mm512_max_ps((__m512)all(-126.0f), (__m512)x);  // in this order NaN stays NaN
    const vf whole = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = x < -126.0f ? all(-126.0f) : x;
    const vf shifted = x + 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
    const vf whole = shifted - 12582912.0f;
#endif
    const vf r = x - whole;
    vf p = all(1.5403530e-4f);  // Taylor's terms of 2^r: the first one left out is 1e-8 at r = 1/2
    p = multiply_add(p, r, all(1.3333558e-3f));
    p = multiply_add(p, r, all(9.6181291e-3f));
    p = multiply_add(p, r, all(5.5504109e-2f));
    p = multiply_add(p, r, all(2.4022651e-1f));
    p = multiply_add(p, r, all(6.9314718e-1f));
    p = multiply_add(p, r, all(1.0f));
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    return p * bits<vf>((bits<vi>(shifted) << 23) + (127 << 23));
#endif
}

INLINE vf larger(vf a, vf b) {  // b where either is NaN
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

INLINE float sum(vf v) {
    float total = 0;
    for (int l = 0; l < V; ++l) total += v[l];
    return total;
}

struct Row {
    int64_t column, probe, head;
};

struct Block {
    alignas(64) float weight[LANES];  // 1, or 0 in lanes left over
    alignas(64) int32_t column[LANES], own[LANES];
    int64_t begin, end, open;        // keys begin .. end are seen by some row, below `open` by all
};

// Scores of KEYS keys for the block's rows: asked [width, LANES], key j in row j of k.
INLINE void scores(const float* asked, const float* k, int64_t stride, int64_t last, int64_t width,
                   vf (&found)[KEYS][2]) {
    const float* row[KEYS];
    UNROLL_KEYS for (int j = 0; j < KEYS; ++j) {
        row[j] = k + std::min<int64_t>(j, last) * stride;
        found[j][0] = found[j][1] = vf{};
    }
#pragma GCC unroll 4
    for (int64_t d = 0; d < width; ++d) {
        vf a = widen(asked + d * LANES), b = widen(asked + d * LANES + V);
        UNROLL_KEYS for (int j = 0; j < KEYS; ++j) {
            const vf key = all(row[j][d]);
            found[j][0] = multiply_add(a, key, found[j][0]);
            found[j][1] = multiply_add(b, key, found[j][1]);
        }
    }
}

// `v` where a row sees key j, else `other`.
INLINE vf where_seen(const Block& block, int half, int64_t j, const int32_t* segments, vf v, float other) {
    vi seen = bits<vi>(widen((const float*)block.column + half * V)) >= int32_t(j);
    if (segments) seen &= bits<vi>(widen((const float*)block.own + half * V)) == segments[j];
    return seen ? v : all(other);
}

// Adds the block's shares to received [keys, V]; stripe: room for [keys, LANES].
void attend(const Block& block, const float* asked, const float* k, int64_t stride, const int32_t* segments,
            int64_t width, float* stripe, float* received) {
    const float never = -std::numeric_limits<float>::infinity();
    vf top[2] = {all(never), all(never)};
    for (int64_t j = block.begin; j < block.end; j += KEYS) {
        vf found[KEYS][2];
        const int64_t count = std::min<int64_t>(KEYS, block.end - j);
        scores(asked, k + j * stride, stride, count - 1, width, found);
        float* out = stripe + (j - block.begin) * LANES;
        UNROLL_KEYS for (int i = 0; i < KEYS; ++i) {
            if (i >= count) break;
            for (int h = 0; h < 2; ++h) {
                vf v = found[i][h];
                if (j + i >= block.open) v = where_seen(block, h, j + i, segments, v, never);
                top[h] = larger(top[h], v);
                store(out + i * LANES + h * V, v);
            }
        }
    }
    vf mass[2] = {};
    for (int64_t j = block.begin; j < block.end; ++j) {
        float* at = stripe + (j - block.begin) * LANES;
        for (int h = 0; h < 2; ++h) {
            vf v = power_of_two(widen(at + h * V) - top[h]);
            if (j >= block.open) v = where_seen(block, h, j, segments, v, 0.0f);
            mass[h] += v;
            store(at + h * V, v);
        }
    }
    vf part[2];
    for (int h = 0; h < 2; ++h) {
        const vf used = widen(block.weight + h * V);
        part[h] = used != 0.0f ? used / mass[h] : vf{};
    }
    for (int64_t j = block.begin; j < block.end; ++j) {
        const float* at = stripe + (j - block.begin) * LANES;
        vf v[2];
        for (int h = 0; h < 2; ++h) {
            v[h] = widen(at + h * V) * part[h];
            // A row's NaN must not reach keys it does not see: zero times NaN is not zero.
            if (j >= block.open) v[h] = where_seen(block, h, j, segments, v[h], 0.0f);
        }
        store(received + j * V, widen(received + j * V) + (v[0] + v[1]));
    }
}

void head(const float* q, int64_t q_head, const float* k, int64_t stride, const std::vector<Row>& rows,
          const int32_t* segments, float scale, int64_t keys, int64_t width, std::vector<float>& scratch,
          float* sums) {
    scratch.resize(keys * V + keys * LANES + width * LANES);
    float *received = scratch.data(), *stripe = received + keys * V, *asked = stripe + keys * LANES;
    std::fill(received, received + keys * V, 0.0f);
    for (size_t first = 0; first < rows.size(); first += LANES) {
        Block block;
        const size_t count = std::min<size_t>(LANES, rows.size() - first);
        std::fill(asked, asked + width * LANES, 0.0f);
        for (size_t l = 0; l < LANES; ++l) {  // lanes left over repeat the last row's column and weigh nothing
            const Row& row = rows[first + std::min(l, count - 1)];
            block.column[l] = int32_t(row.column);
            block.own[l] = segments ? segments[row.column] : 0;
            block.weight[l] = l < count ? 1.0f : 0.0f;
            if (l >= count) continue;
            const float* from = q + row.head * q_head + row.probe * width;
            for (int64_t d = 0; d < width; ++d) asked[d * LANES + l] = from[d] * (scale * LOG2E);
        }
        block.begin = 0, block.end = rows[first + count - 1].column + 1;
        block.open = segments ? 0 : rows[first].column + 1;
        if (segments)
            while (std::find(block.own, block.own + count, segments[block.begin]) == block.own + count)
                ++block.begin;
        attend(block, asked, k, stride, segments, width, stripe, received);
    }
    for (int64_t j = 0; j < keys; ++j) sums[j] = sum(widen(received + j * V));
}

}  // namespace

// q: [batch, heads, probes, width], contiguous. k: [batch, kv_heads, keys, width] by strides in elements, the
// last one 1. columns: [batch, probes]. segments: [batch, keys] or null. sums, seen: [batch, keys].
extern "C" void probe_scores(const float* q, const float* k, const int64_t* k_strides, const int64_t* columns,
                             const int32_t* segments, float scale, float* sums, int32_t* seen, int64_t batch,
                             int64_t heads, int64_t kv_heads, int64_t probes, int64_t keys, int64_t width,
                             int threads) {
    const int64_t group = heads / kv_heads;
    std::vector<std::vector<Row>> rows(batch);
    std::vector<float> parts(batch * kv_heads * keys);
    for (int64_t b = 0; b < batch; ++b) {
        const int32_t* own = segments ? segments + b * keys : nullptr;
        int32_t* count = seen + b * keys;
        std::fill(count, count + keys, 0);
        for (int64_t p = 0; p < probes; ++p) {
            const int64_t column = std::min(columns[b * probes + p], keys - 1);
            if (column < 0 || (own && own[column] < 0)) continue;
            for (int64_t g = 0; g < group; ++g) rows[b].push_back({column, p, g});
            if (own)
                for (int64_t j = 0; j <= column; ++j) count[j] += own[j] == own[column];
            else
                ++count[column];
        }
        if (!own)
            for (int64_t j = keys - 2; j >= 0; --j) count[j] += count[j + 1];
        std::stable_sort(rows[b].begin(), rows[b].end(),
                         [](const Row& a, const Row& b) { return a.column < b.column; });
    }
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < batch * kv_heads; ++task) {
            const int64_t b = task / kv_heads, h = task % kv_heads;
            head(q + (b * heads + h * group) * probes * width, probes * width,
                 k + b * k_strides[0] + h * k_strides[1], k_strides[2], rows[b],
                 segments ? segments + b * keys : nullptr, scale, keys, width, scratch,
                 parts.data() + task * keys);
        }
    }
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t j = 0; j < keys; ++j) {
            float total = 0;
            for (int64_t h = 0; h < kv_heads; ++h) total += parts[(b * kv_heads + h) * keys + j];
            sums[b * keys + j] = total / float(heads);
        }
}
