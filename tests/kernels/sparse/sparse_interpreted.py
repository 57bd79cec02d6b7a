"""What the sparse Triton kernels do with NaN, groups and counts, in Triton's interpreter; prints `agrees`.

Their samples are run by tests/support/interpreted.py.

Started by `test_triton.py` in a process of its own with TRITON_INTERPRET=1. fp32 and fp16 only:
the interpreter computes bf16 wrongly.
"""

import torch

from thresher import site_counts
from thresher.kernels.sparse import cuda as sparse_cuda
from thresher.kernels.sparse import down as sparse_down

DOWN = sparse_down.sparse_down


def error(actual, expected):
    """Relative L2 error."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    norm = expected.double().norm().clamp_min(1e-30)
    return float((actual.double() - expected.double()).norm() / norm)


def groups_nan_counts_and_repeats():
    g = torch.Generator().manual_seed(0)
    weight, scale = sparse_down.quantized(300, 256, 2, "cpu", g)
    for tokens in (1, 5):  # one by the masked kernel, five by the listing one
        act = sparse_down.activations((tokens,), 300, 0.2, "cpu", torch.float32, g)
        args = (act, weight, scale, None, None)
        assert error(sparse_cuda.run_down(*args), DOWN.reference(*args, 1.0, 16, "")) < 1e-5
        act[0, 5], act[0, 6] = float("nan"), -0.0
        site_counts.reset()
        out = sparse_cuda.run_down(*args, "counted")
        assert out[0].isnan().all() and out[1:].isfinite().all()
        assert torch.equal(out[1:], sparse_cuda.run_down(*args)[1:])
        union = int((act != 0).any(0).sum())  # NaN != 0
        assert site_counts.all_sites()["counted"].union_density == union / 300


groups_nan_counts_and_repeats()
print("agrees")
