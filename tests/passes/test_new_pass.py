"""Adding a pass to the package is its module and one line of the catalog; outside the package, its module alone."""

import sys
from pathlib import Path

import pytest
import zoo

import thresher
import thresher.passes
from thresher.passes import base, catalog
from thresher.passes.order import all_passes
from thresher.recipe import CONFIGS

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "third_party_pass" / "thresher_cheap_gelu.py"


@pytest.fixture
def forget():
    """Take the pass out again, so that other tests see the passes of the package only."""
    yield
    base.PASSES.pop("cheap_gelu", None)
    CONFIGS.pop("cheap_gelu", None)
    for name in [n for n in sys.modules if n.endswith("cheap_gelu")]:
        del sys.modules[name]


def test_a_pass_is_a_module_and_a_line(tmp_path, monkeypatch, forget):
    (tmp_path / "cheap_gelu.py").write_text(EXAMPLE.read_text())
    monkeypatch.setattr(thresher.passes, "__path__", [*thresher.passes.__path__, str(tmp_path)])
    at = catalog.PASS_MODULES.index("deft")
    ours = (*catalog.PASS_MODULES[:at], "cheap_gelu", *catalog.PASS_MODULES[at:])
    monkeypatch.setattr(catalog, "PASS_MODULES", ours)
    monkeypatch.setattr("thresher.passes.order.PASS_MODULES", ours)
    catalog.load()
    names = all_passes()
    assert names.index("zipvl") < names.index("cheap_gelu") < names.index("deft")

    model, inputs = zoo.ZOO["bert"].build()
    fast = thresher.compile(
        model, inputs, {"prepack": True, "cheap_gelu": {"budget": 0.05}}, target="reference"
    )
    assert [p.name for p in fast.report.passes] == ["prepack", "cheap_gelu"]
    assert len(fast.report["cheap_gelu"].rewritten) == model.config.num_hidden_layers
    assert "cheap_gelu" in thresher.Recipe.of(cheap_gelu=True).to_dict()
