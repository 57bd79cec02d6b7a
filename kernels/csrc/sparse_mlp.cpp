// MLPs that read only the weights of active neurons.
//
// Weights are neuron-major: row i holds what neuron i needs, so a neuron that is off costs nothing.
// One call finds the neurons that any of its tokens keeps (the union), and adds their rows up.
//
// Every output column is a sum over blocks of BLOCK neurons, each a chain of fused multiply-adds in
// ascending order, whatever the batch, the thread count and the other neurons. A neuron whose coefficient
// is zero leaves its chain's bits as they are, so skipping it equals running it, bit for bit. The blocks
// keep chains short: one chain over all neurons has several times the rounding error of a dense product.
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace {

constexpr int ROWS = 8;    // neurons per pass over the columns: as many streams as a cache has ways
constexpr int TOKENS = 4;  // tokens per register tile
constexpr int LINE = 64;   // bytes
constexpr int64_t BLOCK = 512;  // neurons
constexpr int64_t AHEAD = 64 << 10;  // bytes of weights that are asked for before they are needed

constexpr int64_t SLACK = 16;  // what `scan` may write beyond the last index

enum Type { F32 = 0, BF16 = 1, I8 = 2, I4 = 3 };

// A place in a row of weights, counted in columns.
template <class W>
struct Row {
    const W* place;
    static constexpr int BITS = 8 * sizeof(W);
    INLINE Row operator+(int64_t columns) const { return {place + columns}; }
    INLINE vf wide() const { return widen(place); }
    INLINE float at(int64_t column) const { return one(place[column]); }
    INLINE const char* bytes() const { return reinterpret_cast<const char*>(place); }
};

// Half types come 2 * V columns at a time, those at even places and then those at odd ones: a shift and a mask widen
// them where a conversion in order would move them across the register as well. `down` puts them back in order.
template <class W>
constexpr bool SPLIT = std::is_same<W, bf16>::value && V == 16;
#if defined(__AVX512F__)
INLINE void wide_pair(Row<bf16> row, vf* even, vf* odd) {
    const __m512i both = _mm512_loadu_si512(row.place);
    *even = (vf)_mm512_slli_epi32(both, 16);
    *odd = (vf)_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000)));
}
// 32 columns out of their split sums, rounded as `put` does.
INLINE __m512i rounded(vf sum) {
    const __m512i u = (__m512i)sum, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)sum, (__m512)sum, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(nearest, nan, u, _mm512_set1_epi32(0x400000));
}
INLINE void put_pair(bf16* out, const float* sums, const bf16* bias) {
    vf even = widen(sums), odd = widen(sums + V), e, o;
    if (bias) {
        wide_pair(Row<bf16>{bias}, &e, &o);
        even += e, odd += o;
    }
    const __m512i high = _mm512_and_si512(rounded(odd), _mm512_set1_epi32(int(0xffff0000)));
    _mm512_storeu_si512(out, _mm512_or_si512(_mm512_srli_epi32(rounded(even), 16), high));
}
#endif
// C * V columns of a row.
template <int C, class W>
INLINE void wide(Row<W> row, vf* out) {
#if defined(__AVX512F__)
    if constexpr (SPLIT<W> && C % 2 == 0) {
        UNROLL for (int c = 0; c < C; c += 2) wide_pair(row + c * V, out + c, out + c + 1);
        return;
    }
#endif
    UNROLL for (int c = 0; c < C; ++c) out[c] = (row + c * V).wide();
}

// Two columns a byte, the first in the low half, each the code less 8. Only even numbers of columns are added.
struct i4 {
    uint8_t pair;
};
template <>
struct Row<i4> {
    const i4* place;
    static constexpr int BITS = 4;
    INLINE Row operator+(int64_t columns) const { return {place + columns / 2}; }
    INLINE float at(int64_t column) const { return float((place[column / 2].pair >> (column % 2 * 4)) & 15) - 8; }
    INLINE const char* bytes() const { return reinterpret_cast<const char*>(place); }
    INLINE vf wide() const {
#if defined(__AVX512F__)
        const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(place)), low = _mm_set1_epi8(15);
        const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
        return (vf)_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(codes), _mm512_set1_epi32(8)));
#else
        vf v;
        for (int i = 0; i < V; ++i) v[i] = at(i);
        return v;
#endif
    }
};

// Working memory number K of this thread, kept between calls: a fresh block this large would be
// returned to the system after each call and cost a page fault for every page of the next.
template <class E, int K>
E* scratch(int64_t size) {
    static thread_local std::vector<E> block;
    if (int64_t(block.size()) < size) block.resize(size);
    return block.data();
}

// Columns [col, col + C * V) of T tokens: acc[t] += sum over n rows of coef[r][t] * row[r].
// N fixes n at compile time.
template <class W, int T, int C, int N>
INLINE void tile(const Row<W>* rows, const float* coef, int n, float* acc, int64_t ld, int64_t col) {
    vf sum[T][C];
    UNROLL for (int t = 0; t < T; ++t)
        UNROLL for (int c = 0; c < C; ++c) sum[t][c] = widen(acc + t * ld + col + c * V);
    UNROLL for (int r = 0; r < (N ? N : n); ++r) {
        vf w[C];
        wide<C>(rows[r] + col, w);
        UNROLL for (int c = 0; c < C; ++c) IN_REGISTER(w[c]);
        UNROLL for (int t = 0; t < T; ++t)
            UNROLL for (int c = 0; c < C; ++c)
                sum[t][c] = multiply_add(all(coef[r * T + t]), w[c], sum[t][c]);
    }
    UNROLL for (int t = 0; t < T; ++t)
        UNROLL for (int c = 0; c < C; ++c) std::memcpy(acc + t * ld + col + c * V, &sum[t][c], sizeof(vf));
}

// Asks for COLS columns of the rows of a later pass. Rows lie apart, and the CPU's own prefetcher finds a row
// only after its first lines have missed: at 5 % density that is a third of the time. A CPU with all its miss buffers
// taken drops what it is asked for, so each line is asked for twice: rows of bytes take two steps to a line, and
// for those of half types the next line is asked for as well.
template <class W, int COLS>
INLINE void fetch(const Row<W>* later, int64_t col) {
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int byte = 0; byte < COLS * Row<W>::BITS / 8; byte += LINE) {
            __builtin_prefetch((later[r] + col).bytes() + byte, 0, 2);
            if (Row<W>::BITS == 16) __builtin_prefetch((later[r] + col).bytes() + byte + LINE, 0, 2);
        }
}

// The same as `tile` for one token: coefficients stay in registers.
template <class W, int C, int N>
int64_t stream(const Row<W>* rows, const Row<W>* later, const float* coef, float* acc, int64_t begin,
                      int64_t end) {
    Row<W> row[N];
    vf k[N];
    UNROLL for (int r = 0; r < N; ++r) row[r] = rows[r], k[r] = all(coef[r]);
    int64_t col = begin;
    for (; col + C * V <= end; col += C * V) {
        fetch<W, C * V>(later, col);
        if (Row<W>::BITS == 8) fetch<W, C * V>(later + ROWS, col);
        vf sum[C];
        UNROLL for (int c = 0; c < C; ++c) sum[c] = widen(acc + col + c * V);
        UNROLL for (int r = 0; r < N; ++r) {
            vf w[C];
            wide<C>(row[r] + col, w);
            UNROLL for (int c = 0; c < C; ++c) sum[c] = multiply_add(k[r], w[c], sum[c]);
        }
        UNROLL for (int c = 0; c < C; ++c) std::memcpy(acc + col + c * V, &sum[c], sizeof(vf));
    }
    return col;
}

template <class W, int C>
int64_t stream(int n, const Row<W>* rows, const Row<W>* later, const float* coef, float* acc, int64_t begin,
               int64_t end) {
    switch (n) {
        case 1: return stream<W, C, 1>(rows, later, coef, acc, begin, end);
        case 2: return stream<W, C, 2>(rows, later, coef, acc, begin, end);
        case 3: return stream<W, C, 3>(rows, later, coef, acc, begin, end);
        case 4: return stream<W, C, 4>(rows, later, coef, acc, begin, end);
        case 5: return stream<W, C, 5>(rows, later, coef, acc, begin, end);
        case 6: return stream<W, C, 6>(rows, later, coef, acc, begin, end);
        case 7: return stream<W, C, 7>(rows, later, coef, acc, begin, end);
        default: return stream<W, C, 8>(rows, later, coef, acc, begin, end);
    }
}

// Columns [begin, end) of T tokens for one pass of n rows. later: ROWS rows of a later pass to ask for.
template <class W, int T>
void pass(const Row<W>* rows, const Row<W>* later, const float* coef, int n, float* acc, int64_t ld,
          int64_t begin, int64_t end) {
    constexpr int C = T <= 2 ? 4 : 2;
    int64_t col = begin;
    if (T == 1) col = stream<W, 2>(n, rows, later, coef, acc, begin, end);
    if (n == ROWS)
        for (; col + C * V <= end; col += C * V) {
            if (T > 1) fetch<W, C * V>(later, col);
            tile<W, T, C, ROWS>(rows, coef, n, acc, ld, col);
        }
    for (; col + C * V <= end; col += C * V) tile<W, T, C, 0>(rows, coef, n, acc, ld, col);
    if (C > 2)
        for (; col + 2 * V <= end; col += 2 * V) tile<W, T, 2, 0>(rows, coef, n, acc, ld, col);
    for (; col + V <= end; col += V) tile<W, T, 1, 0>(rows, coef, n, acc, ld, col);
    for (; col < end; ++col)
        for (int t = 0; t < T; ++t) {
            float sum = acc[t * ld + col];
            for (int r = 0; r < n; ++r) sum = multiply_add(coef[r * T + t], rows[r].at(col), sum);
            acc[t * ld + col] = sum;
        }
}

template <class W>
void pass(int tokens, const Row<W>* rows, const Row<W>* later, const float* coef, int n, float* acc,
          int64_t ld, int64_t begin, int64_t end) {
    switch (tokens) {
        case 1: return pass<W, 1>(rows, later, coef, n, acc, ld, begin, end);
        case 2: return pass<W, 2>(rows, later, coef, n, acc, ld, begin, end);
        case 3: return pass<W, 3>(rows, later, coef, n, acc, ld, begin, end);
        default: return pass<W, 4>(rows, later, coef, n, acc, ld, begin, end);
    }
}

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

template <class A>
INLINE bool keeps(A a, float threshold) {
    return !(std::fabs(one(a)) <= threshold);  // so written, a NaN is kept
}

// The neurons that some token keeps, ascending, and a coefficient for each and every token.
struct Active {
    const int32_t* index;
    const float* value;  // [count][tokens]
    int64_t count;
};

// Fills `index` and `value` (0 where a token does not keep a neuron that another does) and returns
// the count; stops past `limit` neurons and returns -1.
template <class A>
int64_t scan(const A* act, int64_t tokens, int64_t F, const float* threshold, bool each, int64_t limit,
             int32_t* index, float* value) {
    int64_t count = 0, from = 0;
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 limits = _mm512_set1_ps(*threshold);
    for (; from + V <= F; from += V) {
        if (each) limits = _mm512_loadu_ps(threshold + from);
        __mmask16 on = 0;
        for (int64_t t = 0; t < tokens; ++t)  // not less or equal, or unordered: so a NaN is kept
            on |= _mm512_cmp_ps_mask(_mm512_abs_ps((__m512)widen(act + t * F + from)), limits, _CMP_NLE_UQ);
        const __m512i neurons = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(from)));
        _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(on, neurons));
        count += __builtin_popcount(on);
        if (count > limit) return -1;
    }
#endif
    constexpr int64_t SOME = 256;
    uint8_t keep[SOME];
    for (int64_t first = from; first < F; first += SOME) {
        const int64_t size = std::min(SOME, F - first);
        std::memset(keep, 0, sizeof keep);
        for (int64_t t = 0; t < tokens; ++t) {
            const A* a = act + t * F + first;
            if (each)
                for (int64_t i = 0; i < size; ++i) keep[i] |= keeps(a[i], threshold[first + i]);
            else
                for (int64_t i = 0; i < size; ++i) keep[i] |= keeps(a[i], *threshold);
        }
        for (int64_t group = 0; group < size; group += 8) {
            uint64_t any;
            std::memcpy(&any, keep + group, sizeof any);
            if (!any) continue;
            for (int64_t i = group; i < group + 8; ++i) {
                index[count] = int32_t(first + i);
                count += keep[i];
            }
        }
        if (count > limit) return -1;
    }
    for (int64_t n = 0; n < count; ++n)
        for (int64_t t = 0; t < tokens; ++t) {
            const A a = act[t * F + index[n]];
            value[n * tokens + t] = keeps(a, threshold[each ? index[n] : 0]) ? one(a) : 0.0f;
        }
    return count;
}

// Columns [begin, end) of acc[tokens][D] = value^T * weight[index], a block of neurons after the other in `part`.
template <class W>
void add_rows(const Active& active, int64_t tokens, const W* weight, const float* scale, int64_t groups,
              int64_t D, float* part, float* acc, int64_t begin, int64_t end) {
    Row<W> rows[2 * ROWS], later[2 * ROWS];  // later: those `ahead` rows on, and half as far
    float coef[ROWS * TOKENS];
    const Row<W> first_row{weight};
    std::fill(rows, rows + 2 * ROWS, first_row);
    const int64_t width = D / groups;
    const int64_t row_bytes = std::max<int64_t>(1, (end - begin) * Row<W>::BITS / 8);
    const int64_t ahead = ROWS * std::clamp<int64_t>(AHEAD / (ROWS * row_bytes), 1, 8);
    for (int64_t n = 0; n < std::min(ahead, active.count); ++n) {
        const char* row = (first_row + (active.index[n] * D + begin)).bytes();
        __builtin_prefetch(row, 0, 2);
        __builtin_prefetch(row + LINE, 0, 2);
    }
    for (int64_t t = 0; t < tokens; ++t) std::fill(acc + t * D + begin, acc + t * D + end, 0.0f);
    for (int64_t first = 0; first < active.count;) {
        const int64_t block = active.index[first] / BLOCK;
        for (int64_t t = 0; t < tokens; ++t) std::fill(part + t * D + begin, part + t * D + end, 0.0f);
        while (first < active.count && active.index[first] / BLOCK == block) {
            int n = 1;
            while (n < ROWS && first + n < active.count && active.index[first + n] / BLOCK == block) ++n;
            for (int r = 0; r < n; ++r) rows[r] = first_row + active.index[first + r] * D;
            for (int r = 0; r < 2 * ROWS; ++r)
                later[r] = first_row + active.index[std::min(first + ahead / (1 + r / ROWS) + r % ROWS, active.count - 1)] * D;
            for (int64_t g = begin / width; g * width < end; ++g) {
                const int64_t from = std::max(begin, g * width), to = std::min(end, (g + 1) * width);
                for (int64_t t = 0; t < tokens; t += TOKENS) {
                    const int some = int(std::min<int64_t>(TOKENS, tokens - t));
                    for (int r = 0; r < n; ++r) {
                        const float s = scale ? scale[active.index[first + r] * groups + g] : 1.0f;
                        for (int k = 0; k < some; ++k)
                            coef[r * some + k] = active.value[(first + r) * tokens + t + k] * s;
                    }
                    pass<W>(some, rows, t ? rows : later, coef, n, part + t * D, D, from, to);
                }
            }
            first += n;
        }
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t d = begin; d < end; ++d) acc[t * D + d] += part[t * D + d];
    }
}

// A thread's share of `total`, in units: whole cache lines of fp32.
INLINE void share(int64_t total, int threads, int thread, int64_t* begin, int64_t* end,
                  int64_t unit = LINE / sizeof(float)) {
    const int64_t units = (total + unit - 1) / unit;
    *begin = std::min(total, units * thread / threads * unit);
    *end = std::min(total, units * (thread + 1) / threads * unit);
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

#if defined(__AVX512BF16__)
constexpr int64_t PAIRS = 64;  // of neurons a panel; 32 columns of them fill a quarter of the first cache
constexpr int BATCH = 12;      // tokens whose sums stay in registers

// 32 columns of a panel of neuron pairs, side by side as the products want them: rows lie a power of two apart, and
// so would meet in one place of the cache if every batch of tokens read them anew.
void pack(const bf16* weight, int64_t D, int64_t neurons, __m512i* panel) {
    const __m512i none = _mm512_setzero_si512();
    for (int64_t n = 0; n < neurons; n += 2) {
        const __m512i a = _mm512_loadu_si512(weight + n * D);
        const __m512i b = n + 1 < neurons ? _mm512_loadu_si512(weight + (n + 1) * D) : none;
        _mm512_store_si512(panel + n, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(panel + n + 1, _mm512_unpackhi_epi16(a, b));
    }
}

// acc [T][32] += panel . coef [pairs][T]: sums of products of neuron pairs, in the order the interleaving leaves them.
// Asks for a line of each neuron of the next panel, from `next` on.
template <int T>
void dense_tile(const __m512i* panel, int64_t pairs, const uint32_t* coef, float* acc, const bf16* next, int64_t D) {
    __m512 low[T], high[T];
    _Pragma("GCC unroll 16") for (int t = 0; t < T; ++t) {
        low[t] = _mm512_loadu_ps(acc + t * 2 * V);
        high[t] = _mm512_loadu_ps(acc + t * 2 * V + V);
    }
    for (int64_t n = 0; n < pairs; ++n) {
        const __m512bh lower = (__m512bh)_mm512_load_si512(panel + 2 * n);
        const __m512bh upper = (__m512bh)_mm512_load_si512(panel + 2 * n + 1);
        const uint32_t* pair = coef + n * T;
        __builtin_prefetch(next + 2 * n * D, 0, 2);
        __builtin_prefetch(next + (2 * n + 1) * D, 0, 2);
        _Pragma("GCC unroll 16") for (int t = 0; t < T; ++t) {
            const __m512bh k = (__m512bh)_mm512_set1_epi32(int(pair[t]));
            low[t] = _mm512_dpbf16_ps(low[t], lower, k);
            high[t] = _mm512_dpbf16_ps(high[t], upper, k);
        }
    }
    _Pragma("GCC unroll 16") for (int t = 0; t < T; ++t) {
        _mm512_storeu_ps(acc + t * 2 * V, low[t]);
        _mm512_storeu_ps(acc + t * 2 * V + V, high[t]);
    }
}

// out[t] = act[t] . weight + bias with every neuron read, D a multiple of 32. Where a weight of this layout
// meets several tokens, PyTorch reorders it at every call, which costs twice the product.
void dense(const bf16* act, int64_t tokens, int64_t F, int64_t D, const bf16* weight, const bf16* bias, bf16* out,
           int threads) {
    constexpr int64_t COLS = 2 * V;
    // Batches of tokens lie one after the other, in `coef` [batch][pair][token] as in `acc` [columns / 32][token][32]:
    // with the strides of a whole row their places in a cache would be the same few.
    float* acc = scratch<float, 0>(tokens * D);
    const int64_t pairs = (F + 1) / 2, batches = (tokens + BATCH - 1) / BATCH;
    uint32_t* coef = scratch<uint32_t, 4>(pairs * tokens);
    constexpr int64_t SOME = LINE / sizeof(uint32_t);  // pairs
    for (int64_t batch = 0; batch < batches; ++batch) {
        const int64_t from = tokens * batch / batches, to = tokens * (batch + 1) / batches;
        for (int64_t first = 0; first < pairs; first += SOME)
            for (int64_t t = from; t < to; ++t)
                for (int64_t n = first; n < std::min(first + SOME, pairs); ++n) {
                    const bf16* a = act + t * F + 2 * n;
                    coef[from * pairs + n * (to - from) + t - from] =
                        a[0].bits | (2 * n + 1 < F ? uint32_t(a[1].bits) << 16 : 0);
                }
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;
        alignas(LINE) __m512i panel[2 * PAIRS];
        share(D, omp_get_num_threads(), omp_get_thread_num(), &begin, &end, COLS);
        std::fill(acc + begin * tokens, acc + end * tokens, 0.0f);
        for (int64_t first = 0; first < F; first += 2 * PAIRS) {
            const int64_t neurons = std::min(2 * PAIRS, F - first);
            for (int64_t col = begin; col < end; col += COLS) {
                pack(weight + first * D + col, D, neurons, panel);
                // After the last columns come the next neurons. A prefetch beyond the weight's end does nothing.
                const bf16* next = weight + (col + COLS < end ? first * D + col + COLS : (first + neurons) * D + begin);
                for (int64_t batch = 0; batch < batches; ++batch) {
                    const int64_t t = tokens * batch / batches, some = tokens * (batch + 1) / batches - t;
                    const uint32_t* k = coef + t * pairs + first / 2 * some;
                    float* sums = acc + col * tokens + t * COLS;
                    switch (some) {
#define TILE(T) case T: dense_tile<T>(panel, (neurons + 1) / 2, k, sums, batch ? act : next, batch ? 0 : D); break
                        TILE(1); TILE(2); TILE(3); TILE(4); TILE(5); TILE(6);
                        TILE(7); TILE(8); TILE(9); TILE(10); TILE(11); TILE(12);
#undef TILE
                    }
                }
            }
        }
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t col = begin; col < end; col += COLS)
                for (int64_t c = 0; c < COLS; ++c) {
                    // column c was summed in half (c / 4) % 2, at place c % 4 of group c / 8
                    const int64_t at = (c / 4) % 2 * V + c / 8 * 4 + c % 4;
                    put(out + t * D + col + c, acc[col * tokens + t * COLS + at] + (bias ? one(bias[col + c]) : 0.0f));
                }
    }
}
#endif

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
