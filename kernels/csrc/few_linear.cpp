// Linear layers for a few tokens: each row of the weight is read once, in order, and meets every token.
//
// At one token a product is a walk through memory, at the memory's speed if nothing holds it up. BLAS libraries
// reach half to three quarters of that, with half types a third.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "simd.h"

namespace {

constexpr int TOKENS = 2;  // more make it a matrix product, which libraries do better
constexpr int ROWS = 4;    // read abreast where the tokens do not fit the first cache beside a row
constexpr int PARTS = 2;   // sums of one product: a chain of additions waits for itself
constexpr int LINE = 64;   // bytes
constexpr int64_t WIDE = 4096;  // inputs

// out[r][t] = row r . x[t] for R rows and T tokens; x [T][K] in fp32. ahead: bytes to ask for before they are needed.
// What a product is computed beside does not change its bits.
template <class W, int R, int T>
INLINE void dots(const W* row, const float* x, int64_t K, int64_t ahead, float* out) {
    vf sum[R][T][PARTS] = {};
    int64_t k = 0;
    for (; k + PARTS * V <= K; k += PARTS * V)
        UNROLL for (int r = 0; r < R; ++r) {
            const W* place = row + r * K + k;
            UNROLL for (int byte = 0; byte < int(PARTS * V * sizeof(W)); byte += LINE)
                __builtin_prefetch(reinterpret_cast<const char*>(place) + ahead + byte, 0, 2);
            UNROLL for (int p = 0; p < PARTS; ++p) {
                vf w = widen(place + p * V);
                IN_REGISTER(w);
                UNROLL for (int t = 0; t < T; ++t)
                    sum[r][t][p] = multiply_add(w, widen(x + t * K + k + p * V), sum[r][t][p]);
            }
        }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) {
            const vf both = sum[r][t][0] + sum[r][t][1];
            float total = 0;
            for (int lane = 0; lane < V; ++lane) total += both[lane];
            for (int64_t rest = k; rest < K; ++rest)
                total = multiply_add(one(row[r * K + rest]), x[t * K + rest], total);
            out[r * T + t] = total;
        }
}

template <class W>
INLINE void dots(int rows, int tokens, const W* row, const float* x, int64_t K, int64_t ahead, float* out) {
    if (rows == ROWS) return tokens == 2 ? dots<W, ROWS, 2>(row, x, K, ahead, out) : dots<W, ROWS, 1>(row, x, K, ahead, out);
    for (int r = 0; r < rows; ++r, row += K, out += tokens)
        tokens == 2 ? dots<W, 1, 2>(row, x, K, ahead, out) : dots<W, 1, 1>(row, x, K, ahead, out);
}

template <class A>
void run(const A* x, int64_t tokens, int64_t K, int64_t N, const A* weight, const A* bias, bool relu, A* out,
         int threads) {
    const float* wide = reinterpret_cast<const float*>(x);
    static thread_local std::vector<float> block;  // kept: a fresh one would fault its pages in again
    if (sizeof(A) != sizeof(float)) {
        if (int64_t(block.size()) < tokens * K) block.resize(tokens * K);
        for (int64_t i = 0; i < tokens * K; ++i) block[i] = one(x[i]);
        wide = block.data();
    }
    const int64_t step = tokens == 1 && K <= WIDE ? 1 : ROWS, ahead = step == 1 || K > WIDE ? 4096 : 16384;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t n = 0; n < N; n += step)
        for (int64_t t = 0; t < tokens; t += TOKENS) {
            const int some = int(std::min<int64_t>(TOKENS, tokens - t)), rows = int(std::min(step, N - n));
            float sums[ROWS * TOKENS];
            dots(rows, some, weight + n * K, wide + t * K, K, ahead, sums);
            for (int r = 0; r < rows; ++r)
                for (int i = 0; i < some; ++i) {
                    float y = sums[r * some + i] + (bias ? one(bias[n + r]) : 0.0f);
                    if (relu && y < 0) y = 0;  // a NaN stays
                    put(out + (t + i) * N + n + r, y);
                }
        }
}

}  // namespace

// out [tokens, N] = act(x [tokens, K] . weight [N, K] transposed + bias [N]); type 0 is fp32, 1 is bf16.
extern "C" void thresher_few_linear(const void* x, int type, int64_t tokens, int64_t K, int64_t N,
                                    const void* weight, const void* bias, int relu, void* out, int threads) {
    if (type)
        run((const bf16*)x, tokens, K, N, (const bf16*)weight, (const bf16*)bias, relu, (bf16*)out, threads);
    else
        run((const float*)x, tokens, K, N, (const float*)weight, (const float*)bias, relu, (float*)out, threads);
}
