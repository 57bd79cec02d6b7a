"""The ways in: torch.compile by name, thresher.compile, the decorator, explain; and what they refuse."""

import subprocess
import sys
import warnings

import masks
import pytest
import torch
import zoo

import thresher
from thresher.compat import is_fake
from thresher.errors import ArgumentError, CoverageError, ThresherError
from thresher.notices import ThresherWarning


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name="llama"):
    model, inputs = zoo.ZOO[name].build()
    model.config.use_cache = False
    return model, inputs


def first(result):
    return result.logits if "logits" in result else result[0]


def test_the_backend_is_found_by_name_without_an_import():
    code = (
        "import torch, sys\n"
        "assert 'thresher' in torch._dynamo.list_backends()\n"
        "f = torch.compile(lambda x: torch.relu(x @ x), backend='thresher', options={'target': 'reference',"
        " 'recipe': 'none'})\n"
        "x = torch.randn(4, 4)\n"
        "with torch.no_grad(): assert torch.allclose(f(x), torch.relu(x @ x))\n"
        "assert 'thresher.backend' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_torch_compile_through_inductor():
    model, inputs = build()
    fast = torch.compile(model, backend="thresher")
    with torch.no_grad():
        expected, actual = first(model(**inputs)), first(fast(**inputs))
    masks.assert_equal_at_real_tokens(actual, expected, inputs["attention_mask"])
    session = thresher.reports()[-1]
    assert session.rewritten == 1 and session.target == "inductor"


def test_compile_verifies_and_reports():
    model, inputs = build()
    fast = thresher.compile(model, inputs, target="reference")
    with torch.no_grad():
        masks.assert_equal_at_real_tokens(
            first(fast(**inputs)), first(model(**inputs)), inputs["attention_mask"]
        )
    account = fast.report["prepack"]
    assert account.rewritten and account.error is not None and account.error < account.budget
    assert fast.counters[0].packed == fast.counters[0].calls == 2
    assert fast.config is model.config


def test_decorated_functions_and_classes():
    @thresher.optimize("none")
    def double(x):
        return x * 2

    x = torch.randn(3, 4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(double(x), x * 2)
    assert double.__name__ == "double"

    @thresher.optimize("none")
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x).relu()

    net = Net().eval()
    assert isinstance(net, Net) and set(net.state_dict()) == {"linear.weight", "linear.bias"}
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.linear(x).relu())
    with pytest.raises(ArgumentError, match=r"a function or a subclass of torch.nn.Module"):
        thresher.optimize("none")(3)


def test_explain_is_a_dry_run_that_leaves_nothing_compiled():
    model, inputs = build()
    found = thresher.explain(model, inputs)
    assert found.report["prepack"].rewritten
    assert "varlen_attention" in found.after[0].text() and "varlen" not in found.before[0].text()
    assert "prepack" in str(found)


def test_explain_needs_no_weights():
    model, inputs = zoo.ZOO["llama"].build()
    expected = thresher.explain(model, inputs)
    found = thresher.explain(model.to("meta"), inputs)
    assert found.report["prepack"].rewritten == expected.report["prepack"].rewritten
    assert "dry run" in found.report["prepack"].unverified
    assert any(is_fake(w.tensor) for w in found.after[0].weights.values())


def test_a_recipe_is_not_compiled_twice():
    model, inputs = build()
    seen = []
    options = {"target": "reference", "prepack": {"min_share": 0.25}}
    fast = torch.compile(model, backend="thresher", options=options)
    with torch.no_grad():
        for _ in range(3):
            fast(**inputs)
            seen.append(len(thresher.reports()))
    assert seen[0] == seen[1] == seen[2]


class TestRefusals:
    def test_training_mode(self):
        model, inputs = build()
        with pytest.raises(ArgumentError, match=r"Call model.eval"):
            thresher.compile(model.train(), inputs)

    def test_gradients_run_as_plain_inductor_and_it_is_said(self):
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        fast = torch.compile(net, backend="thresher")
        x = torch.randn(2, 4)
        with pytest.warns(ThresherWarning, match="Gradients are being recorded"):
            torch.testing.assert_close(fast(x), net(x))

    def test_unknown_option(self):
        model, inputs = build()
        with pytest.raises(ArgumentError, match="Did you mean 'prepack'"):
            thresher.compile(model, inputs, prepak=True)
        with pytest.raises(Exception, match="Did you mean 'prepack'"), torch.no_grad():
            torch.compile(model, backend="thresher", options={"prepak": True})(**inputs)

    def test_unknown_target(self):
        model, inputs = build()
        with pytest.raises(ArgumentError, match="inductor, reference"):
            thresher.compile(model, inputs, target="inductr")

    def test_what_is_not_a_model_or_not_inputs(self):
        model, inputs = build()
        with pytest.raises(ArgumentError, match=r"torch.nn.Module"):
            thresher.compile(lambda x: x, inputs)
        with pytest.raises(ArgumentError, match="example_inputs"):
            thresher.compile(model, inputs["input_ids"])

    def test_nothing_to_rewrite_runs_and_says_so(self):
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
        fast = torch.compile(net, backend="thresher", options={"target": "reference"})
        x = torch.randn(2, 4)
        with torch.no_grad(), pytest.warns(ThresherWarning, match=r"rewrote nothing.*attention_mask"):
            torch.testing.assert_close(fast(x), net(x))
        with pytest.raises(CoverageError), torch.no_grad():
            thresher.compile(net, (x,), prepack=True, require={"prepack": 1.0}, target="reference")

    def test_a_mask_of_the_wrong_shape(self):
        model, inputs = build("bert")
        fast = thresher.compile(model, inputs, target="reference")
        for shape in ((3, 5), (2, 12), (3, 12, 1)):
            with pytest.raises((ThresherError, RuntimeError, ValueError, IndexError)), torch.no_grad():
                fast(**{**inputs, "attention_mask": torch.ones(shape, dtype=torch.int64)})

    def test_a_missing_package_names_its_extra(self, monkeypatch):
        from thresher.tools import models

        monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"thresher\[demo\]"):
            models.minilm()


class TestFreshWeights:
    """A compiled model computes with the weights the model has now."""

    def agree(self, model, inputs, fast):
        with torch.no_grad():
            masks.assert_equal_at_real_tokens(
                first(fast(**inputs)), first(model(**inputs)), inputs["attention_mask"]
            )

    def test_edited_in_place_then_replaced_by_load_state_dict(self):
        model, inputs = build()
        fast = thresher.compile(model, inputs, target="reference")
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(-1.5)
        self.agree(model, inputs, fast)
        state = {k: v * 0.9 if v.is_floating_point() else v for k, v in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        self.agree(model, inputs, fast)


def test_reports_as_table_json_and_trace(monkeypatch):
    import json

    from thresher import report as module

    sent = []
    monkeypatch.setattr(module, "trace_structured_json", lambda name, payload: sent.append((name, payload)))
    model, inputs = build()
    report = thresher.compile(model, inputs, target="reference").report
    assert sent and sent[0][0] == "thresher_report"
    assert json.loads(sent[0][1])["passes"][0]["name"] == "prepack"
    assert "prepack" in str(report) and "rewrote 1 of 1" in report.summary()
    with pytest.raises(KeyError):
        report["nothing"]
