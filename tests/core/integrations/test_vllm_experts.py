"""vLLM on a mixture whose experts are integers, by our operators: the tokens of the model with the same weights."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_runs import IDS, run

from thresher.formats import bitpack
from thresher.kernels.wna16.linear import dequantize

transformers = pytest.importorskip("transformers")
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: pip install 'thresher[vllm]'"
)
COUNT = """
    from thresher.kernels.experts.wna16 import wna16_expert_linear
    assert wna16_expert_linear.calls["cpu_cpp"] > 0, "vLLM's own kernel ran"
"""


def mixture(folder, bits, group, symmetric):
    """A mixture in `folder` as other tools write one, experts in compressed-tensors; and the model that it stands for."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2, num_experts=4,
        num_experts_per_tok=2, norm_topk_prob=True, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        initializer_range=0.1, eos_token_id=None, decoder_sparse_step=1, mlp_only_layers=[])  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    coded = {}
    for number, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        for e in range(4):
            gate, up = experts.gate_up_proj.data[e].chunk(2)
            for name, weight in (("gate", gate), ("up", up), ("down", experts.down_proj.data[e])):
                rows, inputs = weight.shape
                groups = 1 if group < 0 else inputs // group
                codes = torch.randint(0, 1 << bits, (rows, inputs))
                scales = (torch.rand(rows, groups) + 0.5) / (1 << bits)
                zeros = None if symmetric else torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8)
                packed = bitpack.pack(codes, bits)
                weight.copy_(dequantize(packed, scales, zeros, bits, inputs))
                at = f"model.layers.{number}.mlp.experts.{e}.{name}_proj.weight"
                coded |= {
                    f"{at}_packed": packed,
                    f"{at}_scale": scales,
                    f"{at}_shape": torch.tensor([rows, inputs]),
                }
                if zeros is not None:
                    coded[f"{at}_zero_point"] = bitpack.pack(zeros.t().contiguous(), bits).t().contiguous()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = {n: t for n, t in tensors.items() if ".experts." not in n}
    assert len(tensors) - len(plain) == 24, "an expert's matrices are written one by one"
    save_file(plain | coded, folder / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
               "strategy": "channel" if group < 0 else "group", "group_size": None if group < 0 else group}  # fmt: skip
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None,
                                      "output_activations": None, "format": "pack-quantized"}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written))
    return model


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, True), (3, -1, True), (4, 32, False)])
def test_experts_of_integers_run_by_our_operators(bits, group, symmetric, tmp_path):
    model, prompts = mixture(tmp_path, bits, group, symmetric), IDS[:2, :12]
    with torch.no_grad():
        tokens = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, do_sample=False
        )
    found = run(tmp_path, prompts.tolist(), tmp_path, COUNT, quantization="thresher")
    assert [got for got, _ in found] == tokens[:, 12:].tolist()
