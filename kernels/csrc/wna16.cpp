// Linear layers with 2-, 3-, 4- and 8-bit weights and fp32 activations.
//
// Eight codes of b bits are b bytes of a row's bit stream, so a vector of eight codes is one load of four bytes,
// broadcast, shifted by lane and masked; 3 bits need no case of their own. A vector meets M activation rows while it
// is in a register, so up to a handful of rows cost little more than one. Scales and zero points are applied to each
// group's sums, not to each weight: sum (c - z) s x = s (sum c x) - s z (sum x). The two terms cancel to fp32's
// precision of either, so a row whose weights are all zero gives 1e-7 of |x|, not 0.
// The vector type is the compiler's own: it becomes AVX2 or NEON where there is one.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
constexpr int kLanes = 8;
constexpr int kReadAhead = 8;  // bytes that decode() may read beyond a row

struct Weight {
    const uint8_t* codes;  // [n, row_bytes]
    const void* scales;    // [n, groups], of kind `scale_kind`
    const uint8_t* zeros;  // [n, groups], or null for 2^(bits-1)
    int scale_kind;        // 0 fp32, 1 bf16, 2 fp16
    int64_t n, k, row_bytes, groups, group_vectors;
    float midpoint;
};

inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline float sum(Floats v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// Codes 8i .. 8i+7 of a row, as floats. Reads up to kReadAhead bytes from the first of them.
template <int kBits>
inline Floats decode(const uint8_t* row, int64_t i) {
    const uint8_t* p = row + i * kBits;
    if constexpr (kBits == 8) {
#if defined(__AVX2__)
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
        return Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3]),
                      float(p[4]), float(p[5]), float(p[6]), float(p[7])};
#endif
    } else {
        uint32_t word;
        std::memcpy(&word, p, 4);
        const Words shifted = (Words{} + word) >> (Words{0, 1, 2, 3, 4, 5, 6, 7} * kBits);
        return __builtin_convertvector(reinterpret_cast<Ints>(shifted & ((1u << kBits) - 1)), Floats);
    }
}

// One row's scales, and scale * zero, as floats.
void widen(const Weight& w, int64_t row, float* scale, float* shift) {
    const int64_t at = row * w.groups;
    if (w.scale_kind == 0) std::memcpy(scale, static_cast<const float*>(w.scales) + at, w.groups * sizeof(float));
    if (w.scale_kind == 1) {
        const uint16_t* half = static_cast<const uint16_t*>(w.scales) + at;
        for (int64_t g = 0; g < w.groups; ++g) {
            const uint32_t bits = static_cast<uint32_t>(half[g]) << 16;
            std::memcpy(scale + g, &bits, 4);
        }
    }
    if (w.scale_kind == 2) {
        const _Float16* half = static_cast<const _Float16*>(w.scales) + at;
        for (int64_t g = 0; g < w.groups; ++g) scale[g] = static_cast<float>(half[g]);
    }
    if (w.zeros)
        for (int64_t g = 0; g < w.groups; ++g) shift[g] = scale[g] * static_cast<float>(w.zeros[at + g]);
    else
        for (int64_t g = 0; g < w.groups; ++g) shift[g] = scale[g] * w.midpoint;
}

#include "wna16_avx512.h"
#include "wna16_vnni.h"
#include "wna16_avx2.h"

struct Input {
    const float* x;     // [m, stride], zero-padded to whole vectors
    const float* sums;  // [m, groups]: the sum of x over each group
    int64_t stride;
};

// out[m, first + r] for R weight rows and M activation rows. held: scratch for 2 * R * groups floats.
template <int kBits, int R, int M>
void tile(const Weight& w, int64_t first, const Input& in, const float* bias, float* out, float* held) {
    const int64_t vectors = in.stride / kLanes;
    const int64_t ahead = R * w.row_bytes;  // what the next tile reads: R short streams defeat the prefetcher
    const uint8_t* rows[R];
    for (int r = 0; r < R; ++r) {
        rows[r] = w.codes + (first + r) * w.row_bytes;
        widen(w, first + r, held + 2 * r * w.groups, held + (2 * r + 1) * w.groups);
    }
    std::vector<uint8_t> last;  // decode() must not read beyond the weight's last row
    if (first + R == w.n) {
        last.assign(rows[R - 1], rows[R - 1] + w.row_bytes);
        last.resize(w.row_bytes + kReadAhead);
        rows[R - 1] = last.data();
    }
    Floats total[R][M] = {};
    for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t begin = g * w.group_vectors;
        const int64_t end = begin + w.group_vectors < vectors ? begin + w.group_vectors : vectors;
        Floats acc[R][M] = {};
        for (int64_t i = begin; i < end; ++i) {
            Floats code[R];
            for (int r = 0; r < R; ++r) {
                code[r] = decode<kBits>(rows[r], i);
                __builtin_prefetch(rows[r] + i * kBits + ahead);
            }
            for (int m = 0; m < M; ++m) {
                const Floats x = load(in.x + m * in.stride + i * kLanes);
                for (int r = 0; r < R; ++r) acc[r][m] += code[r] * x;
            }
        }
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) total[r][m] += acc[r][m] * held[2 * r * w.groups + g];
    }
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) {
            const float* shift = held + (2 * r + 1) * w.groups;
            const float* sums = in.sums + m * w.groups;
            Floats away{};
            int64_t g = 0;
            for (; g + kLanes <= w.groups; g += kLanes) away += load(shift + g) * load(sums + g);
            float result = sum(total[r][m]) - sum(away);
            for (; g < w.groups; ++g) result -= shift[g] * sums[g];
            out[m * w.n + first + r] = result + (bias ? bias[first + r] : 0.0f);
        }
}

template <int kBits, int R, int M>
void all_rows(const Weight& w, const Input& in, const float* bias, float* out, int threads) {
    const int64_t whole = w.n / R;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> held(2 * R * w.groups);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < whole; ++b) tile<kBits, R, M>(w, b * R, in, bias, out, held.data());
#pragma omp for schedule(static)
        for (int64_t row = whole * R; row < w.n; ++row) tile<kBits, 1, M>(w, row, in, bias, out, held.data());
    }
}

template <int kBits>
void linear(const Weight& w, Input in, int64_t m, const float* bias, float* out, int threads) {
    while (m > 0) {  // R * M accumulators must leave registers for the codes: AVX2 has 16
        const int64_t step = m >= 8 ? 8 : m >= 4 ? 4 : m >= 2 ? 2 : 1;
        if (step == 8) all_rows<kBits, 1, 8>(w, in, bias, out, threads);
        if (step == 4) all_rows<kBits, 2, 4>(w, in, bias, out, threads);
        if (step == 2) all_rows<kBits, 4, 2>(w, in, bias, out, threads);
        if (step == 1) all_rows<kBits, 4, 1>(w, in, bias, out, threads);
        m -= step, out += step * w.n, in.x += step * in.stride, in.sums += step * w.groups;
    }
}

template <int kBits>
void dequantize(const Weight& w, int64_t first, int64_t count, float* out, int threads) {
    const int64_t vectors = (w.k + kLanes - 1) / kLanes;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> held(2 * w.groups), row(vectors * kLanes);
        std::vector<uint8_t> last;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < count; ++r) {
            const uint8_t* codes = w.codes + (first + r) * w.row_bytes;
            if (first + r + 1 == w.n) {
                last.assign(codes, codes + w.row_bytes);
                last.resize(w.row_bytes + kReadAhead);
                codes = last.data();
            }
            widen(w, first + r, held.data(), held.data() + w.groups);
            float* const to = w.k % kLanes ? row.data() : out + r * w.k;
            for (int64_t g = 0; g < w.groups; ++g) {
                const float scale = held[g], shift = held[w.groups + g];
                const int64_t begin = g * w.group_vectors;
                const int64_t end = begin + w.group_vectors < vectors ? begin + w.group_vectors : vectors;
                for (int64_t i = begin; i < end; ++i) store(to + i * kLanes, decode<kBits>(codes, i) * scale - shift);
            }
            if (w.k % kLanes) std::memcpy(out + r * w.k, to, w.k * sizeof(float));
        }
    }
}

Weight weight(const uint8_t* codes, const void* scales, const uint8_t* zeros, int scale_kind, int64_t n, int64_t k,
              int64_t words, int64_t groups, int bits) {
    const int64_t columns = k / groups;
    return {codes, scales, zeros, scale_kind, n, k, words * 4, groups, (columns + kLanes - 1) / kLanes,
            static_cast<float>(1 << (bits - 1))};
}

}  // namespace

// out [m, n] = x [m, k] W^T + bias. codes: [n, words] of 32 bits; groups divide k into multiples of 8, or groups = 1.
// planes: bytes that may carry an activation where integers multiply faster; 0 keeps fp32.
extern "C" void wna16_linear_f32(const float* x, const uint8_t* codes, const void* scales, const uint8_t* zeros,
                                 const float* bias, float* out, int64_t m, int64_t n, int64_t k, int64_t words,
                                 int64_t groups, int bits, int scale_kind, int planes, int threads) {
    const Weight w = weight(codes, scales, zeros, scale_kind, n, k, words, groups, bits);
#if defined(WNA16_VNNI) || defined(WNA16_AVX2)
    const std::vector<char> right = bytes::linear(w, x, m, bias, out, bits, planes, threads);
    for (size_t i = 0; i < right.size(); ++i)
        if (!right[i])
            wna16_linear_f32(x + i * k, codes, scales, zeros, bias, out + i * n, 1, n, k, words, groups, bits,
                             scale_kind, 0, threads);
    if (!right.empty()) return;
#endif
    const int64_t stride = (k + kLanes - 1) / kLanes * kLanes;
    const float* const given = x;
    std::vector<float> padded, sums(m * groups);
    if (stride != k) {
        padded.resize(m * stride);
        for (int64_t i = 0; i < m; ++i) std::memcpy(padded.data() + i * stride, x + i * k, k * sizeof(float));
        x = padded.data();
    }
    for (int64_t i = 0; i < m; ++i)
        for (int64_t g = 0; g < groups; ++g) {
            Floats acc{};
            const int64_t begin = g * w.group_vectors;
            const int64_t end = g + 1 == groups ? stride / kLanes : begin + w.group_vectors;
            for (int64_t v = begin; v < end; ++v) acc += load(x + i * stride + v * kLanes);
            sums[i * groups + g] = sum(acc);
        }
#if defined(WNA16_AVX512)
    if (bits == 2) wide::linear<2>(w, given, sums.data(), m, bias, out, threads);
    if (bits == 3) wide::linear<3>(w, given, sums.data(), m, bias, out, threads);
    if (bits == 4) wide::linear<4>(w, given, sums.data(), m, bias, out, threads);
    if (bits == 8) wide::linear<8>(w, given, sums.data(), m, bias, out, threads);
    return;
#endif
    const Input in{x, sums.data(), stride};
    if (bits == 2) linear<2>(w, in, m, bias, out, threads);
    if (bits == 3) linear<3>(w, in, m, bias, out, threads);
    if (bits == 4) linear<4>(w, in, m, bias, out, threads);
    if (bits == 8) linear<8>(w, in, m, bias, out, threads);
}

// out [count, k] = rows first .. first + count of W.
extern "C" void wna16_dequantize_f32(const uint8_t* codes, const void* scales, const uint8_t* zeros, float* out,
                                     int64_t first, int64_t count, int64_t n, int64_t k, int64_t words, int64_t groups,
                                     int bits, int scale_kind, int threads) {
    const Weight w = weight(codes, scales, zeros, scale_kind, n, k, words, groups, bits);
    if (bits == 2) dequantize<2>(w, first, count, out, threads);
    if (bits == 3) dequantize<3>(w, first, count, out, threads);
    if (bits == 4) dequantize<4>(w, first, count, out, threads);
    if (bits == 8) dequantize<8>(w, first, count, out, threads);
}
