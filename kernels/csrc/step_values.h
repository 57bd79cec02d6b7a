// Values of a step's program: tensors as pointers with sizes and strides, and the memory that they live in between calls.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "half_vectors.h"

namespace {

constexpr int kRank = 6;
enum Type : int32_t { F32 = 0, BF16 = 1, F16 = 2, BYTE = 3, LONG = 4, WORD = 5 };  // the first three as all kernels have them

INLINE int64_t width(Type type) {
    return type == F32 || type == WORD ? 4 : type == LONG ? 8 : type == BYTE ? 1 : 2;
}

struct Value {
    char* data = nullptr;
    Type type = F32;
    int rank = 0;
    int64_t shape[kRank] = {}, stride[kRank] = {};

    int64_t count() const {
        int64_t n = 1;
        for (int d = 0; d < rank; ++d) n *= shape[d];
        return n;
    }
    bool contiguous() const {
        int64_t step = 1;
        for (int d = rank - 1; d >= 0; step *= shape[d], --d)
            if (shape[d] != 1 && stride[d] != step) return false;
        return true;
    }
    void lay_out() {  // the strides of a contiguous tensor
        int64_t step = 1;
        for (int d = rank - 1; d >= 0; --d) stride[d] = step, step *= shape[d] > 1 ? shape[d] : 1;
    }
    bool lies_as(const Value& other) const {
        return type == other.type && rank == other.rank && std::equal(stride, stride + rank, other.stride);
    }
    int64_t last() const { return rank ? shape[rank - 1] : 1; }
    bool sized_as(std::initializer_list<int64_t> sizes) const {
        return rank == int(sizes.size()) && std::equal(sizes.begin(), sizes.end(), shape);
    }
    void sized(std::initializer_list<int64_t> sizes) {
        rank = 0;
        for (int64_t size : sizes) shape[rank++] = size;
        lay_out();
    }
};

[[noreturn]] void fail(const std::string& why) { throw std::runtime_error(why); }

// Memory that grows and is kept: a fresh block would cost a page fault for every page at each call.
struct Memory {
    char* data = nullptr;
    int64_t size = 0;

    Memory() = default;
    Memory(const Memory&) = delete;
    ~Memory() { std::free(data); }
    char* of(int64_t bytes) {
        bytes = (bytes + 64 + 127) / 128 * 128;  // beyond the end: kernels that read whole vectors
        if (bytes > size) {
            std::free(data);
            data = static_cast<char*>(std::aligned_alloc(128, bytes));
            size = data ? bytes : 0;
            if (!data) fail("out of memory");
        }
        return data;
    }
};

// `n` elements at a stride as floats: in place where they are already.
const float* fetch(Type type, const char* p, int64_t stride, int64_t n, float* buffer) {
    if (type == F32) {
        const float* x = reinterpret_cast<const float*>(p);
        if (stride == 1) return x;
        if (stride == 0) for (int64_t i = 0; i < n; ++i) buffer[i] = *x;
        else for (int64_t i = 0; i < n; ++i) buffer[i] = x[i * stride];
    } else if (type == BF16) {
        const bf16* x = reinterpret_cast<const bf16*>(p);
        if (stride == 1) for (int64_t i = 0; i < n; ++i) buffer[i] = one(x[i]);
        else for (int64_t i = 0; i < n; ++i) buffer[i] = one(x[i * stride]);
    } else if (type == F16) {
        const Half* x = reinterpret_cast<const Half*>(p);
        for (int64_t i = 0; i < n; ++i) buffer[i] = widen(x[i * stride]);
    } else {
        fail("arithmetic on a type that is not floating");
    }
    return buffer;
}

void keep(Type type, char* p, int64_t n, const float* x) {
    if (type == BF16) {
        uint16_t* to = reinterpret_cast<uint16_t*>(p);
        for (int64_t i = 0; i < n; ++i) {  // as `put`, and in vectors
            const uint32_t u = bits<uint32_t>(x[i]);
            const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, nan = (u >> 16) | 0x40;
            to[i] = uint16_t((u & 0x7fffffff) > 0x7f800000 ? nan : rounded);
        }
    } else if (type == F16) {
        for (int64_t i = 0; i < n; ++i) put(reinterpret_cast<Half*>(p) + i, x[i]);
    } else if (reinterpret_cast<float*>(p) != x) {
        std::memcpy(p, x, n * sizeof(float));
    }
}

// Visits a shape, the last dimensions as one run where all operands allow it: run(pointers' offsets, length).
// strides: of each of N operands, in elements, 0 where it is broadcast; inner: of a run's elements, for each operand.
template <int N, class Run>
void visit(int rank, const int64_t* shape, const int64_t (*strides)[kRank], const Run& run) {
    int64_t size[kRank], step[N][kRank];
    int dims = 0;
    for (int d = 0; d < rank; ++d) {
        if (shape[d] == 0) return;
        if (shape[d] == 1) continue;
        bool joins = dims > 0;
        for (int n = 0; n < N && joins; ++n) joins = step[n][dims - 1] == strides[n][d] * shape[d];
        if (!joins) size[dims++] = 1;
        size[dims - 1] *= shape[d];
        for (int n = 0; n < N; ++n) step[n][dims - 1] = strides[n][d];
    }
    int64_t inner[N], at[N] = {}, length = 1;
    for (int n = 0; n < N; ++n) inner[n] = dims ? step[n][dims - 1] : 0;
    if (dims) length = size[--dims];
    int64_t index[kRank] = {};
    for (;;) {
        run(at, inner, length);
        int d = dims - 1;
        for (; d >= 0; --d) {
            for (int n = 0; n < N; ++n) at[n] += step[n][d];
            if (++index[d] < size[d]) break;
            for (int n = 0; n < N; ++n) at[n] -= step[n][d] * size[d];
            index[d] = 0;
        }
        if (d < 0) return;
    }
}

// The strides with which `v` is read over `shape`.
void spread(const Value& v, int rank, const int64_t* shape, int64_t* strides) {
    for (int d = 0; d < rank; ++d) {
        const int own = d - (rank - v.rank);
        if (own >= 0 && v.shape[own] != shape[d] && v.shape[own] != 1) fail("sizes that do not broadcast");
        strides[d] = own < 0 || v.shape[own] == 1 ? 0 : v.stride[own];
    }
}

constexpr int64_t kChunk = 512;

// to = from, converted; `to` may have any strides.
void copy(const Value& to, const Value& from) {
    int64_t strides[2][kRank];
    for (int d = 0; d < to.rank; ++d) strides[0][d] = to.stride[d];
    spread(from, to.rank, to.shape, strides[1]);
    const int64_t wide = width(to.type), narrow = width(from.type);
    visit<2>(to.rank, to.shape, strides, [&](const int64_t* at, const int64_t* inner, int64_t n) {
        char* const out = to.data + at[0] * wide;
        const char* const in = from.data + at[1] * narrow;
        if (to.type == from.type) {
            if (inner[0] == 1 && inner[1] == 1) std::memcpy(out, in, n * wide);
            else for (int64_t i = 0; i < n; ++i) std::memcpy(out + i * inner[0] * wide, in + i * inner[1] * wide, wide);
            return;
        }
        float buffer[kChunk];
        char made[kChunk * sizeof(float)];
        for (int64_t first = 0; first < n; first += kChunk) {
            const int64_t some = n - first < kChunk ? n - first : kChunk;
            const float* x = fetch(from.type, in + first * inner[1] * narrow, inner[1], some, buffer);
            if (inner[0] == 1) {
                keep(to.type, out + first * wide, some, x);
                continue;
            }
            keep(to.type, made, some, x);
            for (int64_t i = 0; i < some; ++i) std::memcpy(out + (first + i) * inner[0] * wide, made + i * wide, wide);
        }
    });
}

}  // namespace
