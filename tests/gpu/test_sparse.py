"""The sparse MLP kernels in a CUDA graph: captured once, replayed for other activations, the same bits as a plain call."""

import pytest
import torch

from thresher import site_counts
from thresher.kernels import catalog
from thresher.kernels.sparse import cuda as sparse_cuda
from thresher.kernels.sparse import down as sparse_down
from thresher.kernels.sparse import mlp as sparse_mlp

pytestmark = pytest.mark.gpu
catalog.load()
NEURONS, WIDTH, FEATURES = 2048, 512, 640


def calls(tokens, dtype):
    """(activations, run, reference) of the two operators. run and reference take the activations."""
    g = torch.Generator().manual_seed(tokens)

    def random(*size):
        return (torch.randn(*size, generator=g) / 16).to("cuda", dtype)

    act = sparse_down.activations((tokens,), NEURONS, 0.1, "cuda", dtype, g)
    x, up, weight, bias = (
        random(tokens, WIDTH),
        random(NEURONS, WIDTH),
        random(NEURONS, FEATURES),
        random(FEATURES),
    )
    tail = (weight, None, bias, None)
    gated = (x, up, None, None, "identity", *tail)
    down, mlp = sparse_down.sparse_down, sparse_mlp.sparse_mlp
    return [
        (act, lambda a: sparse_cuda.run_down(a, *tail, "graph"), lambda a: down.reference(a, *tail, 1.0, 16, "")),
        (act, lambda a: sparse_cuda.run_mlp(a, *gated, "graph"), lambda a: mlp.reference(a, *gated, 1.0, 16, "")),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 16])
def test_captured_and_replayed(tokens, dtype):
    for act, run, reference in calls(tokens, dtype):
        held = act.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # Triton compiles, and the counter is made, before the capture
            run(held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(held)
        for density in (0.0, 0.05, 1.0):
            other = sparse_down.activations(
                (tokens,), NEURONS, density, "cuda", dtype, torch.Generator().manual_seed(9)
            )
            held.copy_(other)
            site_counts.reset()
            graph.replay()
            torch.cuda.synchronize()
            union = float((other != 0).any(0).float().mean())
            assert site_counts.all_sites()["graph"].union_density == pytest.approx(union)
            assert torch.equal(out, run(other))
            expected = reference(other).double()
            error = (out.double() - expected).norm() / expected.norm().clamp_min(1e-30)
            assert error <= (1e-5 if dtype == torch.float32 else 1e-2)
