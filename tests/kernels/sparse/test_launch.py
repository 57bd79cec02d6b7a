"""What a CUDA graph needs of the sparse kernels' launches, without a GPU.

Under fake tensors nothing has a value: reading one (`.item()`, `nonzero`, a branch on data) raises. So what launches
there depends on shapes alone, and the host waits for nothing.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from thresher import site_counts
from thresher.kernels.sparse import cuda as sparse_cuda

KERNELS = ("gemv", "compact", "up", "down", "reduce")


class Recorder:
    """Stands for a Triton kernel: notes grids instead of launching."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        def launch(*tensors, **constants):
            shapes = [tuple(t.shape) for t in tensors if isinstance(t, torch.Tensor)]
            assert all(type(size) is int for size in grid)
            self.launches.append((self.name, grid, shapes))

        return launch


@pytest.fixture
def launches(monkeypatch):
    pytest.importorskip("triton")
    made = []
    for name in KERNELS:
        monkeypatch.setattr(sparse_cuda.kernels, name, Recorder(name, made))
    return made


def run(kind, tokens, make):
    weight, up = make(1024, 256), make(1024, 128)
    act, x, bias = make(tokens, 1024), make(tokens, 128), make(256)
    if kind == "down":
        return sparse_cuda.run_down(act, weight, None, bias, None)
    return sparse_cuda.run_mlp(act, x, up, None, None, "relu", weight, None, bias, None)


@pytest.mark.parametrize("tokens", [1, 2, 3, 16])
@pytest.mark.parametrize("kind", ["down", "mlp"])
def test_what_is_launched_depends_on_shapes_alone(kind, tokens, launches):
    with FakeTensorMode():
        out = run(kind, tokens, torch.empty)
        assert out.shape == (tokens, 256)
    fake = list(launches)
    for density in (0.0, 1.0):
        launches.clear()
        run(kind, tokens, lambda *size: torch.rand(size) * (torch.rand(size) < density))  # noqa: B023
        assert launches == fake
    listing = kind == "mlp" or tokens > 2
    assert next(name for name, *_ in fake) == ("compact" if listing else "gemv")


def test_this_test_would_see_a_host_that_waits(monkeypatch, launches):
    waiting = sparse_cuda._Call.compact

    def compact(self, threshold):
        waiting(self, threshold)
        return int(self.counts.sum())  # what the launch must not do

    monkeypatch.setattr(sparse_cuda._Call, "compact", compact)
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        run("down", 16, torch.empty)


def test_the_dispatch_by_tokens_reads_no_activation():
    with FakeTensorMode():
        for tokens, sparse in ((1, True), (16, True), (17, False)):
            assert sparse_cuda._sparse(-1.0, 64, torch.empty(tokens, 1024)) is sparse


def test_no_counter_is_made_while_a_graph_is_captured(monkeypatch):
    """Its zeroing would be captured too, and every replay would start from zero."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = torch.device("cpu")
    assert site_counts.count_on_device("captured first", device) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    counter = site_counts.count_on_device("captured first", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert site_counts.count_on_device("captured first", device) is counter
