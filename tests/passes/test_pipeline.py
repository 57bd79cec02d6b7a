"""The pipeline: order, conflicts, claims, proof with rollback, fuel, bisection, required coverage."""

from dataclasses import dataclass

import captures
import pytest
import torch
import zoo

import thresher
from thresher import backend
from thresher.errors import ArgumentError, ContractError, CoverageError
from thresher.passes import base
from thresher.passes.pipeline import bisect
from thresher.recipe import CONFIGS, PassConfig, Recipe

aten = torch.ops.aten


@dataclass(frozen=True)
class ScaleConfig(PassConfig):
    """Multiplies every MLP's output by `factor`, one for a rewrite that changes nothing."""

    name = "scale"
    factor: float = 1.0
    wrong_at: str = ""


class Scale(base.Pass[ScaleConfig]):
    name = "scale"

    def match(self, program, context):
        sites = [
            base.Match(m.fqn, m, claims=(m.down.weight_fqn,))
            if m.width > 8
            else base.Miss(m.fqn, "Too narrow.")
            for m in context.structure().mlps
        ]
        return [*sites, base.Miss("model.norm", "A norm has no linear.")]

    def rewrite(self, program, match, context):
        out = match.data.output
        wrong = match.site == context.config.wrong_at
        with program.graph.inserting_after(out):
            scaled = program.graph.call_function(
                aten.mul.Tensor, (out, 2.0 if wrong else context.config.factor)
            )
        scaled.meta = dict(out.meta)
        out.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


@dataclass(frozen=True)
class AgainConfig(PassConfig):
    name = "again"


class Again(Scale):
    name, config_type, after = "again", AgainConfig, ("scale",)

    def rewrite(self, program, match, context):
        pass


@pytest.fixture(autouse=True)
def passes():
    added = (Scale, Again)
    for one in added:
        base.register_pass(one)
    yield
    for one in added:
        base.PASSES.pop(one.name)
        CONFIGS.pop(one.name)


def run(recipe, name="llama"):
    _, inputs = zoo.ZOO[name].build()
    program = captures.of_zoo(name)
    return program, *backend.run_pipeline(program, recipe, captures.arguments(program, inputs))


def test_every_candidate_ends_rewritten_or_missed_with_a_sentence():
    before, after, report = run(Recipe.of(scale=True))
    account = report["scale"]
    assert len(account.rewritten) == 2 and [m.site for m in account.missed] == ["model.norm"]
    assert account.error == account.own > 0 and account.coverage == pytest.approx(2 / 3)
    assert len(after.nodes(aten.mul.Tensor)) == len(before.nodes(aten.mul.Tensor)) + 2
    assert "A norm has no linear." in str(report)


def test_a_pass_that_breaks_its_budget_is_rolled_back_and_bisected():
    site = "model.layers.1.mlp"
    recipe = Recipe.of(scale={"wrong_at": site})
    before, after, report = run(recipe)
    assert not report["scale"].rewritten and "budget" in report["scale"].rolled_back
    assert after.text() == before.text()
    _, inputs = zoo.ZOO["llama"].build()
    inputs = captures.arguments(before, inputs)
    judge = backend.judge_of(before, recipe, inputs)
    assert bisect(before, recipe, inputs=inputs, judge=judge) == site
    assert bisect(before, Recipe.of(scale=True), inputs=inputs, judge=judge) is None


def test_a_result_that_is_not_a_number_is_rolled_back():
    assert run(Recipe.of(scale={"factor": float("nan")}))[2]["scale"].rolled_back


def test_without_verification_the_report_says_so():
    report = run(Recipe.of(scale={"factor": 3.0}, verify=False))[2]
    assert report["scale"].rewritten and "verify=False" in report["scale"].unverified


def test_a_linear_is_claimed_once():
    report = run(Recipe.of(scale=True, again=True))[2]
    assert not report["again"].rewritten
    reasons = {m.reason for m in report["again"].missed if m.site != "model.norm"}
    assert all("already rewritten by scale" in r for r in reasons) and len(reasons) == 2


def test_a_pass_may_build_on_another_that_it_names(monkeypatch):
    monkeypatch.setattr(Again, "extends", frozenset({"scale"}))
    assert len(run(Recipe.of(scale=True, again=True))[2]["again"].rewritten) == 2


def test_passes_run_in_their_declared_order_and_conflicts_are_named(monkeypatch):
    assert [p.name for p in run(Recipe.of(again=True, scale=True))[2].passes] == ["scale", "again"]
    monkeypatch.setattr(Again, "conflicts", {"scale": "They both scale."})
    with pytest.raises(ArgumentError, match=r"again with scale.*They both scale"):
        run(Recipe.of(again=True, scale=True))


@pytest.mark.parametrize("fuel", [0, 1, 2])
def test_fuel_stops_after_that_many_rewrites(fuel):
    account = run(Recipe.of(scale=True, fuel=fuel))[2]["scale"]
    assert len(account.rewritten) == fuel
    assert sum("fuel" in m.reason for m in account.missed) == 2 - fuel


def test_required_coverage():
    run(Recipe.of(scale=True, require={"scale": 0.6}))
    with pytest.raises(CoverageError, match=r"2 of 3.*A norm has no linear"):
        run(Recipe.of(scale=True, require={"scale": 0.9}))
    with pytest.raises(CoverageError, match="does not run again"):
        run(Recipe.of(scale=True, require={"again": 0.1}))


def test_a_pass_name_is_taken_once():
    other = type("Other", (Scale,), {"__module__": "elsewhere"})
    with pytest.raises(ArgumentError, match="not yet taken"):
        base.register_pass(other)


def test_compile_raises_where_coverage_is_missing():
    model, inputs = zoo.ZOO["llama"].build()
    with pytest.raises(CoverageError):
        thresher.compile(model, inputs, scale=True, require={"scale": 1.0}, target="reference")


class TestNotes:
    """What a pass says about edits goes with the edits; what it says when it matched is shown in any case."""

    @pytest.fixture(autouse=True)
    def speaking(self, monkeypatch):
        silent = Scale.match, Scale.rewrite

        def match(self, program, context):
            context.notes.append("looked")
            return silent[0](self, program, context)

        def rewrite(self, program, match, context):
            context.notes.append(f"scaled {match.site}")
            silent[1](self, program, match, context)

        monkeypatch.setattr(Scale, "match", match)
        monkeypatch.setattr(Scale, "rewrite", rewrite)
        monkeypatch.setattr(Scale, "about", lambda self, done, context: [f"{len(done)} MLPs are scaled."])

    def test_of_a_pass_that_is_kept(self):
        notes = run(Recipe.of(scale=True))[2]["scale"].notes
        assert notes == [
            "looked",
            "scaled model.layers.0.mlp",
            "scaled model.layers.1.mlp",
            "2 MLPs are scaled.",
        ]

    def test_of_a_site_that_the_fuel_does_not_reach(self):
        notes = run(Recipe.of(scale=True, fuel=1))[2]["scale"].notes
        assert notes == ["looked", "scaled model.layers.0.mlp", "1 MLPs are scaled."]

    @pytest.mark.parametrize("options", [{"scale": {"factor": 2.0}}, {"scale": True, "fuel": 0}])
    def test_of_a_pass_that_is_rolled_back_or_rewrites_nothing(self, options):
        account = run(Recipe.of(options))[2]["scale"]
        assert not account.rewritten and account.notes == ["looked"]


class TestPreparation:
    """An exact edit before all passes; it stays, and its note with it, also where its pass declines."""

    @pytest.fixture(autouse=True)
    def preparing(self, monkeypatch):
        def prepare(self, program, context):
            out = context.structure().mlps[0].output
            with program.graph.inserting_after(out):
                made = program.graph.call_function(aten.mul.Tensor, (out, self.amount))
            made.meta = dict(out.meta)
            out.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
            context.notes.append("scaled once more")
            return 1

        monkeypatch.setattr(Scale, "prepare", prepare)
        monkeypatch.setattr(Scale, "amount", 1.0, raising=False)

    def test_it_stays_where_nothing_is_rewritten(self):
        before, after, report = run(Recipe.of(scale=True, fuel=0))
        assert len(after.nodes(aten.mul.Tensor)) == len(before.nodes(aten.mul.Tensor)) + 1
        assert "scaled once more" in report.notes and not report["scale"].notes

    def test_what_is_not_exact_is_taken_back_with_its_note(self, monkeypatch):
        monkeypatch.setattr(Scale, "amount", 2.0)
        before, after, report = run(Recipe.of(scale=True, fuel=0))
        assert after.text() == before.text() and "scaled once more" not in report.notes
        assert any("What scale prepares" in note and "taken back" in note for note in report.notes)


def test_a_match_that_edits_is_an_error_that_names_the_pass(monkeypatch):
    def match(self, program, context):
        program.nodes(aten.linear.default)[0].replace_all_uses_with(program.nodes(aten.linear.default)[1])
        return []

    monkeypatch.setattr(Scale, "match", match)
    with pytest.raises(
        ContractError, match=r"`match` of the pass 'scale' edited the program: it changed the node"
    ):
        run(Recipe.of(scale=True))
