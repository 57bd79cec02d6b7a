// Low-bit linears for a few rows with AVX512-VNNI: codes stay bytes and meet activations that are integers.
//
// A vector of 64 bytes of a row holds 16 lanes of 32 / bits codes. Its bytes, shifted right by j * bits and masked, are
// unsigned codes in [0, 15], four to a lane, and one instruction multiplies them by signed bytes and sums each lane.
// Activations become integers of 16 bits (for bf16 and fp16) or 24 bits (for fp32), in steps set by the largest of one
// block's 512 / bits columns; byte planes carry them, so nothing is lost beyond 2^-15 or 2^-23 of that largest value:
// less than the rounding of the activations' own type. A lane's codes share a scale, since groups are multiples of 32.
// Zero points are applied to the groups' sums of the same integers, so a weight of zeros cancels but for fp32's rounding.
#pragma once
#if defined(WNA16_AVX512) && defined(__AVX512VNNI__)
#define WNA16_VNNI 1

namespace bytes {

template <int kBits>
struct Shape {
    static constexpr int kLane = 32 / kBits;        // codes a lane
    static constexpr int kBlock = 16 * kLane;       // codes a vector
    static constexpr int kParts = 8 / kBits;        // codes a byte
    static constexpr int kChunks = kBlock / 16;     // vectors of sixteen activations a block
};

// Activations: planes [m][block][plane][part][64], most significant plane first; steps and sums as floats.
struct Rounded {
    std::vector<int8_t> planes;
    std::vector<float> steps;  // [m, blocks]
    std::vector<float> sums;   // [m, groups]
    std::vector<char> finite;  // [m]
};

template <int kBits, int P>
void round_block(const float* x, int64_t count, int8_t* out, float* step, float* sums, int64_t group, char& finite) {
    using S = Shape<kBits>;
    __m512 v[S::kChunks];
    __m512 largest = _mm512_setzero_ps();
    for (int c = 0; c < S::kChunks; ++c) {
        const int64_t left = count - c * 16;
        const __mmask16 there = left >= 16 ? 0xFFFF : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
        v[c] = _mm512_maskz_loadu_ps(there, x + c * 16);
        const __m512 size = _mm512_abs_ps(v[c]);
        // NaN and infinity: not below infinity
        if (_mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ)) finite = 0;
        largest = _mm512_max_ps(largest, size);
    }
    const float amax = _mm512_reduce_max_ps(largest);
    // A step is a power of two, so that only the integers round: sixteen bits hold bf16 exactly to 2^-7 of the largest.
    constexpr float kLimit = P == 2 ? 127 * 256 + 127 : 127 * 65536 + 127 * 256 + 127;  // of P signed bytes
    int exponent;
    std::frexp(amax, &exponent);
    exponent = (exponent < -100 ? -100 : exponent) - (8 * P - 1);  // below 2^-100 steps would leave fp32's range
    if (amax > std::ldexp(kLimit, exponent)) ++exponent;
    const float inverse = finite ? std::ldexp(1.0f, -exponent) : 0.0f;
    *step = std::ldexp(1.0f, exponent);
    alignas(64) int8_t digits[P][S::kBlock];
    __m512i total = _mm512_setzero_si512();
    for (int c = 0; c < S::kChunks; ++c) {
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v[c], _mm512_set1_ps(inverse)));
        total = _mm512_add_epi32(total, q);
        if ((c + 1) * 16 % group == 0 || c + 1 == S::kChunks) {
            const int64_t g = c * 16 / group;
            if (g * group < count) sums[g] += *step * static_cast<float>(_mm512_reduce_add_epi32(total));
            total = _mm512_setzero_si512();
        }
        for (int p = P - 1; p >= 0; --p) {  // signed digits of base 256, the lowest first
            const __m128i low = _mm512_cvtepi32_epi8(q);
            _mm_store_si128(reinterpret_cast<__m128i*>(digits[p] + c * 16), low);
            q = _mm512_srai_epi32(_mm512_sub_epi32(q, _mm512_cvtepi8_epi32(low)), 8);
        }
    }
    // Byte i of lane l, part j: column l * kLane + i * kParts + j.
    for (int p = 0; p < P; ++p)
        for (int j = 0; j < S::kParts; ++j) {
            int8_t* const to = out + (p * S::kParts + j) * 64;
            for (int at = 0; at < S::kParts; ++at) {
                const __m512i natural = _mm512_load_si512(digits[p] + at * 64);
                if constexpr (kBits == 4)
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + at * 32),
                                        _mm512_cvtepi16_epi8(_mm512_srli_epi16(natural, 8 * j)));
                else
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + at * 16),
                                     _mm512_cvtepi32_epi8(_mm512_srli_epi32(natural, 8 * j)));
            }
        }
}

template <int kBits, int P>
Rounded round_all(const float* x, int64_t m, int64_t k, int64_t groups) {
    using S = Shape<kBits>;
    const int64_t blocks = (k + S::kBlock - 1) / S::kBlock, each = P * S::kParts * 64;
    const int64_t group = wide::group_size(k, groups);
    Rounded out;
    out.planes.resize(m * blocks * each);
    out.steps.resize(m * blocks);
    out.sums.assign(m * groups, 0.0f);
    out.finite.assign(m, 1);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t first = b * S::kBlock;
            round_block<kBits, P>(x + i * k + first, k - first, out.planes.data() + (i * blocks + b) * each,
                                  &out.steps[i * blocks + b], &out.sums[i * groups + first / group], group, out.finite[i]);
        }
    return out;
}

// out[m, first + r] for R weight rows and M activation rows. held: 2 * R * groups floats.
template <int kBits, int P, int R, int M>
void tile(const Weight& w, int64_t first, const Rounded& x, int64_t at_row, const float* bias, float* out,
          float* held) {
    using S = Shape<kBits>;
    const int64_t blocks = (w.k + S::kBlock - 1) / S::kBlock, words = w.row_bytes / 4, each = P * S::kParts * 64;
    const int64_t group = wide::group_size(w.k, w.groups);
    const __m512i place = wide::scale_of_lane(S::kLane, group);
    const __m512i mask = _mm512_set1_epi8((1 << kBits) - 1);
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
        const int64_t left_words = words - b * 16;
        const __mmask16 there = left_words >= 16 ? 0xFFFF : (__mmask16)((1u << left_words) - 1);
        const int64_t g = b * S::kBlock / group, left = w.groups - g;
        const __mmask16 near = left >= 16 ? 0xFFFF : (__mmask16)((1u << left) - 1);
        for (int r = 0; r < R; ++r) {
            const uint8_t* p = rows[r] + b * 64;
            const __m512i packed = left_words >= 16 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(there, p);
            __builtin_prefetch(p + R * w.row_bytes);  // the next tile: rows are short streams
            __m512i codes[S::kParts];
            for (int j = 0; j < S::kParts; ++j)
                codes[j] = _mm512_and_si512(j ? _mm512_srli_epi16(packed, j * kBits) : packed, mask);
            __m512 scale = _mm512_set1_ps(1.0f);
            if (!alone)
                scale = _mm512_permutexvar_ps(place, _mm512_maskz_loadu_ps(near, held + 2 * r * w.groups + g));
            for (int m = 0; m < M; ++m) {
                const int8_t* planes = x.planes.data() + ((at_row + m) * blocks + b) * each;
                __m512i sum = _mm512_setzero_si512();
                for (int q = 0; q < P; ++q) {
                    if (q) sum = _mm512_slli_epi32(sum, 8);
                    for (int j = 0; j < S::kParts; ++j)
                        sum = _mm512_dpbusd_epi32(sum, codes[j],
                                                  _mm512_loadu_si512(planes + (q * S::kParts + j) * 64));
                }
                const __m512 step = _mm512_set1_ps(x.steps[(at_row + m) * blocks + b]);
                total[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, step), total[r][m]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        const float* shift = held + (2 * r + 1) * w.groups;
        for (int m = 0; m < M; ++m) {
            const float* sums = x.sums.data() + (at_row + m) * w.groups;
            __m512 sum = total[r][m];
            if (alone) sum = _mm512_mul_ps(sum, _mm512_set1_ps(held[2 * r * w.groups]));
            for (int64_t g = 0; g < w.groups; g += 16) {
                const int64_t left = w.groups - g;
                const __mmask16 near = left >= 16 ? 0xFFFF : (__mmask16)((1u << left) - 1);
                sum = _mm512_fnmadd_ps(_mm512_maskz_loadu_ps(near, shift + g), _mm512_maskz_loadu_ps(near, sums + g),
                                       sum);
            }
            out[m * w.n + first + r] = _mm512_reduce_add_ps(sum) + (bias ? bias[first + r] : 0.0f);
        }
    }
}

template <int kBits, int P, int R, int M>
void all_rows(const Weight& w, const Rounded& x, int64_t at_row, const float* bias, float* out, int threads) {
    const int64_t whole = w.n / R;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> held(2 * R * w.groups);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < whole; ++b) tile<kBits, P, R, M>(w, b * R, x, at_row, bias, out, held.data());
#pragma omp for schedule(static)
        for (int64_t row = whole * R; row < w.n; ++row)
            tile<kBits, P, 1, M>(w, row, x, at_row, bias, out, held.data());
    }
}

template <int kBits, int P>
std::vector<char> linear(const Weight& w, const float* x, int64_t m, const float* bias, float* out, int threads) {
    const Rounded rounded = round_all<kBits, P>(x, m, w.k, w.groups);
    for (int64_t at = 0; at < m;) {
        const int64_t step = m - at >= 4 ? 4 : m - at >= 2 ? 2 : 1;
        float* const to = out + at * w.n;
        if (step == 4) all_rows<kBits, P, 2, 4>(w, rounded, at, bias, to, threads);
        if (step == 2) all_rows<kBits, P, 4, 2>(w, rounded, at, bias, to, threads);
        if (step == 1) all_rows<kBits, P, 4, 1>(w, rounded, at, bias, to, threads);
        at += step;
    }
    return rounded.finite;
}

// planes: 2 for activations of half types, 3 for fp32. Gives which rows are right: not those with NaN or infinity.
// Empty where there is no such kernel: 3 bits do not fall on bytes, and 8 bits times 24 would overflow a lane.
inline std::vector<char> linear(const Weight& w, const float* x, int64_t m, const float* bias, float* out, int bits,
                                int planes, int threads) {
    if (bits == 2 && planes == 2) return linear<2, 2>(w, x, m, bias, out, threads);
    if (bits == 2 && planes == 3) return linear<2, 3>(w, x, m, bias, out, threads);
    if (bits == 4 && planes == 2) return linear<4, 2>(w, x, m, bias, out, threads);
    if (bits == 4 && planes == 3) return linear<4, 3>(w, x, m, bias, out, threads);
    return {};
}

}  // namespace bytes
#endif
