"""Runs the Triton kernel in Triton's interpreter; a program of its own, since that mode is per process."""

import torch

from thresher.kernels.varlen.attention import varlen_attention, varlen_attention_masked
from thresher.kernels.varlen.cuda import launch


def samples(op, dtype):
    for sample in op.inputs(torch.device("cpu"), dtype):
        if op is varlen_attention:
            common, (causal, window, softcap, *sinks) = sample.args[:6], sample.args[6:]
            given = dict(zip(("sinks",), sinks))
            yield sample, launch(*common, causal=causal, window=window, softcap=softcap, **given)
        else:
            q, k, v, mask, rows, cols, *rest = sample.args
            yield sample, launch(q, k, v, *rest, mask=mask, rows=rows, cols=cols)


def check(op, dtype):
    for sample, out in samples(op, dtype):
        expected = op.reference(*sample.args)
        assert out.stride() == expected.stride() and out.dtype == dtype, sample.label
        error = (out.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
        assert error <= op.tolerance[dtype], (op.name, dtype, sample.label, float(error))


def check_isolation():
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 16, generator=make).transpose(1, 2) for _ in range(3))
    offsets = torch.tensor([0, 20, 33, 70], dtype=torch.int32)
    for causal, window in ((True, -1), (False, -1), (True, 4)):
        before = launch(q, k, v, offsets, 37, 0.3, causal=causal, window=window)
        poisoned = [t.clone() for t in (q, k, v)]
        for tensor in poisoned:
            tensor[:, :, 20:33] = torch.nan
        after = launch(*poisoned, offsets, 512, 0.3, causal=causal, window=window)
        assert after[:, :, 20:33].isnan().all()
        assert torch.equal(before[:, :, :20], after[:, :, :20])
        assert torch.equal(before[:, :, 33:], after[:, :, 33:])


if __name__ == "__main__":
    for op in (varlen_attention, varlen_attention_masked):
        for dtype in (torch.float32, torch.float16):  # the interpreter has no bfloat16 arithmetic
            check(op, dtype)
    check_isolation()
    print("interpreted")
