"""The cost model: known sizes give known work, devices keep their order, losing sites are left alone and say so."""

import dataclasses
import json
import math

import captures
import pytest
import torch
import zoo

import thresher
from thresher import backend
from thresher.errors import ArgumentError
from thresher.graph import capture
from thresher.machine import device_rates, devices
from thresher.machine.devices import DEVICES, Device, Surface
from thresher.passes.cost.model import CostModel, Work
from thresher.recipe import Recipe

aten = torch.ops.aten
H100 = DEVICES["H100"]


def test_a_surface_meets_its_points_interpolates_and_goes_on_in_proportion():
    s = Surface((1, 16), (100, 10000), ((1.0, 4.0), (2.0, 8.0)))
    assert s.at(1, 100) == pytest.approx(1.0) and s.at(16, 10000) == pytest.approx(8.0)
    assert s.at(4, 1000) == pytest.approx(math.sqrt(math.sqrt(1 * 4) * math.sqrt(2 * 8)))
    assert s.at(32, 20000) == pytest.approx(8.0 * 2 * 2)
    assert s.inside(1, 10**9) == pytest.approx(4.0)
    assert s.at(0.5, 1) == pytest.approx(1.0)  # nothing is cheaper than the smallest measured call


def test_a_roof_is_the_longer_of_arithmetic_and_traffic():
    model = CostModel(H100)
    assert model.work(Work(flops=H100.flops["float32"])) == pytest.approx(1.0)
    assert model.work(Work(flops=1.0, bytes=H100.bandwidth)) == pytest.approx(1.0)
    assert model.work(Work(launches=3)) == pytest.approx(3 * H100.launch)
    few, many = model.linear(1, 4096**2, "bfloat16"), model.linear(8192, 4096**2, "bfloat16")
    assert few == pytest.approx(2 * (4096**2 + 2 * 4096) / H100.bandwidth + H100.launch)
    assert many == pytest.approx(2 * 8192 * 4096**2 / H100.flops["bfloat16"] + H100.launch)


def test_low_bits_win_where_weights_are_what_is_waited_for():
    for device in DEVICES.values():
        model = CostModel(device)
        plain, four = (
            model.linear(1, 4096**2, "bfloat16", k, b) for k, b in (("linear", 0), ("wna16_linear.4", 4.5))
        )
        assert 1.5 < plain / four < 16 / 4.5  # a launch, most of it on the fastest, is not saved
        plain, four = (model.linear(8192, 4096**2, "bfloat16", k, b) for k, b in (("linear", 0), ("w", 4.5)))
        assert plain / four < 1.2
    on = {n: CostModel(d).linear(8192, 4096**2, "nvfp4") for n, d in DEVICES.items()}
    assert on["B200"] < on["H200"] < on["A100"] and on["RTX 5090"] < on["RTX 4090"]


def test_a_program_costs_its_linears():
    program = captures.of_zoo("llama")
    priced = CostModel(H100)
    linears = sum(priced.node(n) for n in program.nodes(aten.linear.default))
    assert 0 < linears < priced.seconds(program)
    assert len(program.nodes(aten.linear.default)) * H100.launch < linears


def test_a_write_that_stays_where_it_lies_costs_what_is_written():
    def store(table, row, x):
        return torch.index_copy(table, 0, row, x)

    def write(table, row, x):
        table.index_copy_(0, row, x)
        return x + 1

    given = torch.zeros(64, 8), torch.tensor([3]), torch.ones(1, 8)
    priced, found = CostModel(H100), []
    for function in (store, write):
        torch._dynamo.reset()
        torch.compile(
            function, backend=lambda gm, x: found.append(capture.from_dynamo(gm, x)[0]) or gm.forward
        )(*given)
    copied, kept = (priced.learn(p) or priced.node(*p.nodes(aten.index_copy.default)) for p in found)
    assert copied == pytest.approx(64 * kept) and kept > 0


def test_the_whole_prediction_of_packing_follows_the_share_of_padding():
    _, inputs = zoo.ZOO["bert"].build()
    program = captures.of_zoo("bert", "export-dynamic")
    arguments = captures.arguments(program, inputs)
    real = inputs["attention_mask"].sum().item() / inputs["attention_mask"].numel()
    slow = dataclasses.replace(
        devices.guessed_cpu(), flops={"float32": 1e6}, bandwidth=1e15, launch=0, pointwise=1e15
    )
    from thresher.passes.pipeline import Pipeline

    cost = CostModel(slow, backend.real_lengths(program, arguments))
    recipe = Recipe.of(prepack=True)
    judge = backend.judge_of(program, recipe, arguments)
    _, report = Pipeline(recipe, inputs=arguments, judge=judge, cost=cost).run(program)
    assert report.predicted == pytest.approx(1 / real, rel=0.15)  # attention gains more than the linears
    assert list(report["prepack"].predicted.values()) == [pytest.approx(report.predicted, rel=1e-6)]


def test_a_site_that_is_expected_to_lose_is_left_with_the_numbers():
    model, inputs = zoo.ZOO["llama"].build()
    found = thresher.explain(model, inputs, nvfp4={"min_weights": 0}, min_gain=1e9).report["nvfp4"]
    assert not found.rewritten
    assert any("microseconds on CPU" in m.reason and "min_gain" in m.reason for m in found.missed)
    taken = thresher.explain(model, inputs, nvfp4={"min_weights": 0}).report["nvfp4"]
    assert taken.rewritten and set(taken.predicted) == set(taken.rewritten)


def test_fuel_is_not_spent_on_sites_that_are_left():
    model, inputs = zoo.ZOO["llama"].build()
    report = thresher.explain(model, inputs, nvfp4={"min_weights": 0}, min_gain=1e9, fuel=3).report
    assert report.rewritten == 0


def test_measured_rates_are_kept_for_this_machine_only(tmp_path, monkeypatch):
    monkeypatch.setenv("THRESHER_CACHE_DIR", str(tmp_path))
    assert "guess" in devices.get("cpu").source
    measured = device_rates.measure_cpu(quick=True)
    assert {"linear.float32", "attention.float32", "varlen_attention.float32"} <= set(measured.surfaces)
    path = devices.save_cpu(measured, tmp_path)
    assert devices.get("cpu") == measured and "measured" in measured.source
    assert Device.from_dict(json.loads(path.read_text())) == measured
    path.write_text(path.read_text()[:100])
    devices.this_cpu.cache_clear()
    assert "guess" in devices.get("cpu").source  # a torn file is no reason to fail
    monkeypatch.setattr(devices, "cpu_key", lambda: "another")
    assert "guess" in devices.get("cpu").source


def test_unknown_devices_and_files_are_refused():
    with pytest.raises(ArgumentError, match="Did you mean 'H200'"):
        devices.get("H20")
    assert devices.get("rtx4090") is DEVICES["RTX 4090"]
    with pytest.raises(ArgumentError, match="device"):
        Device.from_dict({"format": "other"})
    with pytest.raises(ArgumentError, match="min_gain"):
        Recipe.of(min_gain=-1)
