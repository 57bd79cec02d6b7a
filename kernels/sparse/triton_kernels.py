"""Triton kernels of the sparse MLP operators, for 1 to 16 tokens.

Who is active is found, listed and used on the device: grids are fixed by shapes, loops end at a
count in device memory, and the host waits for nothing, so a call can be part of a CUDA graph.
Neurons are cut into chunks; each chunk's sum over its active rows goes to its own place in fp32, and
`reduce` adds the chunks in order. There are no atomics: the same input gives the same bits.

`gemv` tests neurons as it goes and loads only active rows; `compact` lists them first, for `up` and
`down`, which then work on full tiles whatever the density. The shape of the first follows TEAL
(arXiv 2408.14690), that of the second Polar Sparsity (arXiv 2505.14884).
"""

from __future__ import annotations

from ..optional_triton import MISSING

if MISSING is None:
    import triton
    import triton.language as tl

    @triton.jit
    def _kept(act, threshold, token, neuron, tokens, neurons, THRESHOLD: tl.constexpr):
        """(fp32 [T, N] activations, zero where not kept; which are kept).

        THRESHOLD: 0 none, 1 one for all, 2 one for each neuron.
        """
        inside = (token < tokens)[:, None] & (neuron < neurons)[None, :]
        a = tl.load(act + token[:, None] * neurons + neuron[None, :], mask=inside, other=0.0).to(tl.float32)
        if THRESHOLD == 0:
            drop = a == 0.0
        elif THRESHOLD == 1:
            drop = tl.abs(a) <= tl.load(threshold)
        else:
            limit = tl.load(threshold + neuron, mask=neuron < neurons, other=0.0)
            drop = tl.abs(a) <= limit[None, :]
        kept = inside & (drop == 0)  # a NaN compares false, and is kept
        return tl.where(kept, a, 0.0), kept

    @triton.jit
    def gemv(act, weight, scale, threshold, partials, counts, tokens, neurons, features, groups, width,
             THRESHOLD: tl.constexpr, SCALED: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr,
             BK: tl.constexpr, BN: tl.constexpr):  # fmt: skip
        """Program (column tile, chunk): partials[chunk, t, cols] = sum over the chunk's active rows."""
        token = tl.arange(0, BT)
        first_col = tl.program_id(0) * BN
        col = first_col + tl.arange(0, BN)
        chunk = tl.program_id(1)
        total = tl.zeros((BT, BN), tl.float32)
        found = 0
        for first in range(0, CHUNK, BK):
            neuron = chunk * CHUNK + first + tl.arange(0, BK)
            value, kept = _kept(act, threshold, token, neuron, tokens, neurons, THRESHOLD)
            on = tl.max(kept.to(tl.int32), 0)
            found += tl.sum(on)
            rows = weight + neuron.to(tl.int64)[:, None] * features + col[None, :]
            w = tl.load(rows, mask=(on > 0)[:, None] & (col < features)[None, :], other=0.0,
                        eviction_policy="evict_first").to(tl.float32)  # fmt: skip
            if SCALED:
                s = tl.load(scale + neuron * groups + first_col // width, mask=on > 0, other=0.0)
                value *= s[None, :]
            total += tl.sum(value[:, :, None] * w[None, :, :], 1)
        out = (chunk * tokens + token)[:, None] * features + col[None, :]
        tl.store(partials + out, total, mask=(token < tokens)[:, None] & (col < features)[None, :])
        if tl.program_id(0) == 0:
            tl.store(counts + chunk, found)

    @triton.jit
    def compact(act, threshold, index, value, counts, tokens, neurons,
                THRESHOLD: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr):  # fmt: skip
        """Program (chunk): list the chunk's active neurons at its place in index, values [neuron, BT]."""
        chunk = tl.program_id(0)
        token = tl.arange(0, BT)
        neuron = chunk * CHUNK + tl.arange(0, CHUNK)
        a, kept = _kept(act, threshold, token, neuron, tokens, neurons, THRESHOLD)
        on = tl.max(kept.to(tl.int32), 0)
        place = chunk * CHUNK + tl.cumsum(on, 0) - 1
        tl.store(index + place, neuron, mask=on > 0)
        tl.store(
            value + place[None, :] * BT + token[:, None], a, mask=(on > 0)[None, :] & (token >= 0)[:, None]
        )
        tl.store(counts + chunk, tl.sum(on))

    @triton.jit
    def up(x, weight, scale, bias, index, value, counts, tokens, inputs,
           SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
           CHUNK: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):  # fmt: skip
        """Program (block of listed neurons, chunk): value *= act(x . weight[neuron] + bias), in place."""
        chunk = tl.program_id(1)
        listed = tl.program_id(0) * BR + tl.arange(0, BR)
        count = tl.load(counts + chunk)
        if tl.program_id(0) * BR < count:
            token = tl.arange(0, BT)
            place = chunk * CHUNK + listed
            valid = listed < count
            neuron = tl.load(index + place, mask=valid, other=0)
            u = tl.zeros((BR, BT), tl.float32)
            for first in range(0, inputs, BK):
                k = first + tl.arange(0, BK)
                rows = weight + neuron.to(tl.int64)[:, None] * inputs + k[None, :]
                w = tl.load(rows, mask=valid[:, None] & (k < inputs)[None, :], other=0.0,
                            eviction_policy="evict_first")  # fmt: skip
                at = x + token[None, :] * inputs + k[:, None]
                xs = tl.load(at, mask=(token < tokens)[None, :] & (k < inputs)[:, None], other=0.0)
                if BT >= 16:
                    u = tl.dot(w.to(xs.dtype), xs, u, input_precision=PRECISION)
                else:
                    u += tl.sum(w.to(tl.float32)[:, :, None] * xs.to(tl.float32)[None, :, :], 1)
            if SCALED:
                u *= tl.load(scale + neuron, mask=valid, other=0.0)[:, None]
            if HAS_BIAS:
                u += tl.load(bias + neuron, mask=valid, other=0.0).to(tl.float32)[:, None]
            if RELU:
                u = tl.where(u < 0.0, 0.0, u)  # a NaN stays
            at = value + place[:, None] * BT + token[None, :]
            gate = tl.load(at, mask=valid[:, None] & (token >= 0)[None, :], other=0.0)
            # A neuron that this token does not keep stays zero, whatever u is.
            tl.store(at, tl.where(gate == 0.0, 0.0, gate * u), mask=valid[:, None] & (token >= 0)[None, :])

    @triton.jit
    def down(index, value, counts, weight, scale, partials, tokens, features, groups, width,
             SCALED: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr,
             BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):  # fmt: skip
        """Program (column tile, chunk): partials[chunk, t, cols] = values^T @ weight[listed neurons]."""
        token = tl.arange(0, BT)
        first_col = tl.program_id(0) * BN
        col = first_col + tl.arange(0, BN)
        chunk = tl.program_id(1)
        count = tl.load(counts + chunk)
        total = tl.zeros((BT, BN), tl.float32)
        for first in range(0, count, BK):
            listed = first + tl.arange(0, BK)
            place = chunk * CHUNK + listed
            valid = listed < count
            neuron = tl.load(index + place, mask=valid, other=0)
            v = tl.load(value + place[None, :] * BT + token[:, None],
                        mask=valid[None, :] & (token >= 0)[:, None], other=0.0)  # fmt: skip
            rows = weight + neuron.to(tl.int64)[:, None] * features + col[None, :]
            w = tl.load(rows, mask=valid[:, None] & (col < features)[None, :], other=0.0,
                        eviction_policy="evict_first")  # fmt: skip
            if SCALED:
                v *= tl.load(scale + neuron * groups + first_col // width, mask=valid, other=0.0)[None, :]
            if BT >= 16:
                total = tl.dot(v.to(DTYPE), w.to(DTYPE), total, input_precision=PRECISION)
            else:
                total += tl.sum(v[:, :, None] * w.to(tl.float32)[None, :, :], 1)
        out = (chunk * tokens + token)[:, None] * features + col[None, :]
        tl.store(partials + out, total, mask=(token < tokens)[:, None] & (col < features)[None, :])

    @triton.jit
    def reduce(partials, bias, out, counts, counter, size, features, neurons, chunks,
               HAS_BIAS: tl.constexpr, COUNTED: tl.constexpr,
               BN: tl.constexpr, BC: tl.constexpr):  # fmt: skip
        """out[i] = sum over chunks of partials[chunk, i], in order.

        COUNTED: program 0 adds the active neurons and all neurons to counter [2].
        """
        at = tl.program_id(0) * BN + tl.arange(0, BN)
        inside = at < size
        total = tl.zeros((BN,), tl.float32)
        for chunk in range(0, chunks):
            total += tl.load(partials + chunk * size + at, mask=inside, other=0.0)
        if HAS_BIAS:
            total += tl.load(bias + at % features, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
        if COUNTED and tl.program_id(0) == 0:
            each = tl.arange(0, BC)
            active = tl.sum(tl.load(counts + each, mask=each < chunks, other=0))
            tl.store(counter, tl.load(counter) + active)
            tl.store(counter + 1, tl.load(counter + 1) + neurons)
