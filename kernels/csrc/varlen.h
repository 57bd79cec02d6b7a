// What the kernels of packed attention share: a call, its tasks, masks and the softmax, in fp32, for any CPU.
//
// A task is a chunk of queries of one segment and kv head, under every query head of its group. It
// packs the keys and values it can see into panels of NR columns, then takes MR queries at a time:
// scores for all keys they see, an exact softmax over each query's own range, and the weighted sum.
// Visible keys are a range [low, high) for each query under every kind of attention but a general
// mask, so blocks outside it cost nothing. Only a task's own segment decides its arithmetic.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include <omp.h>

#include "simd.h"

namespace {

constexpr int NR = 2 * V;
constexpr int MR = 6;  // MR * 2 sums, two loads and a broadcast fit in 16 registers
constexpr int CHUNK = 32 * MR;  // queries of a task: packing costs 1 / CHUNK of the products

INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// e^x for x <= 88, within 2 units of the last place (Cephes' polynomial); 0 below -87.3; NaN stays NaN.
INLINE vf exp(vf x) {
    const vi tiny = x < -87.33f;
    x = tiny ? vf{} : x;
    const vf shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
    const vf n = shifted - 12582912.0f;
    const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const vi power = (bits<vi>(shifted) << 23) + (127 << 23);  // the whole number stands in the low bits
    return tiny ? vf{} : p * bits<vf>(power);
}

// tanh x: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel (Cephes).
INLINE vf tanh(vf x) {
    const vf z = x * x;
    vf p = all(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const vf near = p * z * x + x;
    const vf clamped = x > 10.0f ? all(10.0f) : x < -10.0f ? all(-10.0f) : x;
    const vf far = 1.0f - 2.0f / (exp(2.0f * clamped) + 1.0f);
    return z < 0.390625f ? near : far;
}

template <class T>
struct Matrix {  // heads of rows; the last dim is contiguous
    const T* data;
    int64_t head, token;
    const T* at(int64_t h, int64_t t) const { return data + h * head + t * token; }
};

template <class T>
struct Call {
    Matrix<T> q, k, v;
    T* out;
    int64_t out_head, out_token;
    const int32_t* offsets;
    int64_t segments, heads, kv_heads, width, value_width;
    float scale;
    int64_t causal, window;
    float softcap;
    int64_t mask_kind;  // 0 none, 1 bool, 2 float
    const void* mask;
    int64_t mask_batch, mask_head, mask_row, mask_col;
    const int64_t *rows, *cols;
    const float* sinks;  // a score of each head that has no value, or none
    const float* sink(int64_t head) const { return sinks ? sinks + head : nullptr; }
};

struct Task {
    int32_t begin, length, first, last, kv_head;  // queries first .. last of the segment at `begin`
};

int64_t padded(int64_t n) { return (n + NR - 1) / NR * NR; }

// Which keys the queries of a task see.
template <class T>
struct Seen {
    const Call<T>& c;
    const Task& t;
    int64_t lowest(int64_t i) const { return c.window >= 0 ? std::max<int64_t>(0, i - c.window) : 0; }
    int64_t highest(int64_t i) const {
        const int64_t end = c.causal ? i + 1 : c.window >= 0 ? i + c.window + 1 : t.length;
        return std::min<int64_t>(end, t.length);
    }
};

// The given mask at one query, added to (or cutting) its scores for keys 0 .. n.
template <class T>
void apply_mask(const Call<T>& c, int64_t head, int64_t token, const int64_t* cols, int64_t n, float* s) {
    const int64_t base = c.rows[token] * c.mask_batch + head * c.mask_head + c.cols[token] * c.mask_row;
    if (c.mask_kind == 1) {
        const uint8_t* m = static_cast<const uint8_t*>(c.mask) + base;
        for (int64_t j = 0; j < n; ++j) s[j] = m[cols[j] * c.mask_col] ? s[j] : -INFINITY;
    } else {
        const float* m = static_cast<const float*>(c.mask) + base;
        for (int64_t j = 0; j < n; ++j) s[j] += m[cols[j] * c.mask_col];
    }
}

// Turns scores low .. high of one query into weights, zero elsewhere in 0 .. size, and returns 1 / their sum.
// The weights of a query that sees nothing are zero. Vectors may run past `high`: `size` is padded.
// sink: a score that takes its share and has no weight of its own, or none.
float softmax(float* s, int64_t low, int64_t high, int64_t size, const float* sink) {
    std::fill(s, s + low, -INFINITY);
    std::fill(s + high, s + size, -INFINITY);
    vf peaks = all(-INFINITY);
    for (int64_t j = 0; j < size; j += V) {
        const vf x = widen(s + j);
        peaks = x > peaks ? x : peaks;
    }
    float peak = sink ? *sink : -INFINITY;
    for (int i = 0; i < V; ++i) peak = std::max(peak, peaks[i]);
    if (peak == -INFINITY) peak = 0.0f;  // nothing is seen, or only NaN, which the weights keep
    vf sums{};
    for (int64_t j = 0; j < size; j += V) {
        const vf w = exp(widen(s + j) - peak);
        store(s + j, w);
        sums += w;
    }
    float sum = sink ? std::exp(*sink - peak) : 0.0f;
    for (int i = 0; i < V; ++i) sum += sums[i];
    return sum == 0.0f ? 0.0f : 1.0f / sum;
}

void softcap(float* s, int64_t size, float cap) {
    for (int64_t j = 0; j < size; j += V) store(s + j, cap * tanh(widen(s + j) / cap));
}

// Filler sees only itself: its values are its result.
template <class T>
void copy_values(const Call<T>& c, const Task& t, int64_t head) {
    for (int64_t i = t.first; i < t.last; ++i)
        std::memcpy(c.out + head * c.out_head + (t.begin + i) * c.out_token, c.v.at(t.kv_head, t.begin + i),
                    c.value_width * sizeof(T));
}

// A call from what Python hands over. strides: head and token strides of q, k, v and out, then the mask's batch,
// head, row and column strides, in elements. sizes: segments, heads, kv heads, width, value width. mask_kind: 0 none,
// 1 bool, 2 float; without a mask, `mask`, `rows` and `cols` are not read. sinks: one a head, or null.
template <class T>
Call<T> call_of(const T* q, const T* k, const T* v, T* out, const int32_t* offsets, const int64_t* sizes,
                const int64_t* strides, float scale, int causal, int64_t window, float softcap, int mask_kind,
                const void* mask, const int64_t* rows, const int64_t* cols, const float* sinks) {
    return {{q, strides[0], strides[1]}, {k, strides[2], strides[3]}, {v, strides[4], strides[5]},
            out, strides[6], strides[7], offsets, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
            scale, causal, window, softcap, mask_kind, mask,
            strides[8], strides[9], strides[10], strides[11], rows, cols, sinks};
}

// Runs all tasks of a call over `threads`. words: of 4 bytes, that a task needs for so many keys, a padded number.
// run(task, memory). Returns 0, or 1 when memory ran out.
template <class T, class Words, class Run>
int over_tasks(const Call<T>& c, int threads, Words words, Run run) {
    std::vector<Task> tasks;
    int64_t longest = 0;
    for (int64_t s = 0; s < c.segments; ++s) {
        const int32_t length = c.offsets[s + 1] - c.offsets[s];
        longest = std::max<int64_t>(longest, length);
        for (int32_t first = 0; first < length; first += CHUNK)
            for (int32_t h = 0; h < c.kv_heads; ++h)
                tasks.push_back({c.offsets[s], length, first, std::min(first + CHUNK, length), h});
    }
    if (tasks.empty()) return 0;
    // the costliest first, so that no thread starts a long one last; the order changes no result
    std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) { return a.length > b.length; });
    // keys a task can see: its segment, or its chunk and a window to either side
    int64_t reach = longest;
    if (c.window >= 0) reach = std::min(longest, CHUNK + 2 * c.window);
    const int64_t each = words(padded(reach) + NR);
    threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks.size())));
    float* memory = static_cast<float*>(std::malloc(each * threads * sizeof(float)));
    if (!memory) return 1;
#pragma omp parallel num_threads(threads)
    {
        float* mine = memory + each * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tasks.size(); ++i) run(tasks[i], mine);
    }
    std::free(memory);
    return 0;
}

}  // namespace
