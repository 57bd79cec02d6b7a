// A whole step of a decoder in one call: a list of operations over a few rows, run one after the other.
//
// Python makes the list once, from the graph that would otherwise be compiled (lowering/inductor/steps). A layer of a
// few rows is little more than its weights' products: what stands between them is done in the first cache, in PyTorch's
// own order and roundings, so that nothing needs to be compiled for a model. Values keep their memory between calls.

#include <memory>
#include <mutex>

#include "step_pointwise.h"
#include "step_products.h"
#include "step_shapes.h"

namespace {

enum Code { VIEW, UNARY, BINARY, MEAN, CAT, LINEAR, WNA16, NVFP4, ATTENTION, HADAMARD, WRITE, PUT };

struct Size {
    int64_t known;
    int64_t given;  // the number of a size that the call gives, or -1
};

struct Operation {
    int code, kind, type;
    int64_t out, slot;  // slot: of its memory, or -1 where it is a view, or a result
    std::vector<int64_t> in;
    std::vector<Size> sizes;
    std::vector<double> numbers;
};

// What one call works with; calls at the same time have one each.
struct Work {
    std::vector<Value> values;
    std::vector<Memory> slots;
    std::vector<int64_t> numbers;
    Scratch scratch;
    Memory asked, answer;
    explicit Work(int64_t values, int64_t slots) : values(values), slots(slots) {}
};

struct Step {
    std::vector<Operation> operations;
    std::vector<float> constants;
    int64_t values, slots, external;
    std::mutex lock;
    std::vector<std::unique_ptr<Work>> free;
};

struct Tail {
    const void* data;
    int64_t batch_stride, head_stride, slot_stride;
};

class Run {
  public:
    Run(const Step& step, Work& work, const int64_t* given, int threads)
        : step_(step), work_(work), values_(work.values), given_(given), threads_(threads) {}

    void all() {
        for (const Operation& op : step_.operations) one(op);
    }

  private:
    const Step& step_;
    Work& work_;
    std::vector<Value>& values_;
    const int64_t* given_;
    int threads_;

    const Value& in(const Operation& op, size_t i) const { return values_[op.in[i]]; }
    const Value* maybe(const Operation& op, size_t i) const { return op.in[i] < 0 ? nullptr : &values_[op.in[i]]; }
    int64_t size(const Operation& op, size_t i) const {
        return op.sizes[i].given < 0 ? op.sizes[i].known : given_[op.sizes[i].given];
    }
    const std::vector<int64_t>& sizes(const Operation& op) const {
        work_.numbers.resize(op.sizes.size());
        for (size_t i = 0; i < op.sizes.size(); ++i) work_.numbers[i] = size(op, i);
        return work_.numbers;
    }

    // Memory for an output of these sizes: its own, or the caller's, whose sizes must be the same.
    Value& place(const Operation& op, Value made) {
        made.type = Type(op.type);
        made.lay_out();
        Value& to = values_[op.out];
        if (op.slot < 0) {
            bool same = to.rank == made.rank && to.type == made.type;
            for (int d = 0; d < made.rank && same; ++d) same = to.shape[d] == made.shape[d];
            if (!same) fail("a result of other sizes than the caller made room for");
            return to;
        }
        made.data = work_.slots[op.slot].of(made.count() * width(made.type));
        return to = made;
    }

    // x laid out in order, copied if it is not.
    Value ordered(const Value& x, Memory& memory) {
        if (x.contiguous()) return x;
        Value to = x;
        to.lay_out();
        to.data = memory.of(to.count() * width(to.type));
        copy(to, x);
        return to;
    }

    void one(const Operation& op) {
        switch (op.code) {
            case VIEW: {
                bool fits = true;
                const Value x = in(op, 0);
                Value to = viewed(op.kind, x, sizes(op), fits);
                if (fits) {
                    values_[op.out] = to;
                    return;
                }
                Value source = x;
                Value& made = place(op, to);
                Value as_given = x;
                as_given.lay_out();
                as_given.data = made.data;
                copy(as_given, source);
                return;
            }
            case UNARY: {
                const Value x = in(op, 0);
                return unary(op.kind, place(op, x), x);
            }
            case BINARY: {
                const Value a = in(op, 0), b = in(op, 1);
                Value to;
                broadcast(to, a, b);
                return binary(op.kind, float(op.numbers[0]), place(op, to), a, b);
            }
            case MEAN: {
                const Value x = ordered(in(op, 0), work_.scratch.wide);
                Value to = x;
                if (op.kind) to.shape[to.rank - 1] = 1;
                else --to.rank;
                return mean(place(op, to), x);
            }
            case CAT: {
                const int64_t d = from_end(size(op, 0), in(op, 0).rank);
                Value to = in(op, 0);
                for (size_t i = 1; i < op.in.size(); ++i) to.shape[d] += in(op, i).shape[d];
                Value part = place(op, to);
                for (size_t i = 0; i < op.in.size(); ++i) {
                    const Value& source = in(op, i);
                    part.shape[d] = source.shape[d];
                    if (source.data != part.data) copy(part, source);  // else it lies there: a cache with room behind
                    else if (!source.lies_as(part)) fail("a part that lies where it should go, in another order");
                    part.data += part.shape[d] * part.stride[d] * width(part.type);
                }
                return;
            }
            case LINEAR: {
                const Value x = ordered(in(op, 0), work_.asked);
                return linear(projected(op, x, in(op, 1).shape[0]), x, in(op, 1), maybe(op, 2), size(op, 0), size(op, 1) != 0,
                              work_.scratch, threads_);
            }
            case WNA16: {
                const Value x = ordered(in(op, 0), work_.asked);
                const LowBit how{size(op, 0), size(op, 1), size(op, 2), size(op, 3), size(op, 4), size(op, 5)};
                return wna16(projected(op, x, in(op, 1).shape[0]), x, in(op, 1), in(op, 2), maybe(op, 3), maybe(op, 4),
                             how, work_.scratch, threads_);
            }
            case NVFP4: {
                const Value x = ordered(in(op, 0), work_.asked);
                const Fp4 how{size(op, 0), size(op, 1), size(op, 2), size(op, 3), size(op, 4)};
                return nvfp4(projected(op, x, in(op, 1).shape[0]), x, in(op, 1), in(op, 2), in(op, 3), maybe(op, 4), how,
                             work_.scratch, threads_);
            }
            case ATTENTION: return attention(op);
            case HADAMARD: {
                const Value x = ordered(in(op, 0), work_.asked);
                const Value* signs = maybe(op, 1);
                const Value to = place(op, x);
                const int64_t rows = x.last() ? x.count() / x.last() : 0, block = size(op, 0);
                if (in(op, 2).type != F32 || block < 1 || x.last() % block || block % size(op, 1) ||
                    (signs && !signs->sized_as({x.last()})) || !in(op, 2).sized_as({block / size(op, 1), block / size(op, 1)}))
                    fail("a transform of other sizes than the input's");
                float* const y = to.type == F32 ? reinterpret_cast<float*>(to.data)
                                                : reinterpret_cast<float*>(work_.scratch.made.of(to.count() * 4));
                functions.hadamard(floats(x, work_.scratch.wide), y, signs ? floats(*signs, work_.scratch.bias) : nullptr,
                                   reinterpret_cast<const float*>(in(op, 2).data), rows, x.last() / block,
                                   in(op, 2).shape[0], size(op, 1), to.count() < 1 << 16 ? 1 : threads_);
                return keep(to.type, to.data, to.count(), y);
            }
            case WRITE: return copy(in(op, 0), in(op, 1));
            case PUT: {  // in place: x.index_copy_(dim, index, source)
                Value to = in(op, 0), part = in(op, 2);
                const int64_t d = from_end(size(op, 0), to.rank), all = to.shape[d];
                const Value& index = in(op, 1);
                const int64_t count = index.count(), step = index.rank ? index.stride[index.rank - 1] : 1;
                if (index.type != LONG || index.rank > 1 || part.rank != to.rank || part.shape[d] != count)
                    fail("an index that does not belong to what is written");
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t at = reinterpret_cast<const int64_t*>(index.data)[i * step];
                    if (at < 0 || at >= all) fail("an index beyond the end of a cache");
                    Value row = to, source = part;
                    row.shape[d] = source.shape[d] = 1;
                    row.data += at * to.stride[d] * width(to.type);
                    source.data += i * part.stride[d] * width(part.type);
                    copy(row, source);
                }
                values_[op.out] = to;
                return;
            }
        }
        fail("an unknown operation");
    }

    Value& projected(const Operation& op, const Value& x, int64_t n) {
        Value to = x;
        to.shape[to.rank - 1] = n;
        return place(op, to);
    }

    // One query a row over keys and values of a cache; visible: bool [rows, slots], or none.
    void attention(const Operation& op) {
        const Value q = in(op, 0), k = in(op, 1), v = in(op, 2);
        if (q.rank != 4 || q.shape[2] != 1) fail("attention of more than one query a row");
        if (k.stride[3] != 1 || v.stride[3] != 1) fail("keys and values with a stride inside");
        const int64_t rows = q.shape[0], slots = k.rank == 4 ? k.shape[2] : -1, heads = k.rank == 4 ? k.shape[1] : 0;
        if (!k.sized_as({rows, heads, slots, q.shape[3]}) || v.rank != 4 || !v.sized_as({rows, heads, slots, v.shape[3]}) ||
            heads < 1 || q.shape[1] % heads || k.type != v.type || k.type > F16 ||
            (op.in[3] >= 0 && !in(op, 3).sized_as({rows, slots})))
            fail("queries, keys, values and a mask that do not belong together");
        Value wide = q;
        wide.type = F32;
        wide.lay_out();
        wide.data = work_.asked.of(wide.count() * 4);
        copy(wide, q);
        float* const asked = reinterpret_cast<float*>(wide.data);
        const float scale = float(op.numbers[0]);
        for (int64_t i = 0; i < wide.count(); ++i) asked[i] *= scale;
        Value to = q;
        to.shape[3] = v.shape[3];
        const Value& out = place(op, to);
        float* const y = out.type == F32 ? reinterpret_cast<float*>(out.data)
                                         : reinterpret_cast<float*>(work_.answer.of(out.count() * 4));
        Value seen;
        if (op.in[3] >= 0) seen = ordered(in(op, 3), work_.scratch.bias);
        const Tail keys{k.data, k.stride[0], k.stride[1], k.stride[2]};
        const Tail values{v.data, v.stride[0], v.stride[1], v.stride[2]};
        functions.attention(asked, nullptr, 0, &keys, &values, k.shape[2], k.type, op.in[3] < 0 ? nullptr : seen.data, y,
                            q.shape[0], q.shape[1], k.shape[1], 1, q.shape[3], v.shape[3], threads_);
        keep(out.type, out.data, out.count(), y);
    }
};

constexpr int64_t kStrided = 256;
thread_local std::string message;

}  // namespace

extern "C" {

// pointers: `Functions`, in order.
void step_functions(void* const* pointers, int64_t count) {
    if (count * sizeof(void*) == sizeof functions) std::memcpy(&functions, pointers, sizeof functions);
}

// code: for each operation its code, kind, type, output, slot; then counted lists of inputs, sizes (a known one and -1,
// or 0 and the number of one that calls give) and numbers (the bits of doubles). external: how many values a call gives,
// which come first; behind them `constants` of fp32, one element each.
void* step_make(const int64_t* code, int64_t length, int64_t values, int64_t slots, int64_t external,
                const double* constants, int64_t constant_count) {
    std::unique_ptr<Step> step(new Step);
    step->values = values, step->slots = slots, step->external = external;
    for (int64_t i = 0; i < constant_count; ++i) step->constants.push_back(float(constants[i]));
    const int64_t* const end = code + length;
    while (code < end) {
        Operation op;
        op.code = int(code[0]), op.kind = int(code[1]), op.type = int(code[2]), op.out = code[3], op.slot = code[4];
        code += 5;
        op.in.assign(code + 1, code + 1 + *code);
        code += 1 + *code;
        const int64_t sizes = *code++;
        for (int64_t i = 0; i < sizes; ++i, code += 2) op.sizes.push_back({code[0], code[1]});
        const int64_t numbers = *code++;
        for (int64_t i = 0; i < numbers; ++i) {
            double number;
            std::memcpy(&number, code++, sizeof number);
            op.numbers.push_back(number);
        }
        step->operations.push_back(std::move(op));
    }
    return step.release();
}

void step_free(void* step) { delete static_cast<Step*>(step); }

// data: of each external value; described: type, rank and sizes of each, which is contiguous; or type + kStrided, rank, sizes
// and strides. given: sizes. Null, or what was wrong.
const char* step_run(void* handle, void* const* data, const int64_t* described, const int64_t* given, int threads) {
    Step& step = *static_cast<Step*>(handle);
    std::unique_ptr<Work> work;
    try {
        {
            std::lock_guard<std::mutex> held(step.lock);
            if (!step.free.empty()) work = std::move(step.free.back()), step.free.pop_back();
        }
        if (!work) work.reset(new Work(step.values, step.slots));
        for (int64_t i = 0; i < step.external; ++i) {
            Value& v = work->values[i];
            v.data = static_cast<char*>(data[i]);
            const bool strided = *described & kStrided;
            v.type = Type(*described++ & ~kStrided);
            v.rank = int(*described++);
            if (v.rank < 0 || v.rank > kRank) fail("a value of too many dimensions");
            for (int d = 0; d < v.rank; ++d) v.shape[d] = *described++;
            v.lay_out();
            if (strided) for (int d = 0; d < v.rank; ++d) v.stride[d] = *described++;
        }
        for (size_t i = 0; i < step.constants.size(); ++i) {
            Value& v = work->values[step.external + i];
            v = Value();
            v.data = reinterpret_cast<char*>(&step.constants[i]);
        }
        Run(step, *work, given, threads).all();
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    std::lock_guard<std::mutex> held(step.lock);
    step.free.push_back(std::move(work));
    return nullptr;
}

}  // extern "C"
