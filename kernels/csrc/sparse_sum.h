// Sums of the rows of active neurons, each times its coefficient.
//
// Every output column is a sum over blocks of BLOCK neurons, each a chain of fused multiply-adds in
// ascending order, whatever the batch, the thread count and the other neurons. A neuron whose coefficient
// is zero leaves its chain's bits as they are, so skipping it equals running it, bit for bit. The blocks
// keep chains short: one chain over all neurons has several times the rounding error of a dense product.
#pragma once

#include <algorithm>

#include "sparse_active.h"
#include "sparse_rows.h"
#include "thread_work.h"

namespace {

constexpr int ROWS = 8;  // neurons per pass over the columns: as many streams as a cache has ways
constexpr int TOKENS = 4;  // tokens per register tile
constexpr int64_t BLOCK = 512;  // neurons
constexpr int64_t AHEAD = 64 << 10;  // bytes of weights that are asked for before they are needed

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

}  // namespace
