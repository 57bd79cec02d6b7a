// MLPs that read only the weights of active neurons.
//
// Weights are neuron-major: row i holds what neuron i needs, so a neuron that is off costs nothing.
// One call finds the neurons that any of its tokens keeps (the union), and adds their rows up.
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <type_traits>

#include "dense_bf16.h"
#include "sparse_active.h"
#include "sparse_rows.h"
#include "sparse_sum.h"
#include "thread_work.h"

namespace {

// Dot products of T tokens with N rows: out[n][t]. Each has one accumulator of its own, so its bits
// do not depend on the company it is computed in.
template <class W, int N, int T>
INLINE void dots(const W* const* rows, const float* x, int64_t ld, int64_t K, float* out) {
    vf sum[N][T] = {};
    int64_t k = 0;
    for (; k + V <= K; k += V)
        UNROLL for (int n = 0; n < N; ++n) {
            vf w = widen(rows[n] + k);
            UNROLL for (int t = 0; t < T; ++t) sum[n][t] = multiply_add(w, widen(x + t * ld + k), sum[n][t]);
        }
    for (int n = 0; n < N; ++n)
        for (int t = 0; t < T; ++t) {
            float total = 0;
            for (int lane = 0; lane < V; ++lane) total += sum[n][t][lane];
            for (int64_t rest = k; rest < K; ++rest)
                total = multiply_add(one(rows[n][rest]), x[t * ld + rest], total);
            out[n * T + t] = total;
        }
}

template <class W, class O>
void down(const Active& active, int64_t tokens, const W* weight, const float* scale, int64_t groups, int64_t D,
          const O* bias, O* out, int threads) {
    const bool narrow = sizeof(O) != sizeof(float);
    float* acc = narrow ? scratch<float, 0>(tokens * D) : reinterpret_cast<float*>(out);
    float* part = scratch<float, 3>(tokens * D);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;
        share(D, omp_get_num_threads(), omp_get_thread_num(), &begin, &end);
        add_rows(active, tokens, weight, scale, groups, D, part, acc, begin, end);
        if (bias || narrow)
            for (int64_t t = 0; t < tokens; ++t) {
                const float* sums = acc + t * D;
                int64_t d = begin;
                if constexpr (SPLIT<W>)
                    for (; d + 2 * V <= end; d += 2 * V) put_pair(out + t * D + d, sums + d, bias ? bias + d : nullptr);
                for (; d < end; ++d) put(out + t * D + d, sums[d] + (bias ? one(bias[d]) : 0.0f));
            }
    }
}

// value[n][t] *= act(x[t] . up[index[n]] + bias): the up projection of the active neurons.
template <class W, class A>
void up(const Active& active, float* value, int64_t tokens, const float* x, int64_t K, const W* weight,
        const float* scale, const A* bias, bool relu, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t first = 0; first < active.count; first += 4) {
        const W* rows[4];
        const int n = int(std::min<int64_t>(4, active.count - first));
        for (int r = 0; r < 4; ++r) rows[r] = weight + active.index[first + std::min(r, n - 1)] * K;
        for (int64_t t = 0; t < tokens; t += 2) {
            float u[8];
            const int some = int(std::min<int64_t>(2, tokens - t));
            if (some == 2)
                dots<W, 4, 2>(rows, x + t * K, K, K, u);
            else
                dots<W, 4, 1>(rows, x + t * K, K, K, u);
            for (int r = 0; r < n; ++r)
                for (int k = 0; k < some; ++k) {
                    const int64_t i = active.index[first + r];
                    float y = multiply_add(u[r * some + k], scale ? scale[i] : 1.0f, bias ? one(bias[i]) : 0.0f);
                    if (relu && y < 0) y = 0;  // a NaN stays
                    float& v = value[(first + r) * tokens + t + k];
                    if (v != 0) v *= y;  // a neuron this token does not keep stays 0, whatever y is
                }
        }
    }
}

template <class W, class A>
int64_t run_down(const A* act, int64_t tokens, int64_t F, int64_t D, const float* threshold, bool each,
                 const W* weight, const float* scale, int64_t groups, const A* bias, A* out, int64_t limit,
                 int threads) {
    int32_t* index = scratch<int32_t, 0>(F + SLACK);
    float* value = scratch<float, 1>(F * tokens);
    const int64_t count = scan(act, tokens, F, threshold, each, limit, index, value);
    if (count >= 0)
        down(Active{index, value, count}, tokens, weight, scale, groups, D, bias, out, threads);
    return count;
}

template <class W, class A>
int64_t run_mlp(const A* gate, const A* x, int64_t tokens, int64_t F, int64_t K, int64_t D,
                const float* threshold, bool each, const W* up_weight, const float* up_scale, const A* up_bias,
                bool up_relu, const W* weight, const float* scale, int64_t groups, const A* bias, A* out,
                int64_t limit, int threads) {
    int32_t* index = scratch<int32_t, 0>(F + SLACK);
    float* value = scratch<float, 1>(F * tokens);
    const int64_t count = scan(gate, tokens, F, threshold, each, limit, index, value);
    if (count < 0) return count;
    const float* x32 = reinterpret_cast<const float*>(x);
    if (sizeof(A) != sizeof(float)) {
        float* wide = scratch<float, 2>(tokens * K);
        for (int64_t i = 0; i < tokens * K; ++i) wide[i] = one(x[i]);
        x32 = wide;
    }
    Active active{index, value, count};
    up(active, value, tokens, x32, K, up_weight, up_scale, up_bias, up_relu, threads);
    if (up_relu) {  // the second ReLU switches more neurons off
        int64_t left = 0;
        for (int64_t n = 0; n < count; ++n) {
            const float* v = value + n * tokens;
            if (std::all_of(v, v + tokens, [](float h) { return h == 0; })) continue;
            index[left] = index[n];
            std::copy(v, v + tokens, value + left++ * tokens);
        }
        active.count = left;
    }
    down(active, tokens, weight, scale, groups, D, bias, out, threads);
    return count;
}

enum Type { F32 = 0, BF16 = 1, I8 = 2, I4 = 3 };

// Calls f(weight pointer type, activation pointer type) for the two type tags.
template <class F>
int64_t with_types(int act, int weight, F f) {
    if (act == F32 && weight == F32) return f((const float*)0, (const float*)0);
    if (act == F32 && weight == I8) return f((const int8_t*)0, (const float*)0);
    if (act == BF16 && weight == BF16) return f((const bf16*)0, (const bf16*)0);
    if (act == BF16 && weight == I8) return f((const int8_t*)0, (const bf16*)0);
    if (act == F32 && weight == I4) return f((const i4*)0, (const float*)0);
    if (act == BF16 && weight == I4) return f((const i4*)0, (const bf16*)0);
    return -2;
}

}  // namespace

// Both return the number of neurons in the union, -1 if it exceeds `limit` (nothing is written),
// or -2 for a pair of types that has no kernel. Shapes: act, gate [tokens, F]; x [tokens, K];
// up_weight [F, K]; weight [F, D]; up_scale [F]; scale [F, groups]; biases and out of the
// activations' type; threshold one float, or F of them when `each`.
extern "C" int64_t thresher_sparse_down(const void* act, int act_type, int64_t tokens, int64_t F, int64_t D,
                                        const float* threshold, int each, const void* weight, int weight_type,
                                        const float* scale, int64_t groups, const void* bias, void* out,
                                        int64_t limit, int threads) {
    return with_types(act_type, weight_type, [&](auto w, auto a) {
        typedef std::remove_const_t<std::remove_pointer_t<decltype(a)>> A;
        return run_down((const A*)act, tokens, F, D, threshold, each, (decltype(w))weight, scale, groups,
                        (const A*)bias, (A*)out, limit, threads);
    });
}

extern "C" int64_t thresher_sparse_mlp(const void* gate, const void* x, int act_type, int64_t tokens, int64_t F,
                                       int64_t K, int64_t D, const float* threshold, int each,
                                       const void* up_weight, int weight_type, const float* up_scale,
                                       const void* up_bias, int up_relu, const void* weight, const float* scale,
                                       int64_t groups, const void* bias, void* out, int64_t limit, int threads) {
    return with_types(act_type, weight_type, [&](auto w, auto a) {
        typedef std::remove_const_t<std::remove_pointer_t<decltype(a)>> A;
        typedef std::remove_const_t<std::remove_pointer_t<decltype(w)>> W;
        if constexpr (std::is_same<W, i4>::value)
            return -2;  // an up projection has no outputs to lay groups along
        else
            return run_mlp((const A*)gate, (const A*)x, tokens, F, K, D, threshold, each, (decltype(w))up_weight,
                       up_scale, (const A*)up_bias, up_relu, (decltype(w))weight, scale, groups, (const A*)bias,
                       (A*)out, limit, threads);
    });
}

// act [tokens, F] . weight [F, D] + bias, all bf16. False where this CPU or this shape has no kernel.
extern "C" int thresher_dense_bf16(const void* act, int64_t tokens, int64_t F, int64_t D, const void* weight,
                                   const void* bias, void* out, int threads) {
#if defined(__AVX512BF16__)
    if (D % (2 * V) == 0) {
        dense((const bf16*)act, tokens, F, D, (const bf16*)weight, (const bf16*)bias, (bf16*)out, threads);
        return true;
    }
#endif
    (void)act, (void)tokens, (void)F, (void)D, (void)weight, (void)bias, (void)out, (void)threads;
    return false;
}

// Asks the system for large pages under a weight: a row that was not read lately then costs one
// look-up instead of several. Best effort; the weight's contents do not change.
extern "C" void thresher_large_pages(void* start, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t page = 2 << 20, from = (uintptr_t(start) + page - 1) / page * page;
    const uintptr_t to = (uintptr_t(start) + bytes) / page * page;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}
