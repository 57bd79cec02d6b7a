"""`thresher.testing.check_pass` finds what a pass must not do; the example package passes it."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import thresher
from thresher import testing
from thresher.errors import ArgumentError
from thresher.graph.edit import replace
from thresher.passes import base
from thresher.recipe import CONFIGS, PassConfig

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "third_party_pass"
aten = torch.ops.aten


@dataclass(frozen=True)
class SoundConfig(PassConfig):
    name = "sound"


class Sound(base.Pass[SoundConfig]):
    """Multiplies every MLP's result by one."""

    name = "sound"
    amount = 0.0

    def match(self, program, context):
        return [base.Match(m.fqn, m.output) for m in context.structure().mlps]

    def rewrite(self, program, match, context):
        out = match.data
        replace(out, program.insert(out.next, aten.mul.Tensor, out, 1.0 + self.amount))


class Edits(Sound):
    def match(self, program, context):
        found = super().match(program, context)
        self.rewrite(program, found[0], context)
        return found


class Taps(Sound):
    def taps(self, program, context):
        self.rewrite(program, self.match(program, context)[0], context)
        return ()


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
        (Edits, "`match` of the pass 'sound' edited the program: it added the node mul"),
        (Taps, "`taps` of the pass 'sound' edited the program"),
        (Strange, "gave a str; it gives Match and Miss only"),
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


class Last(testing.TinyTransformer):
    """Reads the last token's logits, as decoding does."""

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids, attention_mask)[:, -1]


class Causal(testing.TinyTransformer):
    """A causal mask that is spelt out, and no padding."""

    def forward(self, input_ids):
        seen = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()[None, None]
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, seen)
        return torch.nn.functional.linear(self.norm(x), self.embed.weight)


class OneQuery(torch.nn.Module):
    """A decoding step's attention over a padded cache."""

    def forward(self, q, k, v, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def padded():
    return testing.tiny_model()[1]


def image():
    ids = torch.arange(2 * 24).reshape(2, 24) % 61 + 2
    ids[:, 2:10] = 60
    return {"input_ids": ids}


def cache():
    make = torch.Generator().manual_seed(0)
    found = {
        n: torch.randn(2, h, t, 8, generator=make) for n, h, t in (("q", 4, 1), ("k", 2, 9), ("v", 2, 9))
    }
    return {**found, "mask": torch.arange(9).expand(2, 1, 1, 9) >= torch.tensor([4, 0])[:, None, None, None]}


PRUNE = {"stages": ((1, 0.5),), "min_image_tokens": 1, "bucket": 1, "min_saving": 0.0, "image_token_id": 60}
ZIP = {"keep": 0.5, "recent": 2, "spread": 2, "sinks": 1, "bucket": 1, "min_saving": 0.0}
CONFORM = {  # a model on which the pass has something to do, and something to get wrong
    "prepack": (Last, padded, True),
    "causal_mask": (Causal, image, True),
    "decode_attention": (OneQuery, cache, True),
    "transprune": (Causal, image, PRUNE),
    "zipvl": (Causal, image, ZIP),
    "deft": (Last, padded, {"min_bytes": 0}),
    "rsq": (testing.TinyTransformer, padded, {"budget": 1.0}),
    "nvfp4": (Last, padded, {"min_weights": 0, "budget": 1.0, "keep": ()}),
    "bf16": (Last, padded, {"min_weights": 0, "emulate": True}),
}


def test_every_built_in_pass_is_checked():
    from thresher.passes.catalog import PASS_MODULES

    assert set(CONFORM) == set(PASS_MODULES)


@pytest.mark.parametrize("name", CONFORM)
def test_the_built_in_passes_conform(name, tmp_path):
    kind, inputs, options = CONFORM[name]
    torch.manual_seed(0)
    model, batch, stats = kind().eval(), inputs(), None
    if name == "rsq":
        data = [{k: v.repeat(4, 1) for k, v in batch.items()}]
        stats = thresher.quantize(model, data, thresher.RSQ(bits=4)).save(tmp_path / "rsq.safetensors")
    testing.check_pass(name, [(model, batch)], options, stats=stats)


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
