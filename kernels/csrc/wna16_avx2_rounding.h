// Activations as integers, for wna16_avx2.h.
#pragma once
#if defined(__AVX2__) && !defined(WNA16_VNNI)

#define ABREAST _Pragma("GCC unroll 8")

namespace bytes {

template <int kBits>
struct Shape {
    static constexpr int kBlock = kBits == 8 ? 64 : 8 * 32 / kBits;  // codes a step of activations is for
    static constexpr int kLane = kBits == 8 ? kBlock : 32 / kBits;   // codes a lane, in order; of 8 bits each has some of all
    static constexpr int kParts = 8 / kBits;                         // codes a byte
};

// Activations: bytes [m][block][plane][part][32], most significant plane first, or for codes of 8 bits words [m][block][64];
// steps and sums as floats.
struct Rounded {
    std::vector<int8_t> planes;
    std::vector<float> steps;  // [m, blocks]
    std::vector<float> sums;   // [m, padded(groups)]
    std::vector<char> finite;  // [m]
};

// A vector may be read or written from the last group on.
inline int64_t padded(int64_t groups) { return groups + 8; }

// Columns of a group; a single one reaches beyond every block, whatever its number of columns.
inline int64_t group_size(int64_t k, int64_t groups) { return groups == 1 ? int64_t(1) << 60 : k / groups; }

// Whether each lane's codes share a scale, in the same place in every block.
template <int kBits>
bool fits(int64_t k, int64_t groups) {
    using S = Shape<kBits>;
    const int64_t group = group_size(k, groups);
    return groups == 1 || group % S::kBlock == 0 || (S::kBlock % group == 0 && group % S::kLane == 0);
}

inline float power(int exponent) {  // of two, within fp32's normal range
    const uint32_t bits = uint32_t(exponent + 127) << 23;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline int32_t total(__m256i v) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}

// Every second of sixteen integers, from the first or the second on.
template <int kFrom>
inline __m256i second(__m256i a, __m256i b) {
    const __m256 both = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), kFrom ? 0xDD : 0x88);
    return _mm256_permute4x64_epi64(_mm256_castps_si256(both), 0xD8);
}

// The columns of part j of each byte, in order: those that are j more than a multiple of kParts.
template <int kParts>
inline void part(const __m256i* q, int j, __m256i* to) {
    constexpr int kCount = 4 * kParts;
    __m256i half[kCount / 2];
    ABREAST for (int i = 0; i < kCount / 2; ++i)
        half[i] = j % 2 ? second<1>(q[2 * i], q[2 * i + 1]) : second<0>(q[2 * i], q[2 * i + 1]);
    if constexpr (kParts == 2) std::memcpy(to, half, 4 * sizeof *to);
    else part<kParts / 2>(half, j / 2, to);
}

// Thirty-two signed digits of base 256, the lowest of each integer; the integers become what is left above it.
inline __m256i digits(__m256i* v) {
    __m256i low[4];
    ABREAST for (int i = 0; i < 4; ++i) {
        low[i] = _mm256_srai_epi32(_mm256_slli_epi32(v[i], 24), 24);
        v[i] = _mm256_srai_epi32(_mm256_sub_epi32(v[i], low[i]), 8);
    }
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(low[0], low[1]), _mm256_packs_epi32(low[2], low[3]));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

template <int kBits, int P>
void round_block(const float* x, int64_t count, int8_t* out, float* step, float* sums, int64_t group, char& finite) {
    using S = Shape<kBits>;
    constexpr int kVectors = S::kBlock / 8;
    alignas(32) float end[S::kBlock];
    if (count < S::kBlock) {
        std::memset(end, 0, sizeof end);
        std::memcpy(end, x, count * sizeof(float));
        x = end;
    }
    const __m256 sign = _mm256_set1_ps(-0.0f), infinite = _mm256_set1_ps(INFINITY);
    __m256 largest = _mm256_setzero_ps(), strange = _mm256_setzero_ps();
    for (int i = 0; i < kVectors; ++i) {
        const __m256 size = _mm256_andnot_ps(sign, _mm256_loadu_ps(x + 8 * i));
        strange = _mm256_or_ps(strange, _mm256_cmp_ps(size, infinite, _CMP_NLT_UQ));  // NaN too
        largest = _mm256_max_ps(largest, size);
    }
    if (_mm256_movemask_ps(strange)) finite = 0;
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    const float amax = finite ? _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most))) : 0.0f;
    constexpr float kLimit = P == 2 ? 127 * 256 + 127 : 127 * 65536 + 127 * 256 + 127;  // of P signed bytes
    uint32_t bits;
    std::memcpy(&bits, &amax, sizeof bits);
    int exponent = int(bits >> 23) - 126;  // amax is below two to it
    exponent = (exponent < -100 ? -100 : exponent) - (8 * P - 1);  // below 2^-100 steps would leave fp32's range
    if (amax > kLimit * power(exponent)) ++exponent;
    *step = power(exponent);
    const __m256 inverse = _mm256_set1_ps(finite ? power(-exponent) : 0.0f);
    __m256i q[kVectors], held = _mm256_setzero_si256();
    for (int i = 0; i < kVectors; ++i) {
        q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse));
        held = _mm256_add_epi32(held, q[i]);
        if ((i + 1) * 8 % group == 0 || i + 1 == kVectors) {
            if (i * 8 / group * group < count) sums[i * 8 / group] += *step * static_cast<float>(total(held));
            held = _mm256_setzero_si256();
        }
    }
    if constexpr (kBits == 8) {
        for (int i = 0; i < kVectors; i += 2)
            _mm256_storeu_si256((__m256i*)(out + 16 * i),
                                _mm256_permute4x64_epi64(_mm256_packs_epi32(q[i], q[i + 1]), 0xD8));
    } else {
        for (int j = 0; j < S::kParts; ++j) {
            __m256i rest[4];
            part<S::kParts>(q, j, rest);
            for (int p = P - 1; p >= 0; --p)
                _mm256_storeu_si256((__m256i*)(out + (p * S::kParts + j) * 32), digits(rest));
        }
    }
}

template <int kBits, int P>
Rounded round_all(const float* x, int64_t m, int64_t k, int64_t groups) {
    using S = Shape<kBits>;
    const int64_t blocks = (k + S::kBlock - 1) / S::kBlock, each = P * S::kBlock, group = group_size(k, groups);
    Rounded out;
    out.planes.resize(m * blocks * each);
    out.steps.resize(m * blocks);
    out.sums.assign(m * padded(groups), 0.0f);
    out.finite.assign(m, 1);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t first = b * S::kBlock;
            round_block<kBits, P>(x + i * k + first, k - first, out.planes.data() + (i * blocks + b) * each,
                                  &out.steps[i * blocks + b], &out.sums[i * padded(groups) + first / group], group, out.finite[i]);
        }
    return out;
}

}  // namespace bytes
#endif
