"""The sparse MLP operators: what must hold bit for bit, where NaN goes, when they turn dense."""

import pytest
import torch

from thresher import files, site_counts
from thresher.errors import ArgumentError
from thresher.kernels import catalog, native
from thresher.kernels.sparse import cpp as sparse_native
from thresher.kernels.sparse import down as sparse_down
from thresher.kernels.sparse import mlp as sparse_mlp
from thresher.kernels.sparse import tune as sparse_tune

catalog.load()
needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="needs a C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]


def _case(tokens, neurons, features, density, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    act = sparse_down.activations((tokens,), neurons, density, "cpu", dtype, g)
    return act, torch.randn(neurons, features, generator=g).to(dtype)


def _down(act, weight, scale=None, bias=None, threshold=None, tau=1.0, bmax=64, site=""):
    return sparse_down.sparse_down(act, weight, scale, bias, threshold, tau, bmax, site)


def _mlp(gate, x, up, weight, up_act="identity", threshold=None, tau=1.0, bmax=64, site=""):
    return sparse_mlp.sparse_mlp(
        gate, x, up, None, None, up_act, weight, None, None, threshold, tau, bmax, site
    )


def _all_active(act, weight, scale=None):
    """The same kernel with every neuron in the union: a threshold below any |a| keeps them all."""
    everything = torch.tensor(-1.0)
    out, active = sparse_native.down(act, weight, scale, None, everything, weight.shape[0])
    assert active == weight.shape[0]
    return out


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 16])
@pytest.mark.parametrize("active", [0, 1, 7, 8, 9, 300])
def test_skipping_neurons_changes_no_bit(dtype, tokens, active):
    act, weight = _case(tokens, 300, 136, 1.0, dtype)
    off = torch.randperm(300, generator=torch.Generator().manual_seed(active))[active:]
    act[:, off] = 0
    assert torch.equal(_down(act, weight), _all_active(act, weight))


@needs_native
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 5])
def test_skipping_changes_no_bit_of_quantized_weights(bits, tokens):
    g = torch.Generator().manual_seed(0)
    act, _ = _case(tokens, 200, 96, 0.2)
    weight, scale = sparse_down.quantized(200, 96, 3, "cpu", g, bits)
    assert torch.equal(_down(act, weight, scale), _all_active(act, weight, scale))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("up_act", sparse_mlp.UP_ACTS)
def test_a_token_does_not_depend_on_its_batch_or_the_thread_count(dtype, up_act, threads):
    gate, weight = _case(6, 1024, 520, 0.3, dtype)
    x, up = (torch.randn(*shape).to(dtype) for shape in ((6, 256), (1024, 256)))
    threads(1)
    down, gated = _down(gate, weight), _mlp(gate, x, up, weight, up_act)
    threads(2)
    assert torch.equal(_down(gate, weight), down)
    assert torch.equal(_mlp(gate, x, up, weight, up_act), gated)
    for t in range(6):
        one = slice(t, t + 1)
        assert torch.equal(_down(gate[one], weight), down[one])
        assert torch.equal(_mlp(gate[one], x[one], up, weight, up_act), gated[one])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.05, 1.0])
@pytest.mark.parametrize("tokens", [1, 16])
def test_no_less_exact_than_twice_the_dense_product(tokens, density, dtype):
    act, weight = _case(tokens, 4096, 256, density, dtype)
    exact = act.double() @ weight.double()
    dense = torch.nn.functional.linear(act, weight.t().contiguous())
    assert (_down(act, weight).double() - exact).norm() <= 2 * (dense.double() - exact).norm()


@needs_native
@pytest.mark.parametrize("tokens", [1, 2, 12, 13, 64, 129])
@pytest.mark.parametrize(("neurons", "features"), [(128, 64), (131, 96), (77, 45)])
def test_the_dense_product_of_a_neuron_major_bf16_weight(tokens, neurons, features):
    act, weight = _case(tokens, neurons, features, 1.0, torch.bfloat16)
    bias = torch.linspace(-2, 2, features).bfloat16()
    exact = act.double() @ weight.double() + bias.double()
    ours = sparse_native.matmul(act, weight, None, bias)
    dense = torch.nn.functional.linear(act, weight.t().contiguous(), bias)
    assert (ours.double() - exact).norm() <= 1.2 * (dense.double() - exact).norm()


@needs_native
@pytest.mark.parametrize("tau", [1.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_nan_and_inf_reach_the_output(tau, threshold):
    act, weight = _case(4, 96, 40, 0.3)
    act[0, 5], act[1, 6], act[2, 7] = float("nan"), float("inf"), float("-inf")
    limit = None if threshold is None else torch.tensor(threshold)
    out = _down(act, weight, threshold=limit, tau=tau)
    assert out[0].isnan().all()
    assert torch.equal(out[1], torch.copysign(torch.tensor(float("inf")), weight[6]))
    assert torch.equal(out[2], torch.copysign(torch.tensor(float("inf")), -weight[7]))
    assert out[3].isfinite().all()


@needs_native
@pytest.mark.parametrize("tau", [1.0, 0.0], ids=["sparse", "dense"])
def test_gated_nan_reaches_the_output_and_an_idle_gate_hides_overflow(tau):
    gate, weight = _case(3, 96, 40, 0.3)
    x, up = torch.randn(3, 32), torch.randn(96, 32)
    gate[0, 5], gate[1, 6], gate[:, 7] = float("nan"), 1.0, 0.0
    up[6], up[7] = float("nan"), float("inf")
    gate[0, 6] = gate[2, 6] = 0.0
    for up_act in sparse_mlp.UP_ACTS:
        out = _mlp(gate, x, up, weight, up_act, tau=tau)
        assert out[0].isnan().all() and out[1].isnan().all()
        assert out[2].isfinite().all()


@needs_native
def test_the_threshold_itself_is_dropped_and_denormals_are_kept():
    act = torch.zeros(1, 8)
    act[0, 0], act[0, 1], act[0, 2] = 0.5, -0.5, 0.5000001
    act[0, 3], act[0, 4] = 1e-42, -0.0
    weight = torch.full((8, 4), 1e20)
    site_counts.reset()
    _down(act, weight, threshold=torch.tensor(0.5), site="at threshold")
    _down(act, weight, site="exact")
    sites = site_counts.all_sites()
    assert (sites["at threshold"].active, sites["exact"].active) == (1, 4)
    assert float(_down(act[:, 3:5].contiguous(), weight[3:5])[0, 0]) == pytest.approx(1e-42 * 1e20, rel=1e-2)


@needs_native
def test_dispatch_counts_by_site():
    act, weight = _case(2, 256, 64, 0.1)
    union = int((act != 0).any(0).sum())
    site_counts.reset()
    _down(act, weight, tau=0.5, site="a")
    _down(act, weight, tau=0.01, site="a")
    _down(act.repeat(20, 1), weight, tau=1.0, bmax=16, site="a")
    count = site_counts.all_sites()["a"]
    assert (count.sparse, count.dense, count.active, count.seen) == (1, 2, union, 256)
    assert count.union_density == union / 256
    site_counts.reset()
    assert count.union_density is None


@needs_native
def test_three_dimensions_strided_input_and_a_changed_weight():
    act, weight = _case(12, 128, 48, 0.3)
    strided = act.view(3, 4, 128).transpose(0, 1)
    torch.testing.assert_close(_down(strided, weight), strided @ weight)
    weight.mul_(2)
    torch.testing.assert_close(_down(strided, weight), strided @ weight)


@needs_native
def test_break_even_is_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path)
    sparse_tune._break_even.cache_clear()
    site = sparse_tune.Site(256, 64, 0, torch.float32, torch.float32)
    first = sparse_tune.prepare([site], batches=[1, 3])
    assert set(first) == {(site, 1), (site, 4)} and all(0 <= tau <= 1 for tau in first.values())
    assert (tmp_path / "sparse_break_even.json").is_file()
    monkeypatch.setattr(sparse_tune, "measure", lambda *_: pytest.fail("measured again"))
    sparse_tune._break_even.cache_clear()
    assert sparse_tune.prepare([site], batches=[1, 3]) == first
    assert sparse_tune.break_even(site, 65) == 0.0
    act, weight = _case(3, 256, 64, 0.0)
    site_counts.reset()
    _down(act, weight, tau=-1.0, site="auto")
    assert site_counts.all_sites()["auto"].sparse == 1
    sparse_tune._break_even.cache_clear()


def test_wrong_arguments_are_named():
    act, weight = _case(2, 16, 8, 0.5)
    with pytest.raises(ArgumentError, match="neuron-major"):
        _down(act, weight.t().contiguous())
    with pytest.raises(ArgumentError, match="int8 with a scale"):
        _down(act, weight.to(torch.int8))
    with pytest.raises(ArgumentError, match="scale: got"):
        _down(act, weight.to(torch.int8), torch.ones(16, 3))
    with pytest.raises(ArgumentError, match="threshold: got"):
        _down(act, weight, threshold=torch.ones(3))
    with pytest.raises(ArgumentError, match="bias: got"):
        _down(act, weight, bias=torch.ones(8).double())
    with pytest.raises(ArgumentError, match="Did you mean 'relu'"):
        _mlp(act, act, torch.ones(16, 16), weight, up_act="reLu")
