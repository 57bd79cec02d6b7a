"""Experts in NVFP4: every weight of a mixture but head and routers is rewritten, and computes what its codes stand for."""

import mixtures
import pytest
import torch
from sampled import sampled

import thresher
from thresher.formats.nvfp4 import dequantized
from thresher.kernels import catalog

catalog.load()
RECIPE = {"nvfp4": {"min_weights": 0, "budget": 9.0}, "min_gain": 0.0}


def rounded(matrix):
    codes, scales, g = torch.ops.thresher.nvfp4_quantize(matrix.contiguous())
    return dequantized(codes, scales, g)[:, : matrix.shape[1]]


@pytest.mark.parametrize(
    "kind", sampled(["gpt_oss", "llama4"], ["mixtral", "gpt_oss", "deepseek_v3", "llama4"])
)
def test_all_but_head_and_router_is_rewritten(kind):
    torch._dynamo.reset()
    model, given = mixtures.build(kind), mixtures.batch()
    fast = thresher.compile(model, given, {**RECIPE, "require": {"nvfp4": 0.7}}, target="reference")
    report = fast.report["nvfp4"]
    assert all("keep='head'" in m.reason or "keep='router'" in m.reason for m in report.missed), report.missed
    kept = {m.site for m in report.missed}
    left = sum(p.numel() * 4 for n, p in model.named_parameters() if n.removesuffix(".weight") in kept)
    assert report.weights["missed"] == left
    got = fast(**given).logits
    real = given["attention_mask"].bool()
    stored_in_out = kind in ("gpt_oss", "llama4")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 3:
                each = [rounded(m.t()).t() if stored_in_out else rounded(m) for m in p]
                p.copy_(torch.stack(each))
            elif p.dim() == 2 and name.removesuffix(".weight") in report.rewritten:
                p.copy_(rounded(p))
        want = model(**given).logits
    torch.testing.assert_close(got[real], want[real], rtol=1e-3, atol=1e-4)


def test_experts_are_kept_by_a_glob_and_small_ones_by_size():
    torch._dynamo.reset()
    model, given = mixtures.build("qwen3_moe"), mixtures.batch()
    recipe = {
        "nvfp4": {"min_weights": 3000, "budget": 9.0, "keep": ["head", "router", "*gate_up_proj"]},
        "min_gain": 0.0,
    }
    report = thresher.compile(model, given, recipe, target="reference").report["nvfp4"]
    reasons = {m.site: m.reason for m in report.missed}
    assert "keep='*gate_up_proj'" in reasons["model.layers.0.mlp.experts.gate_up_proj"]
    assert "4 matrices of 64 x 32 = 2048 weights" in reasons["model.layers.0.mlp.experts.down_proj"]
