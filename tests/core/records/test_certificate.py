"""A certificate says what was done on what, survives JSON, and is refused for anything else."""

import dataclasses
import json
from dataclasses import dataclass

import leniently
import pytest
import torch
import zoo

import thresher
from thresher import ops
from thresher.errors import ArgumentError, ThresherError
from thresher.graph.edit import replace
from thresher.kernels import catalog
from thresher.passes import base
from thresher.recipe import CONFIGS, PassConfig, Recipe
from thresher.records.certificate import FORMAT, Certificate
from thresher.report import PassReport

aten = torch.ops.aten


@dataclass(frozen=True)
class DoubleConfig(PassConfig):
    name = "double"
    bad: str = ""
    budget: float = 1e-3


class Double(base.Pass[DoubleConfig]):
    """Adds almost nothing to every MLP's hidden value, and a lot at the site named `bad`."""

    name = "double"

    def budget(self, context):
        return context.config.budget

    def match(self, program, context):
        return [base.Match(m.fqn, m) for m in context.structure().mlps]

    def rewrite(self, program, match, context):
        hidden = match.data.hidden
        factor = 2.0 if match.site == context.config.bad else 1.0 + 1e-6
        replace(hidden, program.insert(hidden.next, aten.mul.Tensor, hidden, factor))
        context.predicted[match.site] = 1.5


@pytest.fixture(autouse=True)
def double():
    base.register_pass(Double)
    yield
    del base.PASSES["double"], CONFIGS["double"]


def compiled(**options):
    model, inputs = zoo.ZOO["bert"].build()
    return leniently.compile(model, inputs, **options)


def test_it_holds_everything_and_survives_json():
    made = compiled(prepack=True, double=True)
    certificate = made.certificate
    assert certificate.holds and 0 < certificate.error <= certificate.budget
    assert certificate.budget == pytest.approx(sum(p.budget for p in certificate.passes))
    assert certificate.recipe_fingerprint == made.recipe.fingerprint()
    assert Recipe.of(certificate.recipe) == made.recipe
    assert certificate.versions["torch"] and certificate.machine["cpu"] and certificate.target == "reference"
    (operator,) = certificate.ops
    assert (operator.name, operator.calls) == ("varlen_attention", 2)
    assert operator.checked > 0 and operator.error <= operator.tolerance["float32"]
    assert certificate.passes[1].predicted and set(certificate.passes[1].predicted.values()) == {1.5}
    again = Certificate.from_json(certificate.to_json())
    assert again == certificate
    json.loads(certificate.to_json(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    certificate.check(program=made.sessions[0].program, recipe=made.recipe)
    text = str(certificate)
    assert "within budget" in text and "varlen_attention" in text


def test_it_follows_the_weights_and_is_refused_for_another_recipe():
    first, again = compiled(prepack=True).certificate, compiled(prepack=True).certificate
    assert first.weights == again.weights and first.program == again.program
    model, inputs = zoo.ZOO["bert"].build()
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.add_(1)
    other = thresher.compile(model, inputs, target="reference", prepack=True).certificate
    assert other.weights != first.weights
    with pytest.raises(ThresherError, match="certificate is for recipe"):
        first.check(recipe=Recipe.of("none"))


def test_a_broken_budget_rolls_back_and_names_the_site():
    model, inputs = zoo.ZOO["bert"].build()
    site = thresher.explain(model, inputs, double=True).report["double"].rewritten[1]
    made = compiled(double={"bad": site})
    account = made.report["double"]
    assert account.rewritten == [] and account.guilty == site and site in account.rolled_back
    assert not account.predicted
    torch.testing.assert_close(made(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    assert made.certificate.error == 0.0 and site in str(made.certificate) + str(made.report)


def test_an_operator_that_is_wrong_on_the_example_is_told_apart_from_its_pass(monkeypatch):
    catalog.load()
    op = ops.get("varlen_attention")
    wrong = ops.Provider("wrong", "cpu", lambda *a: op.reference(*a) * 1.01)
    monkeypatch.setattr(op, "providers", [wrong])
    report = compiled(prepack=True).report
    assert report["prepack"].rolled_back
    check = report.operators["varlen_attention"]
    assert check.provider == "wrong" and check.error == pytest.approx(0.01, rel=1e-3)


def test_results_of_integers_count_what_differs():
    from thresher.op_checks import difference

    a, b = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 4, 3])
    assert difference(a, b) == 0.5 and difference((a, torch.ones(2)), (a, torch.ones(2))) == 0
    assert difference(torch.tensor([float("nan")]), torch.ones(1)) != 0
    eight = torch.ones(4).to(torch.float8_e4m3fn)
    assert difference(eight, eight) == 0


def test_an_unverified_recipe_does_not_hold():
    certificate = compiled(double=True, verify=False).certificate
    assert not certificate.holds and certificate.error is None and "verify=False" in certificate.unverified


@pytest.mark.parametrize("text", ["no json", "[]", "{}", json.dumps({"format": "other"}), b"\xff"])
def test_anything_else_is_refused(text):
    with pytest.raises(ArgumentError, match="certificate"):
        Certificate.from_json(text)


def test_unknown_fields_are_refused():
    given = {**dataclasses.asdict(compiled(double=True).certificate), "extra": 1}
    assert given["format"] == FORMAT
    with pytest.raises(ArgumentError, match="extra"):
        Certificate.from_dict(given)


WRONG = [
    ("error", "small"), ("budget", [1]), ("notes", [3]), ("versions", {"torch": 2}), ("passes", 5),
    ("passes", [{"name": 7}]), ("passes", [{"name": "a", "missed": [{"site": 1, "reason": "b"}]}]),
    ("passes", [{"name": "a", "predicted": {"s": "t"}}]),
    ("ops", [{"name": "a", "calls": "many", "provider": "b", "tolerance": {}}]), ("ops", [["a"]]), ("target", None),
    ("ops", [{"name": "a", "calls": 1, "provider": "b", "tolerance": {"float32": "none"}}]), ("recipe", "exact"),
]  # fmt: skip


@pytest.mark.parametrize("field, value", WRONG, ids=[f"{f}-{i}" for i, (f, _) in enumerate(WRONG)])
def test_a_field_of_another_type_is_refused(field, value):
    given = Certificate({}, "r", "w", "p", "reference").to_dict()
    assert Certificate.from_dict(given)
    with pytest.raises(ArgumentError, match="certificate"):
        Certificate.from_dict({**given, field: value})


def test_an_infinite_budget_survives_json():
    made = Certificate({}, "r", "w", "p", "reference", error=0.5, budget=float("inf"),
                       passes=(PassReport("zipvl", ["a"], budget=float("inf")),))  # fmt: skip
    again = Certificate.from_json(made.to_json())
    assert again == made and again.holds
