// Views of a step's values, and the sizes of what its operators make.
#pragma once

#include "step_values.h"

namespace {

enum View { RESHAPE, TRANSPOSE, PERMUTE, UNSQUEEZE, SQUEEZE, SELECT, SLICE, EXPAND };

INLINE int64_t from_end(int64_t at, int64_t size) { return at < 0 ? at + size : at; }

// Strides of a view of other sizes over the same memory; false where it would need a copy.
bool reshaped(const Value& x, Value& to) {
    if (x.count() == 0 || x.contiguous()) {
        to.lay_out();
        return true;
    }
    int from = x.rank - 1, d = to.rank - 1;
    int64_t run = 1;  // elements of `to` that the present run of x's dimensions has taken
    while (from >= 0 && d >= 0) {
        int64_t size = x.shape[from], step = x.stride[from];
        int first = from;
        while (first > 0 && (x.shape[first - 1] == 1 || size == 1 || x.stride[first - 1] == size * step)) {
            if (size == 1) step = x.stride[first - 1];
            size *= x.shape[--first];
        }
        for (run = 1; d >= 0 && run < size; --d) {
            to.stride[d] = step * run;
            run *= to.shape[d];
        }
        if (run != size) return false;
        from = first - 1;
    }
    for (; d >= 0; --d) to.stride[d] = 0;  // sizes of one
    return true;
}

// The value that a view gives; `fits` becomes false where a reshape has to copy.
Value viewed(int kind, const Value& x, const std::vector<int64_t>& n, bool& fits) {
    Value to = x;
    const auto remove = [&](int d) {
        for (int i = d; i + 1 < to.rank; ++i) to.shape[i] = to.shape[i + 1], to.stride[i] = to.stride[i + 1];
        --to.rank;
    };
    switch (kind) {
        case RESHAPE: {
            int64_t known = 1, open = -1;
            to.rank = int(n.size());
            for (size_t i = 0; i < n.size(); ++i) {
                to.shape[i] = n[i];
                if (n[i] < 0) open = int64_t(i);
                else known *= n[i];
            }
            if (open >= 0) to.shape[open] = known ? x.count() / known : 0;
            if (to.count() != x.count()) fail("a reshape to another number of elements");
            fits = reshaped(x, to);
            return to;
        }
        case TRANSPOSE: {
            const int64_t a = from_end(n[0], x.rank), b = from_end(n[1], x.rank);
            std::swap(to.shape[a], to.shape[b]);
            std::swap(to.stride[a], to.stride[b]);
            return to;
        }
        case PERMUTE:
            for (int d = 0; d < x.rank; ++d) {
                to.shape[d] = x.shape[from_end(n[d], x.rank)];
                to.stride[d] = x.stride[from_end(n[d], x.rank)];
            }
            return to;
        case UNSQUEEZE: {
            const int64_t at = from_end(n[0], x.rank + 1);
            if (x.rank == kRank) fail("too many dimensions");
            for (int d = x.rank; d > at; --d) to.shape[d] = to.shape[d - 1], to.stride[d] = to.stride[d - 1];
            to.shape[at] = 1;
            to.stride[at] = at < x.rank ? x.stride[at] * x.shape[at] : 1;
            ++to.rank;
            return to;
        }
        case SQUEEZE: {
            const int64_t at = from_end(n[0], x.rank);
            if (x.shape[at] == 1) remove(int(at));
            return to;
        }
        case SELECT: {
            const int64_t d = from_end(n[0], x.rank), at = from_end(n[1], x.shape[d]);
            if (at < 0 || at >= x.shape[d]) fail("an index beyond the end");
            to.data += at * x.stride[d] * width(x.type);
            remove(int(d));
            return to;
        }
        case SLICE: {
            const int64_t d = from_end(n[0], x.rank), size = x.shape[d];
            int64_t begin = from_end(n[1], size), end = from_end(n[2], size);
            begin = begin < 0 ? 0 : begin > size ? size : begin;
            end = end > size ? size : end < begin ? begin : end;
            to.data += begin * x.stride[d] * width(x.type);
            to.shape[d] = (end - begin + n[3] - 1) / n[3];
            to.stride[d] *= n[3];
            return to;
        }
        case EXPAND: {
            to.rank = int(n.size());
            for (int d = 0; d < to.rank; ++d) {
                const int own = d - (to.rank - x.rank);
                to.shape[d] = n[d] >= 0 ? n[d] : own >= 0 ? x.shape[own] : 1;
            }
            spread(x, to.rank, to.shape, to.stride);
            return to;
        }
    }
    fail("an unknown view");
}

void broadcast(Value& to, const Value& a, const Value& b) {
    to.rank = a.rank > b.rank ? a.rank : b.rank;
    for (int d = 0; d < to.rank; ++d) {
        const int i = d - (to.rank - a.rank), j = d - (to.rank - b.rank);
        const int64_t left = i < 0 ? 1 : a.shape[i], right = j < 0 ? 1 : b.shape[j];
        to.shape[d] = left == 1 ? right : left;
    }
    to.lay_out();
}

}  // namespace
