// Low-bit linears for a few rows with AVX-512: one permutation turns codes into floats.
//
// Sixteen 32-bit lanes hold C codes each, C = 32 / bits (32 codes in three words at 3 bits). Shifting all lanes right
// by j * bits puts code j of each lane lowest, and a table of sixteen floats, looked up by the lowest four bits,
// gives its value; the table repeats where a code has fewer bits, so nothing is masked. The activations are laid out
// to match, once a call: lane l of vector j in block b holds x[b * 16 C + l * C + j]. A lane's codes share a scale,
// since groups are multiples of 32. As in the other kernel, zero points are applied to the groups' sums.
#pragma once
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VBMI2__)
#define WNA16_AVX512 1

namespace wide {

template <int kBits>
constexpr int lane_codes() { return kBits == 3 ? 32 : 32 / kBits; }
template <int kBits>
constexpr int block_codes() { return 16 * lane_codes<kBits>(); }
template <int kBits>
constexpr int block_words() { return kBits == 3 ? 48 : 16; }

// x laid out for `tile`: [m, blocks, C, 16], zero beyond k.
template <int kBits>
void arrange(const float* x, int64_t m, int64_t k, int64_t blocks, float* out) {
    constexpr int C = lane_codes<kBits>(), B = block_codes<kBits>();
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i steps = _mm512_mullo_epi32(lane, _mm512_set1_epi32(C));
    const int64_t full = k / B;
    for (int64_t i = 0; i < m; ++i)
        for (int64_t b = 0; b < full; ++b)
            for (int j = 0; j < C; ++j)
                _mm512_storeu_ps(out + ((i * blocks + b) * C + j) * 16,
                                 _mm512_i32gather_ps(steps, x + i * k + b * B + j, 4));
    for (int64_t i = 0; i < m; ++i)
        for (int64_t b = full; b < blocks; ++b)
            for (int l = 0; l < 16; ++l)
                for (int j = 0; j < C; ++j) {
                    const int64_t column = b * B + l * C + j;
                    out[((i * blocks + b) * C + j) * 16 + l] = column < k ? x[i * k + column] : 0.0f;
                }
}

// One block of a row: C vectors of sixteen codes, as floats, one at a time.
template <int kBits>
struct Codes {
    __m512i a, b, c;

    // words: how many of the block's exist; the others read as zero.
    inline void load(const uint8_t* p, int64_t words) {
        const auto part = [&](int64_t first) {
            const int64_t left = words - first;
            if (left >= 16) return _mm512_loadu_si512(p + first * 4);
            const __mmask16 there = left >= 16 ? 0xFFFF : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
            return _mm512_maskz_loadu_epi32(there, p + first * 4);
        };
        a = part(0);
        if constexpr (kBits == 3) {  // lane l of a, b, c: words 3l, 3l + 1, 3l + 2
            const __m512i second = part(16), third = part(32);
            const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const __m512i three = _mm512_mullo_epi32(lane, _mm512_set1_epi32(3));
            const auto pick = [&](int offset) {
                const __m512i at = _mm512_add_epi32(three, _mm512_set1_epi32(offset));
                const __m512i low = _mm512_permutex2var_epi32(a, at, second);
                const __mmask16 high = _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(32));
                return _mm512_mask_permutexvar_epi32(low, high, at, third);
            };
            const __m512i first = pick(0), middle = pick(1), last = pick(2);
            a = first, b = middle, c = last;
        }
    }

    template <int J>
    inline __m512 value(__m512 table) const {
        __m512i shifted;
        if constexpr (kBits == 3) {
            constexpr int bit = J * 3, word = bit / 32, shift = bit % 32;
            const __m512i& low = word == 0 ? a : word == 1 ? b : c;
            if constexpr (shift > 29) {
                const __m512i& high = word == 0 ? b : c;
                shifted = _mm512_shrdi_epi32(low, high, shift);
            } else {
                shifted = _mm512_srli_epi32(low, shift);
            }
        } else {
            shifted = _mm512_srli_epi32(a, J * kBits);
        }
        if constexpr (kBits == 8) return _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(255)));
        return _mm512_permutexvar_ps(shifted, table);
    }
};

template <int kBits, int R, int M, int J, int C>
struct Steps {
    static inline void go(const Codes<kBits>* codes, const float* const* x, __m512 table, __m512 (*acc)[M]) {
        __m512 w[R];
        for (int r = 0; r < R; ++r) w[r] = codes[r].template value<J>(table);
        for (int m = 0; m < M; ++m) {
            const __m512 v = _mm512_loadu_ps(x[m] + J * 16);
            for (int r = 0; r < R; ++r) acc[r][m] = _mm512_fmadd_ps(w[r], v, acc[r][m]);
        }
        if constexpr (J + 1 < C) Steps<kBits, R, M, J + 1, C>::go(codes, x, table, acc);
    }
};

// Weights that share a scale; with one scale a row, more than any row has.
inline int64_t group_size(int64_t k, int64_t groups) { return groups > 1 ? k / groups : int64_t(1) << 40; }

// Which of a block's scales each of 16 lanes has, a lane being `codes` weights on end.
inline __m512i scale_of_lane(int64_t codes, int64_t group) {
    alignas(64) int32_t places[16];
    for (int l = 0; l < 16; ++l) places[l] = static_cast<int32_t>(l * codes / group);
    return _mm512_load_si512(places);
}

// out[m, first + r] for R weight rows and M activation rows. x: as `arrange` gives. held: 2 * R * groups floats.
template <int kBits, int R, int M>
void tile(const Weight& w, int64_t first, const float* x, const float* sums, const float* bias, float* out,
          float* held) {
    constexpr int C = lane_codes<kBits>(), B = block_codes<kBits>(), W = block_words<kBits>();
    const int64_t blocks = (w.k + B - 1) / B, words = w.row_bytes / 4;
    const int64_t group = group_size(w.k, w.groups);
    alignas(64) float values[16];
    for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(i & ((1 << (kBits < 4 ? kBits : 4)) - 1));
    const __m512 table = _mm512_load_ps(values);
    const __m512i place = scale_of_lane(C, group);
    const uint8_t* rows[R];
    for (int r = 0; r < R; ++r) {
        rows[r] = w.codes + (first + r) * w.row_bytes;
        widen(w, first + r, held + 2 * r * w.groups, held + (2 * r + 1) * w.groups);
    }
    __m512 total[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
    const bool alone = w.groups == 1;
    for (int64_t b = 0; b < blocks; ++b) {
        Codes<kBits> codes[R];
        for (int r = 0; r < R; ++r) {
            codes[r].load(rows[r] + b * W * 4, words - b * W);
            __builtin_prefetch(rows[r] + b * W * 4 + R * w.row_bytes);  // the next tile: rows are short streams
        }
        const float* at[M];
        for (int m = 0; m < M; ++m) at[m] = x + (m * blocks + b) * B;
        if (alone) {
            Steps<kBits, R, M, 0, C>::go(codes, at, table, total);
            continue;
        }
        __m512 acc[R][M];
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
        Steps<kBits, R, M, 0, C>::go(codes, at, table, acc);
        const int64_t g = b * B / group, left = w.groups - g;
        const __mmask16 there = left >= 16 ? 0xFFFF : (__mmask16)((1u << left) - 1);
        for (int r = 0; r < R; ++r) {
            const __m512 near = left >= 16 ? _mm512_loadu_ps(held + 2 * r * w.groups + g)
                                           : _mm512_maskz_loadu_ps(there, held + 2 * r * w.groups + g);
            const __m512 scale = _mm512_permutexvar_ps(place, near);
            for (int m = 0; m < M; ++m) total[r][m] = _mm512_fmadd_ps(acc[r][m], scale, total[r][m]);
        }
    }
    for (int r = 0; r < R; ++r) {
        const float* shift = held + (2 * r + 1) * w.groups;
        for (int m = 0; m < M; ++m) {
            __m512 sum = total[r][m];
            if (alone) sum = _mm512_mul_ps(sum, _mm512_set1_ps(held[2 * r * w.groups]));
            for (int64_t g = 0; g < w.groups; g += 16) {
                const int64_t left = w.groups - g;
                const __mmask16 there = left >= 16 ? 0xFFFF : (__mmask16)((1u << left) - 1);
                sum = _mm512_fnmadd_ps(_mm512_maskz_loadu_ps(there, shift + g),
                                       _mm512_maskz_loadu_ps(there, sums + m * w.groups + g), sum);
            }
            out[m * w.n + first + r] = _mm512_reduce_add_ps(sum) + (bias ? bias[first + r] : 0.0f);
        }
    }
}

template <int kBits, int R, int M>
void all_rows(const Weight& w, const float* x, const float* sums, const float* bias, float* out, int threads) {
    const int64_t whole = w.n / R;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> held(2 * R * w.groups);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < whole; ++b) tile<kBits, R, M>(w, b * R, x, sums, bias, out, held.data());
#pragma omp for schedule(static)
        for (int64_t row = whole * R; row < w.n; ++row) tile<kBits, 1, M>(w, row, x, sums, bias, out, held.data());
    }
}

template <int kBits>
void linear(const Weight& w, const float* x, const float* sums, int64_t m, const float* bias, float* out,
            int threads) {
    const int64_t blocks = (w.k + block_codes<kBits>() - 1) / block_codes<kBits>();
    const int64_t stride = blocks * block_codes<kBits>();
    std::vector<float> arranged(m * stride);
    arrange<kBits>(x, m, w.k, blocks, arranged.data());
    const float* at = arranged.data();
    while (m > 0) {
        const int64_t step = m >= 4 ? 4 : m >= 2 ? 2 : 1;
        if (step == 4) all_rows<kBits, 2, 4>(w, at, sums, bias, out, threads);
        if (step == 2) all_rows<kBits, 4, 2>(w, at, sums, bias, out, threads);
        if (step == 1) all_rows<kBits, 4, 1>(w, at, sums, bias, out, threads);
        m -= step, out += step * w.n, at += step * stride, sums += step * w.groups;
    }
}

}  // namespace wide
#endif
