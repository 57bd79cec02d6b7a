// What a thread works with: memory kept between calls, and its share of the columns.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace {

constexpr int LINE = 64;  // bytes of a cache line

// Working memory number K of this thread, kept between calls: a fresh block this large would be
// returned to the system after each call and cost a page fault for every page of the next.
template <class E, int K>
E* scratch(int64_t size) {
    static thread_local std::vector<E> block;
    if (int64_t(block.size()) < size) block.resize(size);
    return block.data();
}

// A thread's share of `total`, in units: whole cache lines of fp32.
INLINE void share(int64_t total, int threads, int thread, int64_t* begin, int64_t* end,
                  int64_t unit = LINE / sizeof(float)) {
    const int64_t units = (total + unit - 1) / unit;
    *begin = std::min(total, units * thread / threads * unit);
    *end = std::min(total, units * (thread + 1) / threads * unit);
}

}  // namespace
