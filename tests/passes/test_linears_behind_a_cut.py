"""A linear that runs at two places, as ZipVL's query projections do, is one site, and its packed weights are held once."""

from collections import Counter

import pytest
import zoo

import thresher

CUT = {"keep": 0.5, "recent": 2, "spread": 2, "sinks": 1, "bucket": 1, "min_saving": 0.0, "budget": 2.0}
PLAIN = {"bits": 8, "rotate_heads": False, "budget": 2.0}


@pytest.mark.parametrize("method", ["nvfp4", "rsq"])
def test_each_linear_is_named_and_held_once(tmp_path, method):
    model, inputs = zoo.ZOO["llama"].build()
    recipe = {"zipvl": CUT, "nvfp4": {"min_weights": 0, "budget": 2.0}}
    if method == "rsq":
        path = tmp_path / "codes.safetensors"
        thresher.quantize(model, [dict(inputs)], {"rsq": PLAIN}).save(path)
        recipe = {"zipvl": CUT, "rsq": PLAIN, "stats": str(path)}
    compiled = thresher.compile(model, inputs, recipe, target="reference")
    account = compiled.report[method]
    assert account.rewritten and account.rolled_back is None
    twice = [s for s in account.rewritten if s.endswith("q_proj")]
    assert len(twice) == model.config.num_hidden_layers
    assert set(Counter(account.rewritten + [m.site for m in account.missed]).values()) == {1}
    (session,) = compiled.sessions
    held = Counter(w.fqn for w in session.program.weights.values())
    codes = [n for n in held if n.endswith("codes")]
    assert len(codes) == len(account.rewritten) and all(held[n] == 1 for n in codes)
    products = [
        n for n in session.program.graph.nodes if "nvfp4_linear" in str(n.target) or "wna16" in str(n.target)
    ]
    assert len(products) > len(codes)  # what the test is about is there


def test_rotated_heads_hide_layers_and_the_report_says_what_to_do(tmp_path):
    model, inputs = zoo.ZOO["llama"].build()
    path, rotated = tmp_path / "codes.safetensors", {"bits": 8, "budget": 2.0}
    thresher.quantize(model, [dict(inputs)], {"rsq": rotated}).save(path)
    report = thresher.explain(model, inputs, {"zipvl": CUT, "rsq": rotated, "stats": str(path)}).report
    assert not report["zipvl"].rewritten and "No layers" in report["zipvl"].missed[0].reason
    assert any("rotate_heads=False" in note for note in report.notes)


def test_a_linear_that_is_left_alone_at_two_places_is_named_once():
    model, inputs = zoo.ZOO["llama"].build()
    account = thresher.explain(model, inputs, {"zipvl": CUT, "rsq": True}).report["rsq"]
    assert account.missed and set(Counter(m.site for m in account.missed).values()) == {1}
