// The products of a step: dense ones here or by PyTorch, those of low-bit weights by their own kernels.
#pragma once

#include <type_traits>

#include "half_product.h"

namespace {

typedef void* Handle;  // of a tensor of PyTorch's, in the C interface that it keeps stable

// Kernels in libraries of their own, and PyTorch's; set once, in this order.
struct Functions {
    void (*wna16)(const float*, const void*, const void*, const void*, const float*, float*, int64_t, int64_t, int64_t,
                  int64_t, int64_t, int, int, int, int);
    void (*wna16_dequantize)(const void*, const void*, const void*, float*, int64_t, int64_t, int64_t, int64_t, int64_t,
                             int64_t, int, int, int);
    void (*wna16_bf16)(const void*, const void*, const float*, const float*, const void*, void*, int64_t, int64_t,
                       int64_t, int64_t, int64_t, int);
    void (*wna16_few)(const void*, const void*, const void*, const void*, const void*, void*, int64_t, int64_t, int64_t,
                      int64_t, int64_t, int, int, int);
    void (*nvfp4)(const void*, const void*, const void*, const void*, const void*, void*, int, int64_t, int64_t, int64_t,
                  int64_t, int, int);
    void (*nvfp4_bf16)(const void*, const void*, const void*, const void*, const void*, void*, int64_t, int64_t, int64_t,
                       int64_t, int, int);
    void (*nvfp4_dequantize)(const void*, const void*, float*, int64_t, int64_t, int);
    void (*attention)(const float*, const void*, int64_t, const void*, const void*, int64_t, int, const void*, float*,
                      int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int);
    void (*hadamard)(const float*, float*, const float*, const float*, int64_t, int64_t, int64_t, int64_t, int);
    int32_t (*from_blob)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t, Handle*);
    int32_t (*drop)(Handle);
    int32_t (*mm)(Handle, Handle, Handle);
    int32_t (*addmm)(Handle, Handle, Handle, Handle, double, double);
};
Functions functions;

// A matrix of PyTorch's over memory that is held elsewhere.
struct Matrix {
    Handle handle = nullptr;
    Matrix(const void* data, Type type, int64_t rows, int64_t columns, int64_t row, int64_t column) {
        constexpr int32_t codes[] = {6, 15, 5};  // of c10::ScalarType, which never change
        const int64_t shape[] = {rows, columns}, stride[] = {row, column};
        if (functions.from_blob(const_cast<void*>(data), 2, shape, stride, 0, codes[type], 0, 0, &handle))
            fail("PyTorch made no tensor");
    }
    Matrix(const Matrix&) = delete;
    ~Matrix() { functions.drop(handle); }
};

// out [m, n], rows `step` apart, = x [m, k] . weight [n, k] transposed + bias, by PyTorch.
void library(Type type, const void* x, int64_t m, int64_t k, int64_t n, const void* weight, const void* bias, void* out,
             int64_t step) {
    const Matrix to(out, type, m, n, step, 1), from(x, type, m, k, k, 1), turned(weight, type, k, n, 1, k);
    int32_t failed;
    if (bias) {
        const Matrix added(bias, type, m, n, 0, 1);
        failed = functions.addmm(to.handle, added.handle, from.handle, turned.handle, 1.0, 1.0);
    } else {
        failed = functions.mm(to.handle, from.handle, turned.handle);
    }
    if (failed) fail("PyTorch's product failed");
}

struct Scratch {
    Memory wide, made, bias, scales, slab;
};

const float* floats(const Value& v, Memory& memory) {
    const int64_t n = v.count();
    if (v.type == F32) return reinterpret_cast<const float*>(v.data);
    float* const to = reinterpret_cast<float*>(memory.of(n * 4));
    return fetch(v.type, v.data, 1, n, to);
}

// few: rows up to which the kernel here beats PyTorch's. widen: the CPU does not multiply this half type, and so PyTorch's is
// never the faster one.
void linear(const Value& out, const Value& x, const Value& weight, const Value* bias, int64_t few, bool widen,
            Scratch& scratch, int threads) {
    const int64_t n = weight.shape[0], k = weight.shape[1], m = k ? x.count() / k : 0;
    const void* b = bias ? bias->data : nullptr;
    if (weight.rank != 2 || k != x.last() || (bias && !bias->sized_as({n}))) fail("a weight or bias of other sizes than x");
    if (x.type != out.type || weight.type != out.type || (bias && bias->type != out.type))
        fail("a weight or bias of another type than x");
    if (m == 0 || n == 0) return;
    if (n * k < 1 << 18) threads = 1;
    if (out.type != F32 && widen) {
        const auto multiply = [&](auto* to) {
            typedef std::remove_pointer_t<decltype(to)> W;
            half_product((const W*)x.data, m, k, n, (const W*)weight.data, (const W*)b, to, threads);
        };
        return out.type == F16 ? multiply((Half*)out.data) : multiply((bf16*)out.data);
    }
    if (m > few || out.type == F16) return library(out.type, x.data, m, k, n, weight.data, b, out.data, n);
    if (out.type == F32)
        return dense(reinterpret_cast<const float*>(x.data), m, k, n, reinterpret_cast<const float*>(weight.data),
                     static_cast<const float*>(b), reinterpret_cast<float*>(out.data), threads);
    const bf16 *const w = reinterpret_cast<const bf16*>(weight.data), *const given = static_cast<const bf16*>(b);
    if constexpr (kPairs)
        dense(reinterpret_cast<const bf16*>(x.data), m, k, n, w, given, reinterpret_cast<bf16*>(out.data), threads);
    else
        dense(floats(x, scratch.wide), m, k, n, w, given, reinterpret_cast<bf16*>(out.data), threads);
}

// Rows at which another form takes over, and how many bytes carry an activation: see kernels/wna16/cpu.py.
struct LowBit {
    int64_t bits, pairs, few_bf16, fused, planes, slab;
};

void wna16(const Value& out, const Value& x, const Value& codes, const Value& scales, const Value* zeros,
           const Value* bias, const LowBit& how, Scratch& scratch, int threads) {
    const int64_t n = codes.shape[0], words = codes.shape[1], k = x.last(), m = k ? x.count() / k : 0;
    const int64_t groups = scales.shape[1];
    const void* zero = zeros ? zeros->data : nullptr;
    if (x.type != out.type || codes.type != WORD || (zeros && zeros->type != BYTE)) fail("codes of another type");
    if (groups < 1 || k % groups || words * 32 < k * how.bits || !scales.sized_as({n, groups}) ||
        (zeros && !zeros->sized_as({n, groups})) || (bias && !bias->sized_as({n})))
        fail("codes, scales, zero points or a bias of other sizes than x");
    if (m == 0) return;
    if (m <= how.pairs)
        return functions.wna16_few(x.data, codes.data, scales.data, zero, bias ? bias->data : nullptr, out.data, m, n, k,
                                   4 * words, groups, int(how.bits), scales.type, n * k < 1 << 18 ? 1 : threads);
    if (how.few_bf16 >= 0 && m > how.few_bf16) {
        const int64_t count = scales.count();
        float* const wide = reinterpret_cast<float*>(scratch.scales.of(count * 8));
        const float* const given = fetch(scales.type, scales.data, 1, count, wide);
        float* const shifts = wide + count;
        for (int64_t i = 0; i < count; ++i) shifts[i] = given[i] * (zeros ? float(uint8_t(zeros->data[i])) : 8.0f);
        return functions.wna16_bf16(x.data, codes.data, given, shifts, bias ? bias->data : nullptr, out.data, m, n, k,
                                    4 * words, groups, threads);
    }
    if (m > how.fused) {
        const int64_t step = std::max<int64_t>(1, std::min(n, how.slab / k));
        float* const slab = reinterpret_cast<float*>(scratch.slab.of(step * k * 4));
        const float* const wide = floats(x, scratch.wide);
        const float* const b = bias ? floats(*bias, scratch.bias) : nullptr;
        float* const y = out.type == F32 ? reinterpret_cast<float*>(out.data)
                                         : reinterpret_cast<float*>(scratch.made.of(m * n * 4));
        for (int64_t first = 0; first < n; first += step) {
            const int64_t count = std::min(step, n - first);
            functions.wna16_dequantize(codes.data, scales.data, zero, slab, first, count, n, k, words, groups,
                                       int(how.bits), scales.type, threads);
            library(F32, wide, m, k, count, slab, b ? b + first : nullptr, y + first, n);
        }
        return keep(out.type, out.data, m * n, y);
    }
    if (n * k < 1 << 18) threads = 1;
    float* const y = out.type == F32 ? reinterpret_cast<float*>(out.data)
                                     : reinterpret_cast<float*>(scratch.made.of(m * n * 4));
    functions.wna16(floats(x, scratch.wide), codes.data, scales.data, zero, bias ? floats(*bias, scratch.bias) : nullptr,
                    y, m, n, k, words, groups, int(how.bits), scales.type, int(how.planes), threads);
    keep(out.type, out.data, m * n, y);
}

// Rows at which another form takes over: see kernels/nvfp4/cpu.py.
struct Fp4 {
    int64_t planes, bf16_from, few_bf16, fused, slab;
};

void nvfp4(const Value& out, const Value& x, const Value& codes, const Value& scales, const Value& alpha,
           const Value* bias, const Fp4& how, Scratch& scratch, int threads) {
    const int64_t n = codes.shape[0], blocks = scales.shape[1], k = x.last(), m = k ? x.count() / k : 0;
    const void* b = bias ? bias->data : nullptr;
    if (x.type != out.type || codes.type != BYTE || scales.type != BYTE || alpha.type != F32 ||
        (bias && bias->type != out.type))
        fail("codes of another type");
    if (blocks * 16 < k || !codes.sized_as({n, blocks * 8}) || !scales.sized_as({n, blocks}) || alpha.count() != 1 ||
        (bias && !bias->sized_as({n})))
        fail("codes, scales or a bias of other sizes than x");
    if (m == 0) return;
    if (how.bf16_from >= 0 && m > how.bf16_from)
        return functions.nvfp4_bf16(x.data, codes.data, scales.data, alpha.data, b, out.data, m, n, k, blocks,
                                    m <= how.few_bf16, threads);
    if (how.planes == 0 && m > how.fused) {
        const int64_t wide = blocks * 16, step = std::max<int64_t>(1, std::min(n, how.slab / (4 * wide)));
        float* const slab = reinterpret_cast<float*>(scratch.slab.of(step * wide * 4));
        float* const rows = reinterpret_cast<float*>(scratch.wide.of(m * wide * 4));
        float* const y = reinterpret_cast<float*>(scratch.made.of(m * n * 4));
        std::memset(rows, 0, m * wide * 4);
        for (int64_t i = 0; i < m; ++i) {
            float buffer[kChunk];
            for (int64_t at = 0; at < k; at += kChunk) {
                const int64_t some = std::min(kChunk, k - at);
                const float* v = fetch(x.type, x.data + (i * k + at) * width(x.type), 1, some, buffer);
                std::memcpy(rows + i * wide + at, v, some * 4);
            }
        }
        for (int64_t first = 0; first < n; first += step) {
            const int64_t count = std::min(step, n - first);
            functions.nvfp4_dequantize(codes.data + first * blocks * 8, scales.data + first * blocks, slab, count, blocks,
                                       threads);
            library(F32, rows, m, wide, count, slab, nullptr, y + first, n);
        }
        const float factor = *reinterpret_cast<const float*>(alpha.data);
        const float* const added = bias ? floats(*bias, scratch.bias) : nullptr;
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) y[i * n + j] = y[i * n + j] * factor + (added ? added[j] : 0.0f);
        return keep(out.type, out.data, m * n, y);
    }
    functions.nvfp4(x.data, codes.data, scales.data, alpha.data, b, out.data, out.type, m, n, k, blocks, int(how.planes),
                    threads);
}

}  // namespace
