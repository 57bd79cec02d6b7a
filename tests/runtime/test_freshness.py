"""Weights made from others follow every way a model's weights change, also those that leave no trace."""

import dataclasses
import threading
import time
import types

import pytest
import torch
from torch import nn

import thresher
from thresher.graph.program import Program, Weight
from thresher.graph.stamp import Sample
from thresher.runtime import freshness
from thresher.runtime.freshness import Freshness


def _vector(m):
    values = nn.utils.parameters_to_vector(m.parameters())
    nn.utils.vector_to_parameters(values * 1.5, m.parameters())


EDITS = {
    "copy": lambda m: [p.copy_(p * 1.5) for p in m.parameters()],
    "data copy": lambda m: [p.data.copy_(p.data * 1.5) for p in m.parameters()],
    "data mul": lambda m: [p.data.mul_(1.5) for p in m.parameters()],
    "data new": lambda m: [setattr(p, "data", p.data * 1.5) for p in m.parameters()],
    "data of one": lambda m: m[1].weight.data.mul_(1.5),
    "numpy": lambda m: [p.numpy().__imul__(1.5) for p in m.parameters()],
    "load": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}, assign=True),
    "half and back": lambda m: (m.half(), m.float()),
    "vector": _vector,
    "set": lambda m: [p.set_(p * 1.5) for p in m.parameters()],
    "inference": lambda m: [torch.inference_mode()(p.mul_)(1.5) for p in m.parameters()],
}
NO_TRACE = {
    "data copy",
    "data mul",
    "data of one",
    "numpy",
    "inference",
}  # noticed by the first call after a pause


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64)).eval().requires_grad_(False)
    x = torch.randn(4, 32)
    options = {"bf16": {"min_weights": 0, "emulate": True}}
    return model, thresher.compile(model, (x,), "none", target="reference", **options), x


@pytest.fixture(scope="module")
def later():
    """Has so many seconds go by."""
    real, gone = time.perf_counter, [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(freshness, "time", types.SimpleNamespace(
            perf_counter=lambda: real() + gone[0], thread_time=time.thread_time))  # fmt: skip
        yield lambda seconds: gone.__setitem__(0, gone[0] + seconds)


@pytest.mark.parametrize("name", EDITS)
def test_the_call_after_an_edit_uses_the_new_weights(name, compiled, tmp_path, later):
    model, fast, x = compiled
    with torch.no_grad():
        EDITS[name](model)
        want = model(x)
    if name in NO_TRACE:
        later(10)
    got = fast(x)
    assert (got - want).abs().max() < 0.02 * want.abs().max()
    thresher.save(fast, tmp_path / "m", example_inputs=(x,))  # and so does a file written then
    again = thresher.load(tmp_path / "m", target="reference")(x)["output"]
    assert torch.equal(again, got)


def program(*tensors):
    """A program of derived weights only."""
    weights = {
        f"w{i}": Weight(f"half.{i}", t.half(), (f"full.{i}",), lambda s: s.half(), (t,))
        for i, t in enumerate(tensors)
    }
    return Program(torch.fx.GraphModule(nn.Module(), torch.fx.Graph()), weights, [])


def live(tensors):
    return {f"full.{i}": t for i, t in enumerate(tensors)}


def test_in_a_tight_loop_a_write_without_a_trace_is_noticed_soon(monkeypatch):
    tensors = [torch.randn(64, 64) for _ in range(20)]
    fresh = Freshness(program(*tensors), "sample")
    now = [fresh._began]

    def clock():
        now[0] += 5e-6  # what a look costs
        return now[0]

    monkeypatch.setattr(freshness.time, "perf_counter", clock)
    monkeypatch.setattr(freshness.time, "thread_time", clock)
    monkeypatch.setattr(freshness.time, "thread_time", clock)
    tensors[13].data.mul_(2)
    for _ in range(200):
        now[0] += 1e-3
        found, repacked = fresh.tensors([f"w{i}" for i in range(20)], live(tensors))
        if repacked:
            break
    assert repacked == 1 and torch.equal(found[13], tensors[13].half())


def test_looking_takes_no_more_than_its_share_of_the_time(monkeypatch):
    tensors = [torch.randn(8, 8) for _ in range(50)]
    fresh = Freshness(program(*tensors), "sample")
    looked, now = [], [fresh._began]

    def clock():
        return now[0]

    def stale(name):
        now[0] += 1e-5  # what it costs
        looked.append(name)
        return False

    monkeypatch.setattr(freshness.time, "perf_counter", clock)
    monkeypatch.setattr(freshness.time, "thread_time", clock)
    monkeypatch.setattr(fresh, "_stale", stale)
    for _ in range(20_000):
        now[0] += 1e-3  # the call itself
        fresh.tensors([], live(tensors))
    assert set(looked) == {f"w{i}" for i in range(50)}  # each in its turn
    assert len(looked) * 1e-5 <= 1.01 * freshness.SHARE * (now[0] - fresh._began)


def _halving(count):
    """A program with one weight, half of one given at each call, and how often it was computed."""
    made = program(torch.ones(8, 8))
    derive = made.weights["w0"].derive

    def counted(source):
        count.append(source)
        return derive(source)

    weights = {n: dataclasses.replace(w, derive=counted) for n, w in made.weights.items()}
    return types.SimpleNamespace(weights=weights)


@pytest.mark.parametrize("mode", ["check", "sample"])
def test_modules_that_take_turns_are_each_packed_once(mode):
    """Dynamo has one graph for all experts of a loop, and gives it each one's weights in turn."""
    count = []
    fresh = Freshness(_halving(count), mode)
    experts = [torch.full((8, 8), float(i)) for i in range(3)]
    for _ in range(4):
        for expert in experts:
            (found,), _ = fresh.tensors(["w0"], {"full.0": expert})
            assert torch.equal(found, expert.half())
    assert len(count) == 3
    experts[1].mul_(2)
    for expert in experts:
        assert torch.equal(fresh.tensors(["w0"], {"full.0": expert})[0][0], expert.half())
    assert len(count) == 4


def test_what_was_packed_goes_with_its_weight():
    count = []
    fresh = Freshness(_halving(count))
    for i in range(50):  # as where each step makes new weights
        fresh.tensors(["w0"], {"full.0": torch.full((8, 8), float(i))})
        count.clear()
    assert len(fresh._aside["w0"]) <= 1  # what the program was made with


def test_a_write_without_a_trace_is_noticed_of_a_weight_that_waits_its_turn(monkeypatch):
    fresh = Freshness(_halving([]), "sample")
    one, two = torch.full((8, 8), 1.0), torch.full((8, 8), 2.0)
    for expert in (one, two):
        fresh.tensors(["w0"], {"full.0": expert})
    one.data.mul_(3)
    monkeypatch.setattr(fresh, "_due", 0.0)
    assert torch.equal(fresh.tensors(["w0"], {"full.0": one})[0][0], one.half())


def test_threads_with_weights_of_their_own_get_these():
    fresh = Freshness(_halving([]))
    wrong = []

    def work(expert):
        for _ in range(300):
            if not torch.equal(fresh.tensors(["w0"], {"full.0": expert})[0][0], expert.half()):
                wrong.append(expert)

    threads = [threading.Thread(target=work, args=(torch.full((8, 8), float(i)),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("mode", ["check", "repack", "trust"])
def test_other_modes_do_not_look(mode):
    tensors = [torch.randn(8, 8)]
    fresh = Freshness(program(*tensors), mode)
    tensors[0].data.mul_(2)
    assert fresh.tensors(["w0"], live(tensors))[1] == 0


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("turn", ["plain", "transposed", "part", "column", "scalar"])
def test_a_sample_sees_writes_to_all_of_a_tensor(dtype, turn):
    base = (torch.arange(1, 4097) % 7).reshape(64, 64).to(dtype)
    tensor = {
        "plain": base,
        "transposed": base.t(),
        "part": base[8:40, 8:40],
        "column": base[:, 3],
        "scalar": base[1, 2],
    }[turn]
    sample = Sample(tensor)
    assert not sample.changed()
    if turn != "column":  # values far from each other are not copied together
        tensor.data.copy_((tensor.float() + 1).to(dtype))
        assert sample.changed()


def test_a_sample_of_nan_is_not_a_change_and_empty_or_meta_tensors_have_none():
    assert not Sample(torch.full((4, 4), float("nan"))).changed()
    for tensor in (torch.empty(0, 3), torch.empty(3, 3, device="meta"), torch.eye(3).to_sparse()):
        assert not Sample(tensor).changed()
