"""`thresher.testing.check_pass` finds what a pass must not do; the example package passes it."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from thresher import testing
from thresher.errors import ArgumentError
from thresher.passes import base
from thresher.recipe import CONFIGS, PassConfig

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "third_party_pass"
aten = torch.ops.aten


@dataclass(frozen=True)
class SoundConfig(PassConfig):
    name = "sound"


class Sound(base.Pass):
    """Multiplies every MLP's result by one."""

    name, order, config_type = "sound", 90, SoundConfig
    amount = 0.0

    def match(self, program, context):
        return [base.Match(m.fqn, m.output) for m in context.structure().mlps]

    def rewrite(self, program, match, context):
        out = match.data
        with program.graph.inserting_after(out):
            new = program.graph.call_function(aten.mul.Tensor, (out, 1.0 + self.amount))
        new.meta = dict(out.meta)
        out.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


class Edits(Sound):
    def match(self, program, context):
        found = super().match(program, context)
        self.rewrite(program, found[0], context)
        return found


class Grunts(Sound):
    def match(self, program, context):
        return [*super().match(program, context), base.Miss("norm", "no")]


class Twice(Sound):
    def match(self, program, context):
        found = super().match(program, context)
        return [*found, base.Miss(found[0].site, "It is wanted by nobody else.")]


class Exceeds(Sound):
    amount = 1.0


class Nothing(Sound):
    def match(self, program, context):
        return []


class Random(Sound):
    calls = 0

    def rewrite(self, program, match, context):
        type(self).calls += 1
        self.amount = 1e-9 * self.calls
        super().rewrite(program, match, context)


class Strange(Sound):
    def match(self, program, context):
        return [*super().match(program, context), "a site"]


@pytest.fixture
def registered():
    def use(kind):
        CONFIGS[kind.name] = kind.config_type
        base.PASSES[kind.name] = kind()
        return kind.name

    yield use
    for name in ("sound",):
        base.PASSES.pop(name, None), CONFIGS.pop(name, None)


def test_a_sound_pass_conforms(registered):
    testing.check_pass(registered(Sound))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Edits, "`match` edited the program"),
        (Grunts, "no full sentence: 'no'"),
        (Twice, "named twice"),
        (Exceeds, "breaks its declared budget"),
        (Nothing, "rewrote nothing"),
        (Random, "must be deterministic"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_is_wrong_is_named(registered, kind, said):
    with pytest.raises(AssertionError, match="does not conform") as raised:
        testing.check_pass(registered(kind))
    assert said in str(raised.value)


def test_an_option_without_default_is_named(registered):
    @dataclass(frozen=True)
    class Loose(PassConfig):
        name = "sound"
        amount: int

    kind = type("Loosely", (Sound,), {"config_type": Loose})
    with pytest.raises(AssertionError, match="needs a default for every option"):
        testing.check_pass(registered(kind))


def test_an_unknown_pass_is_refused():
    with pytest.raises(ArgumentError, match="Import the pass's module"):
        testing.check_pass("nobody")


@pytest.mark.parametrize(
    ("name", "options"),
    [("prepack", True), ("deft", {"min_bytes": 0}), ("nvfp4", {"min_weights": 0, "budget": 1.0, "keep": ()})],
)
def test_the_built_in_passes_conform(name, options):
    testing.check_pass(name, options=options)


def test_the_example_package(monkeypatch):
    """Its own test, without installing it."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    try:
        spec = importlib.util.spec_from_file_location("test_cheap_gelu", EXAMPLE / "test_cheap_gelu.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.test_conformance()
        lines = (EXAMPLE / "thresher_cheap_gelu.py").read_text().splitlines()
        assert len(lines) <= 60
    finally:
        (
            base.PASSES.pop("cheap_gelu", None),
            CONFIGS.pop("cheap_gelu", None),
            sys.modules.pop("thresher_cheap_gelu", None),
        )
