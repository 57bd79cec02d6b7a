"""One segment does not change another's bits, in Triton's interpreter; a program of its own, since that mode is per process.

The kernel's samples are run by tests/support/interpreted.py."""

import torch

from thresher.kernels.varlen.cuda import launch


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
    check_isolation()
    print("interpreted")
