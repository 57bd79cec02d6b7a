"""Times of linears are measured once a machine, for what a recipe chooses between, and decide what it leaves."""

import dataclasses
import json

import pytest
import torch
import zoo
from sampled import sampled

import thresher
from thresher.files import cache_folder
from thresher.kernels import catalog
from thresher.machine import devices, linear_rates
from thresher.machine.devices import Surface, guessed_cpu
from thresher.recipe import PRESETS, Recipe
from thresher.tools import auto

catalog.load()
ROWS, SIZES = linear_rates.ROWS, tuple(float(s * s) for s in linear_rates.SIDES)


def flat(seconds):
    return Surface(ROWS, SIZES, tuple((seconds,) * len(SIZES) for _ in ROWS))


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The classes that are timed, with an empty cache and times that are given."""
    monkeypatch.setenv("THRESHER_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(linear_rates, "enabled", True)
    monkeypatch.setattr(linear_rates, "_KNOWN", {})
    asked, seconds = [], {}

    def measure(name):
        asked.append(name)
        return flat(seconds.get(name, 1e-3)) if linear_rates._maker(name) is not None else None

    monkeypatch.setattr(linear_rates, "_measured", measure)
    return asked, seconds


def test_a_grid_is_measured_kept_and_read_again(monkeypatch, tmp_path):
    monkeypatch.setenv("THRESHER_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(linear_rates, "_KNOWN", {})
    monkeypatch.setattr(linear_rates, "SIDES", (16, 32))
    monkeypatch.setattr(linear_rates, "ROWS", (1, 4))
    state = torch.get_rng_state()
    made = {
        n: linear_rates.times(n) for n in ("linear.float32", "linear.bfloat16", "nvfp4_linear.int8.bfloat16")
    }
    assert torch.equal(state, torch.get_rng_state())
    assert all(s.sizes == (256.0, 1024.0) and min(map(min, s.seconds)) > 0 for s in made.values())
    monkeypatch.setattr(linear_rates, "_KNOWN", {})
    monkeypatch.setattr(linear_rates, "_measured", lambda name: pytest.fail(f"{name} was measured again"))
    assert {n: linear_rates.times(n) for n in made} == made


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"KEY": 3}', '{"KEY": {"rows": [1], "sizes": [2], "seconds": [[-1]]}}']
)
def test_a_damaged_file_is_measured_anew(measured, damage):
    asked, _ = measured
    linear_rates.times("linear.float32")
    (path,) = cache_folder().glob(linear_rates._FILE)
    (key,) = json.loads(path.read_text())
    path.write_text(damage.replace("KEY", key.replace('"', '\\"')))
    linear_rates._KNOWN.clear()
    assert linear_rates.times("linear.float32") == flat(1e-3) and asked == ["linear.float32"] * 2


def test_only_what_is_chosen_between_is_measured(measured):
    asked, _ = measured
    found = linear_rates.with_linears(
        guessed_cpu(), ["nvfp4_linear.int8", "linear.bfloat16"], ["float32", "int64"]
    )
    assert asked == ["linear.float32", "nvfp4_linear.int8.float32", "linear.bfloat16"]
    assert set(found.surfaces) == set(asked) and "measured here" in found.source
    assert linear_rates.with_linears(found, ["linear.bfloat16"], ["float32"]) == found
    calibrated = dataclasses.replace(
        guessed_cpu(), surfaces={n: flat(1.0) for n in ("linear.float32", "nvfp4_linear.int8")}
    )
    assert linear_rates.with_linears(calibrated, ["nvfp4_linear.int8"], ["float32"]) is calibrated
    assert linear_rates.with_linears(devices.DEVICES["H100"], ["linear.bfloat16"], ["float32"]).surfaces == {}


@pytest.mark.parametrize(
    "preset, faster",
    sampled([("embed", True), ("edge-cpu", False)], ["embed", "serve-latency", "edge-cpu"], [True, False]),
)
def test_a_form_is_taken_where_it_was_measured_to_be_faster(measured, preset, faster):
    """Both ways: the times are what decides, and where a form loses the Miss says the numbers."""
    _, seconds = measured
    rivals = [n for n in ("nvfp4_linear.int16.float32", "nvfp4_linear.int8.float32", "linear.bfloat16")]
    seconds.update(dict.fromkeys(rivals, 5e-4 if faster else 2e-3))
    model, inputs = zoo.ZOO["bert"].build()
    options = {n: {"min_weights": 0} for n in ("nvfp4", "bf16") if n in PRESETS[preset]}
    options["bf16"]["emulate"] = True
    if "nvfp4" in options:
        options["nvfp4"] |= {**PRESETS[preset]["nvfp4"], "budget": 99.0}
    report = thresher.compile(model, inputs, Recipe.of(preset, **options), target="reference").report
    forms = [p for p in report.passes if p.name in options]
    if faster:
        assert any(p.rewritten for p in forms) and all(p.error is not None for p in forms if p.rewritten)
    else:
        assert not any(p.rewritten for p in forms)
        assert all(
            "microseconds on CPU" in m.reason for p in forms for m in p.missed if "no linear" not in m.reason
        )


def test_the_search_for_a_recipe_tries_bf16():
    recipe = auto.candidates()["exact + bf16"]
    assert {c.name for c in recipe.passes} == {
        "prepack",
        "decode_attention",
        "bf16",
    } and recipe.min_gain == 1.0


def test_fewer_bits_must_beat_the_best_dense_form_that_the_recipe_has(measured):
    """4.5 bits faster than fp32 and slower than bf16: the pass behind takes these linears."""
    _, seconds = measured
    seconds.update({"nvfp4_linear.int8.float32": 8e-4, "linear.bfloat16": 4e-4})
    model, inputs = zoo.ZOO["bert"].build()
    nvfp4 = {"activations": "int8", "min_weights": 0, "budget": 99.0}
    bf16 = {"min_weights": 0, "emulate": True}
    both = thresher.compile(
        model, inputs, Recipe.of(nvfp4=nvfp4, bf16=bf16, min_gain=0.97), target="reference"
    ).report
    assert not both["nvfp4"].rewritten and both["bf16"].rewritten
    alone = thresher.compile(model, inputs, Recipe.of(nvfp4=nvfp4, min_gain=0.97), target="reference").report
    assert alone["nvfp4"].rewritten
