// What a step computes element by element: in fp32, each result rounded to its own type, as PyTorch does.
#pragma once

#include <cmath>
#include <limits>

#include "exponential.h"
#include "step_values.h"

namespace {

enum Unary { COPY, NEG, RSQRT, SQRT, SQUARE, RECIPROCAL, ABS, EXP, SIGMOID, SILU, RELU, TANH, GELU, GELU_TANH };
enum Binary { ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM };

// e^x for any x; NaN stays.
INLINE float exponential(float x) {
    const float least = x < -87.0f ? -87.0f : x, y = exp_within(least > 88.0f ? 88.0f : least);
    return x < -87.0f ? 0.0f : x > 88.0f ? std::numeric_limits<float>::infinity() : y;
}

void unary(int op, const float* x, float* y, int64_t n) {
#define EACH(expression) for (int64_t i = 0; i < n; ++i) { const float v = x[i]; y[i] = (expression); } break
    switch (op) {
        case COPY: EACH(v);
        case NEG: EACH(-v);
        case RSQRT: EACH(1.0f / std::sqrt(v));
        case SQRT: EACH(std::sqrt(v));
        case SQUARE: EACH(v * v);
        case RECIPROCAL: EACH(1.0f / v);
        case ABS: EACH(std::fabs(v));
        case EXP: for (int64_t i = 0; i < n; ++i) y[i] = std::exp(x[i]); break;
        case SIGMOID: EACH(1.0f / (1.0f + exponential(-v)));
        case SILU: EACH(v / (1.0f + exponential(-v)));
        case RELU: EACH(v < 0 ? 0.0f : v);
        case TANH: EACH(std::tanh(v));
        case GELU: EACH(0.5f * v * (1.0f + std::erf(v * 0.70710678118654752f)));
        case GELU_TANH: EACH(v * (1.0f - 1.0f / (1.0f + exponential(1.5957691216057308f * (v + 0.044715f * v * v * v)))));
        default: fail("an unknown function");
    }
#undef EACH
}

void unary(int op, const Value& to, const Value& from) {
    if (op == COPY) return copy(to, from);
    int64_t strides[2][kRank];
    for (int d = 0; d < to.rank; ++d) strides[0][d] = to.stride[d];
    spread(from, to.rank, to.shape, strides[1]);
    visit<2>(to.rank, to.shape, strides, [&](const int64_t* at, const int64_t* inner, int64_t n) {
        float a[kChunk], y[kChunk];
        for (int64_t first = 0; first < n; first += kChunk) {
            const int64_t some = n - first < kChunk ? n - first : kChunk;
            const char* in = from.data + (at[1] + first * inner[1]) * width(from.type);
            unary(op, fetch(from.type, in, inner[1], some, a), y, some);
            keep(to.type, to.data + (at[0] + first) * width(to.type), some, y);
        }
    });
}

void binary(int op, float alpha, const float* a, const float* b, float* y, int64_t n) {
#define EACH(expression) for (int64_t i = 0; i < n; ++i) { const float v = a[i], w = b[i]; y[i] = (expression); } break
    switch (op) {
        case ADD: if (alpha == 1) { EACH(v + w); } else { EACH(v + alpha * w); }
        case SUB: if (alpha == 1) { EACH(v - w); } else { EACH(v - alpha * w); }
        case MUL: EACH(v * w);
        case DIV: EACH(v / w);
        case MAXIMUM: EACH(v != v ? v : w != w ? w : v > w ? v : w);
        case MINIMUM: EACH(v != v ? v : w != w ? w : v < w ? v : w);
        default: fail("an unknown function");
    }
#undef EACH
}

// to, contiguous, = op(a, b), both broadcast.
void binary(int op, float alpha, const Value& to, const Value& a, const Value& b) {
    int64_t strides[3][kRank];
    for (int d = 0; d < to.rank; ++d) strides[0][d] = to.stride[d];
    spread(a, to.rank, to.shape, strides[1]);
    spread(b, to.rank, to.shape, strides[2]);
    visit<3>(to.rank, to.shape, strides, [&](const int64_t* at, const int64_t* inner, int64_t n) {
        float left[kChunk], right[kChunk], made[kChunk];
        for (int64_t first = 0; first < n; first += kChunk) {
            const int64_t some = n - first < kChunk ? n - first : kChunk;
            const float* x = fetch(a.type, a.data + (at[1] + first * inner[1]) * width(a.type), inner[1], some, left);
            const float* y = fetch(b.type, b.data + (at[2] + first * inner[2]) * width(b.type), inner[2], some, right);
            char* const out = to.data + (at[0] + first) * width(to.type);
            float* const direct = to.type == F32 ? reinterpret_cast<float*>(out) : made;
            binary(op, alpha, x, y, direct, some);
            keep(to.type, out, some, direct);
        }
    });
}

// to [..., 1] or [...] = mean of x [..., n], in fp32.
void mean(const Value& to, const Value& x) {
    const int64_t n = x.last(), rows = n ? x.count() / n : 0;
    if (!x.contiguous()) fail("a mean over values that are not contiguous");
    for (int64_t r = 0; r < rows; ++r) {
        float buffer[kChunk], lanes[32] = {}, rest = 0;
        for (int64_t first = 0; first < n; first += kChunk) {
            const int64_t some = n - first < kChunk ? n - first : kChunk;
            const float* v = fetch(x.type, x.data + (r * n + first) * width(x.type), 1, some, buffer);
            int64_t i = 0;
            for (; i + 32 <= some; i += 32)
                for (int l = 0; l < 32; ++l) lanes[l] += v[i + l];
            for (; i < some; ++i) rest += v[i];
        }
        for (int half = 16; half; half /= 2)
            for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
        const float result = (lanes[0] + rest) / float(n);
        keep(to.type, to.data + r * width(to.type), 1, &result);
    }
}

}  // namespace
