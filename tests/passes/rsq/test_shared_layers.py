"""A layer that a model calls several times (ALBERT): one set of codes of each weight, which serves every call."""

import captures
import pytest
import torch
import transformers as hf

import thresher
from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.plan import make_plan
from thresher.passes.rsq.quantizer.again import gather_again
from thresher.passes.rsq.quantizer.pieces import Batch
from thresher.passes.rsq.quantizer.sweep import Sweep
from thresher.passes.structure.recover import recover
from thresher.passes.tokens.owners import Owners

LAYERS = 3
INSIDE = ("attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output")


@pytest.fixture(scope="module")
def albert():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
                 num_attention_heads=4, max_position_embeddings=32, pad_token_id=0)  # fmt: skip
    model = hf.AlbertModel(hf.AlbertConfig(**sizes)).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            p.normal_(0, 1.0 if "embed" in name else p.shape[-1] ** -0.5)
    return model


def given(rows=2, seed=0):
    ids = torch.randint(4, 60, (rows, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_every_call_reads_the_codes_and_the_weight_counts_once(albert):
    low = thresher.quantize(albert, [given(seed=s) for s in range(6)], thresher.RSQ(bits=8))
    torch._dynamo.reset()
    fast = thresher.compile(albert, given(), target="reference", **low.options)
    report = fast.report["rsq"]
    inner = {f"encoder.albert_layer_groups.0.albert_layers.0.{name}" for name in INSIDE}
    assert inner <= set(report.rewritten) and len(report.rewritten) == len(set(report.rewritten)) == 8
    text = fast.sessions[0].program.text()
    assert text.count("wna16_linear.default(") == 2 + LAYERS * len(INSIDE)
    matrices = [p for n, p in albert.named_parameters() if p.dim() == 2 and "embeddings." not in n]
    assert (
        report.weights["rewritten"] == sum(p.numel() * 4 for p in matrices) and not report.weights["missed"]
    )
    got, want = fast(**given(seed=9)).last_hidden_state, albert(**given(seed=9)).last_hidden_state
    assert float((got - want).norm() / want.norm()) < 0.05


def test_later_calls_count_in_the_statistics(albert):
    program = captures.export(albert, given())
    structure = recover(program)
    plan = make_plan(program, structure, RSQConfig(rotate=False, rotate_heads=False, rotate_down=False))
    assert len(plan.again) == len(INSIDE) and all(len(later) == LAYERS - 1 for later in plan.again.values())
    gathered = gather_again(Sweep(program), plan, [Batch(given())], Owners(program))
    seen = {}
    layer = albert.encoder.albert_layer_groups[0].albert_layers[0]
    hook = layer.ffn.register_forward_pre_hook(lambda _, args: seen.setdefault("x", []).append(args[0]))
    albert(**given())
    hook.remove()
    (ffn,) = [first for first in plan.again if first.fqn.endswith(".ffn")]
    later = torch.cat(seen["x"][1:]).reshape(-1, 32)
    assert gathered[ffn.x].tokens == len(later) == (LAYERS - 1) * 18
    torch.testing.assert_close(gathered[ffn.x].whole(), later.t() @ later, rtol=1e-4, atol=1e-3)


def test_calls_that_would_be_rotated_apart_are_a_miss(albert):
    program = captures.export(albert, given())
    structure = recover(program)
    structure.mlps.pop()  # as where the last call's MLP is not recovered: its down projection would read unturned values
    plan = make_plan(program, structure, RSQConfig())
    (reason,) = [m.reason for m in plan.missed if m.site.endswith("ffn_output")]
    assert f"called in {LAYERS} places" in reason and "would not serve all" in reason
    assert not [s for s in plan.quantise if s.fqn.endswith("ffn_output")]
