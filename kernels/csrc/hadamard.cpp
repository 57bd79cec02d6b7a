// Fast Hadamard transform of the rows of a matrix: y = (x * signs) (B (x) S) / sqrt(block), where B is a
// dense m x m matrix of +-1 (m = 1 for powers of two) and S the Sylvester matrix of order p = 2^k.
// S is applied with k butterfly stages, B as m x m multiply-adds over runs of p columns.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

typedef float Lanes __attribute__((vector_size(32)));
constexpr int kLanes = 8;

inline Lanes load(const float* p) {
    Lanes v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }

// Butterflies at distances 1, 2 and 4 within each run of eight.
inline Lanes within_lanes(Lanes v) {
    typedef int32_t Index __attribute__((vector_size(32)));
    const Lanes s1 = {1, -1, 1, -1, 1, -1, 1, -1};
    const Lanes s2 = {1, 1, -1, -1, 1, 1, -1, -1};
    const Lanes s4 = {1, 1, 1, 1, -1, -1, -1, -1};
#if defined(__clang__)
    v = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6) + v * s1;
    v = __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5) + v * s2;
    return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3) + v * s4;
#else
    v = __builtin_shuffle(v, Index{1, 0, 3, 2, 5, 4, 7, 6}) + v * s1;
    v = __builtin_shuffle(v, Index{2, 3, 0, 1, 6, 7, 4, 5}) + v * s2;
    return __builtin_shuffle(v, Index{4, 5, 6, 7, 0, 1, 2, 3}) + v * s4;
#endif
}

void sylvester(float* x, int64_t p) {
    int64_t h = 1;
    if (p >= kLanes) {
        for (int64_t i = 0; i < p; i += kLanes) store(x + i, within_lanes(load(x + i)));
        h = kLanes;
    }
    for (; h < p; h *= 2)
        for (int64_t i = 0; i < p; i += 2 * h)
            for (int64_t j = i; j < i + h; ++j) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
}

// y[i, :] = scale * sum_j base[j, i] x[j, :], over runs of p columns.
void dense(const float* x, float* y, const float* base, int64_t m, int64_t p, float scale) {
    int64_t c = 0;
    for (; c + kLanes <= p; c += kLanes)
        for (int64_t i = 0; i < m; i += 4) {  // four outputs share one load of x; m is a multiple of 4
            Lanes a0{}, a1{}, a2{}, a3{};
            for (int64_t j = 0; j < m; ++j) {
                const Lanes v = load(x + j * p + c);
                const float* b = base + j * m + i;
                a0 += v * b[0];
                a1 += v * b[1];
                a2 += v * b[2];
                a3 += v * b[3];
            }
            store(y + i * p + c, a0 * scale);
            store(y + (i + 1) * p + c, a1 * scale);
            store(y + (i + 2) * p + c, a2 * scale);
            store(y + (i + 3) * p + c, a3 * scale);
        }
    for (; c < p; ++c) {
        for (int64_t i = 0; i < m; ++i) y[i * p + c] = 0;
        for (int64_t j = 0; j < m; ++j) {
            const float v = x[j * p + c] * scale;
            for (int64_t i = 0; i < m; ++i) y[i * p + c] += base[j * m + i] * v;
        }
    }
}

}  // namespace

// x, out: [rows, blocks * m * p]; signs: [blocks * m * p] or null; base: [m, m]. m is 1 or a multiple of 4.
extern "C" void hadamard_f32(const float* x, float* out, const float* signs, const float* base, int64_t rows,
                             int64_t blocks, int64_t m, int64_t p, int threads) {
    const int64_t block = m * p;
    const float scale = 1.0f / std::sqrt(static_cast<float>(block));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> held(block);
#pragma omp for
        for (int64_t r = 0; r < rows * blocks; ++r) {
            const float* in = x + r * block;
            const float* s = signs ? signs + r % blocks * block : nullptr;
            float* const y = out + r * block;
            float* const work = m > 1 ? held.data() : y;
            const float scaled = m > 1 ? 1.0f : scale;
            for (int64_t i = 0; i < block; ++i) work[i] = in[i] * (s ? s[i] : 1.0f) * scaled;
            for (int64_t j = 0; j < m; ++j) sylvester(work + j * p, p);
            if (m > 1) dense(work, y, base, m, p, scale);
        }
    }
}
