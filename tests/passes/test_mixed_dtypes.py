"""Programs of several dtypes: adapters and masks in another one than the model, and dtypes that a pass does not take."""

from __future__ import annotations

import functools

import captures
import peft
import pytest
import torch
import zoo
from torch.nn import functional as F

from thresher import backend
from thresher.kernels import catalog
from thresher.lowering.reference import Reference
from thresher.recipe import Recipe
from thresher.runtime.compare import as_packed, run_plainly

catalog.load()
aten = torch.ops.aten
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ROUNDING = {BF16: 3e-2, FP16: 4e-3, FP32: 1e-4}


def run(model, inputs, **passes):
    """The report of a recipe, and the program's results before and after, packed where it packs."""
    return run_captured(captures.dynamo(model, inputs), inputs, **passes)


def run_captured(program, inputs, **passes):
    arguments = captures.arguments(program, inputs)
    with torch.no_grad():
        after, report = backend.run_pipeline(program, Recipe.of(passes), arguments)
        packed, arguments = as_packed(program, after, arguments)
        before = run_plainly(program, arguments, Reference())
        return report, before, run_plainly(packed, arguments, Reference())


@functools.cache
def adapted(base, adapter):
    """The zoo's Llama in one dtype, with LoRA in another, as a Program with its inputs."""
    model, inputs = zoo.ZOO["llama"].build()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model.to(base), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    return captures.dynamo(model, inputs), inputs


@pytest.mark.parametrize(
    "base, adapter",
    [(BF16, FP32), *(pytest.param(*d, marks=pytest.mark.thorough) for d in ((FP16, BF16), (FP32, BF16)))],
)
def test_a_model_with_adapters_in_another_dtype_packs(base, adapter):
    account = run_captured(*adapted(base, adapter), prepack=True)[0].passes[0]
    assert account.rewritten and account.rolled_back is None and account.error <= account.budget < 0.3


@pytest.mark.parametrize("base, adapter", [(BF16, FP32), (FP32, BF16)], ids=str)
def test_each_linear_beside_adapters_is_rewritten_in_its_own_dtype(base, adapter):
    """nvfp4 takes what is left of each dtype; bf16 takes fp32 alone, and says of others what they are."""
    report = run_captured(*adapted(base, adapter), nvfp4={"min_weights": 0, "keep": ("*lora*",), "budget": 100.0},
                          bf16={"min_weights": 0, "budget": 100.0, "emulate": True})[0]  # fmt: skip
    nvfp4, bf16 = report["nvfp4"], report["bf16"]
    assert len(nvfp4.rewritten) == 15  # q, k, v, o, gate, up, down of two layers, and the head
    lora = [m for m in bf16.missed if "lora" in m.site] + [s for s in bf16.rewritten if "lora" in str(s)]
    assert len(lora) == 12
    if adapter != FP32:
        assert all(str(adapter) in m.reason for m in lora), [m.reason for m in lora]
    else:
        assert len(bf16.rewritten) == 12


class Masked(torch.nn.Module):
    """An encoder layer under an additive mask of a dtype of its own. bias: of each head and pair of positions."""

    def __init__(self, mask_dtype, bias=False):
        super().__init__()
        self.embed = torch.nn.Embedding(96, 32)
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.bias = torch.nn.Parameter(torch.randn(1, 4, 12, 12)) if bias else None
        self.mask_dtype = mask_dtype

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        hidden = torch.finfo(self.mask_dtype).min
        mask = (1 - attention_mask[:, None, None, :].to(self.mask_dtype)) * hidden
        if self.bias is not None:
            mask = mask.expand(-1, 4, 12, 12) + self.bias.to(self.mask_dtype).clamp(-2, 2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [False, True], ids=["padding", "bias"])
@pytest.mark.parametrize("mask_dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_an_additive_mask_of_any_dtype_that_torch_takes_packs(dtype, mask_dtype, bias):
    torch.manual_seed(0)
    model = Masked(mask_dtype, bias).eval().to(dtype)
    inputs = zoo.ZOO["bert"].build()[1]
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    try:
        with torch.no_grad():
            model(**inputs)
    except RuntimeError:
        assert mask_dtype not in (dtype, FP32), "torch takes masks of the queries' dtype, and of fp32"
        return
    report, before, after = run(model, inputs, prepack=True)
    account = report.passes[0]
    assert account.rewritten and account.rolled_back is None, account
    real = inputs["attention_mask"].bool()
    for a, b in zip(after, before, strict=True):
        assert (a[real].float() - b[real].float()).abs().max() <= ROUNDING[dtype] * b[real].abs().max()


@pytest.mark.parametrize("name", ["nvfp4", "bf16", "deft"])
def test_a_dtype_that_a_pass_does_not_take_is_named(name):
    model, inputs = zoo.ZOO["llama"].build()
    options = {"min_weights": 0, "keep": ()} if name != "deft" else True
    account = run(model.to(FP64), inputs, **{name: options})[0].passes[0]
    assert account.missed and not account.rewritten
    assert all("torch.float64" in m.reason for m in account.missed), {m.reason for m in account.missed}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_fp64_packs_and_is_judged_to_its_own_digits(name):
    model, inputs = zoo.ZOO[name].build()
    account = run(model.to(FP64), inputs, prepack=True)[0].passes[0]
    assert account.rewritten and account.error < 1e-5  # Llama's norms and tables stay fp32
