"""RSQ quantizes experts by the tokens routed to each, and the operators compute what the codes stand for."""

import functools
import re

import mixtures
import pytest
import torch
from torch import fx

import thresher
from thresher.errors import ThresherError
from thresher.low_bit.fuse import fuse, portable
from thresher.passes.rsq import rewrite as rsq_rewrite
from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.plan import make_plan
from thresher.passes.rsq.quantizer import codes, driver, experts
from thresher.passes.rsq.quantizer.experts import ExpertHessians, quantise
from thresher.passes.rsq.quantizer.pieces import Batch
from thresher.passes.rsq.quantizer.sweep import bind, exactness
from thresher.passes.structure.experts import ExpertSite
from thresher.passes.structure.recover import recover
from thresher.quantization import _capture


@pytest.mark.parametrize(
    "kind, options",
    [
        pytest.param("mixtral", dict(bits=4, group_size=32), marks=pytest.mark.thorough),
        ("gpt_oss", dict(grid="nvfp4")),
        ("llama4", dict(bits=3, group_size=32)),
    ],
)
def test_experts_are_quantized(kind, options):
    torch._dynamo.reset()
    model, given = mixtures.build(kind), mixtures.batch()
    low = thresher.quantize(
        model,
        [given, mixtures.batch((13, 12, 7))],
        thresher.RSQ(**options, rotate_heads=False, rotate_down=False, rotate_inputs=False),
    )
    fast = thresher.compile(model, given, {**low.options, "verify": False}, target="reference")
    report = fast.report["rsq"]
    assert sum("experts" in site for site in report.rewritten) == 2
    kept = {m.site for m in report.missed if "keep=" in m.reason}
    assert len(kept) == 2
    left = sum(p.numel() * 4 for n, p in model.named_parameters() if n.removesuffix(".weight") in kept)
    assert report.weights["missed"] == left
    got, real = fast(**given).logits, given["attention_mask"].bool()
    stats = low.statistics["rsq"]
    with torch.no_grad():
        for name, p in model.named_parameters():
            tensors = stats.get(name.removesuffix(".weight"))
            if tensors is not None:
                values = codes.values(tensors)
                p.copy_(values.transpose(1, 2) if p.dim() == 3 and values.shape != p.shape else values)
        want = model(**given).logits
    torch.testing.assert_close(got[real], want[real], rtol=1e-3, atol=1e-4)


def test_down_is_each_experts_own_and_the_next_layers_gate_is_not(monkeypatch):
    torch._dynamo.reset()
    asked = []

    class Spy(ExpertHessians):
        def __init__(self, site, shared):
            asked.append((site.fqn.split(".")[2], site.fqn.split(".")[-1], shared))
            super().__init__(site, shared)

    monkeypatch.setattr(experts, "ExpertHessians", Spy)
    model, given = mixtures.build("mixtral", num_hidden_layers=2), mixtures.batch()
    thresher.quantize(
        model, [given], thresher.RSQ(bits=4, group_size=32, rotate_heads=False, method="nearest")
    )
    assert asked == [
        (layer, part, part == "gate_up_proj") for layer in "01" for part in ("gate_up_proj", "down_proj")
    ]


def _site(count=3, inputs=32, outputs=8):
    return ExpertSite("experts.w", None, None, "w", False, None, count, inputs, outputs)


def test_an_expert_that_saw_little_is_filled_up_with_the_layers_own():
    torch.manual_seed(0)
    shared = ExpertHessians(_site(), shared=True)
    x, chosen = torch.randn(200, 32) * torch.linspace(0.1, 3, 32), torch.zeros(200, dtype=torch.long)
    chosen[:5] = 1  # expert 2 sees nothing
    shared.add(x, chosen, None)
    full, few, none = shared.matrices()
    everyone = 2 / 200 * (x.double().t() @ x.double())
    torch.testing.assert_close(none, everyone, rtol=1e-4, atol=1e-5)
    own = 2 / 5 * (x[:5].double().t() @ x[:5].double())
    torch.testing.assert_close(few, (own * 5 + everyone * 27) / 32, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(full, 2 / 195 * (x[5:].double().t() @ x[5:].double()), rtol=1e-4, atol=1e-4)
    apart = ExpertHessians(_site(), shared=False)
    apart.add(x, chosen, None)
    nothing = apart.matrices()[2]
    assert torch.equal(nothing, torch.eye(32, dtype=torch.float64) * nothing[0, 0])


def test_error_feedback_beats_rounding_for_each_expert():
    torch.manual_seed(0)
    site, weight = _site(), torch.randn(3, 8, 32)
    hessians = ExpertHessians(site, shared=True)
    x = torch.randn(600, 6) @ torch.randn(6, 32) + 0.1 * torch.randn(600, 32)  # features that go together
    hessians.add(x, torch.arange(600) % 3, None)
    tensors, report = quantise(site, weight, hessians.matrix, RSQConfig(bits=3, group_size=32), 3)
    assert tensors["codes"].shape[:2] == (3, 8)
    assert report.quantized < 0.5 * report.nearest


def test_tokens_weights_reach_every_row_of_theirs():
    site = _site(count=2, inputs=4)
    hessians = ExpertHessians(site, shared=True)
    x, chosen = torch.eye(4), torch.tensor([0, 1, 0, 1])  # two tokens, two experts each
    hessians.add(x, chosen, torch.tensor([4.0, 0.0]))
    assert [h.tokens for h in hessians.each] == [1, 1]
    assert hessians.each[0].total[0, 0] == 4 and hessians.each[1].total[1, 1] == 4


def _same(a, b):
    mine, theirs = a.statistics["rsq"], b.statistics["rsq"]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[s][part]) for s, parts in mine.items() for part, t in parts.items())


@pytest.mark.thorough
def test_files_give_the_same_codes_again_after_an_interruption_and_serve_the_model(tmp_path, monkeypatch):
    """All of it at once: rotations, inputs turned online, the original followed, and weights read from files."""
    torch._dynamo.reset()
    model, given = mixtures.build("qwen3_moe"), mixtures.batch()
    model.save_pretrained(tmp_path / "model")
    data, options = [given, mixtures.batch((12, 12))], thresher.RSQ(bits=8, follow_original=1.0)
    whole = thresher.quantize(model, data, options)
    low = thresher.quantize(tmp_path / "model", data, options, folder=tmp_path / "kept")
    _same(low, whole)
    with monkeypatch.context() as patch:
        patch.setattr(driver.Driver, "_quantise", None)  # every layer is on disk
        _same(thresher.quantize(tmp_path / "model", data, options, folder=tmp_path / "kept"), whole)
    assert any("Hessians" in note or "codes of" in note for note in low.report.notes), low.report.notes
    fast = thresher.compile(model, given, {**whole.options, "verify": False}, target="reference")
    assert sum("experts" in site for site in fast.report["rsq"].rewritten) == 2
    real = given["attention_mask"].bool()
    with torch.no_grad():
        got, want = fast(**given).logits[real], model(**given).logits[real]
    assert float((got - want).norm() / want.norm()) < 0.03


@pytest.mark.parametrize(
    "options, said",
    [
        (
            dict(group_size=128),
            r"Groups of 128 do not divide the 64 inputs of its 4 matrices of 192 x 64 weights",
        ),
        (
            dict(keep=("*gate_up_proj",)),
            r"Its 4 matrices of 192 x 64 weights are kept in high precision by keep=",
        ),
    ],
)
def test_experts_that_are_left_are_misses_by_name_and_size(options, said):
    missed = make_plan(*_mixtral(), RSQConfig(**options)).missed
    (reason,) = [m.reason for m in missed if m.site == "model.layers.0.mlp.experts.gate_up_proj"]
    assert re.match(said, reason), reason


def test_a_saved_model_leaves_experts_and_says_so():
    program, structure = _mixtral()
    config, said = portable(RSQConfig(), program, mixtures.build("mixtral"))
    assert any("2 products by a mixture's experts stay as they are" in s for s in said)
    assert not make_plan(program, structure, config).experts
    site, plain = structure.experts[1].fqn, dict.fromkeys(("rotate", "rotate_heads", "rotate_down"), False)
    with pytest.raises(ThresherError, match=rf"{re.escape(site)} cannot be saved as a model.*portable=True"):
        fuse(torch.nn.Module(), program, RSQConfig(**plain), {site: {}})


def test_inputs_are_turned_online_where_the_graph_first_reads_their_size():
    program, inputs = _program("llama4")
    after = program.copy()
    plan = make_plan(after, recover(after), RSQConfig())
    rsq_rewrite.rotate(after, plan, lazy=True)
    assert after.nodes(torch.ops.thresher.hadamard.default)
    assert exactness(program, after, bind(program, inputs)) <= 1e-9


def _program(kind):
    torch._dynamo.reset()
    given = {n: v for n, v in mixtures.batch().items() if n != "use_cache"}
    return _capture(mixtures.build(kind), [Batch(given)]), given


@functools.cache
def _mixtral():
    program, _ = _program("mixtral")
    return program, recover(program)


def test_what_drifted_is_learned_from_tokens_that_the_original_routes_alike():
    torch.manual_seed(0)
    site = _site(count=2, inputs=4)
    site.x, site.experts = (fx.Graph().placeholder(n) for n in ("x", "experts"))
    group = experts.ExpertGroup(site, Unowned(), RSQConfig(follow_original=1.0), shared=False)
    now, before = torch.randn(6, 4), torch.randn(6, 4)
    chosen, original = torch.tensor([0, 0, 1, 1, 0, 1]), torch.tensor([0, 1, 1, 0, 0, 1])
    group.add({site.x: now, site.experts: chosen}, {site.x: before, site.experts: original}, None, Batch({}))
    for expert, drift in enumerate(group.drifts):
        mine = (chosen == expert) & (original == expert)
        torch.testing.assert_close(drift.total, (before - now)[mine].t() @ now[mine])


class Unowned:
    """Of a program without padding masks."""

    def real(self, node, inputs):
        return None

    def mask(self, node):
        return None
