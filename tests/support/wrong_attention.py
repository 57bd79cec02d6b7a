"""Packed attention that is wrong in one way each, as functions that stand in for a provider's."""

import itertools

import torch

from thresher.kernels.varlen.attention import attend


def next_segment_too(op):
    """One key too many: each token but the last segment's sees the first token of the next segment."""

    def run(q, k, v, cu, max_len, scale, causal, window, softcap):
        out = op.reference(q, k, v, cu, max_len, scale, causal, window, softcap).clone()
        ends = cu.tolist()
        for begin, end in itertools.pairwise(ends):
            if begin == end or end == q.shape[2]:
                continue
            seen = torch.ones(end - begin, end - begin + 1, dtype=torch.bool)
            if causal:
                seen = seen.tril()
                seen[:, -1] = True
            parts = q[:, :, begin:end], k[:, :, begin : end + 1], v[:, :, begin : end + 1]
            out[:, :, begin:end] = attend(*parts, scale, softcap, seen)
        return out

    return run


def other_scale(op):
    """Scores a quarter too large."""
    return lambda q, k, v, cu, max_len, scale, *rest: op.reference(q, k, v, cu, max_len, scale * 1.25, *rest)


def read_as_fp32(op):
    """What a kernel does that takes any pointer for one to fp32 numbers."""

    def run(q, k, v, *rest):
        words = v.contiguous().view(torch.int16).flatten()
        wide = torch.cat([words, words])[: 2 * words.numel()].view(torch.float32).reshape(v.shape)
        return op.reference(q, k, wide.nan_to_num(0.0).clamp(-8, 8).to(v.dtype), *rest)

    return run
