"""llm-compressor's GPTQ on given tokens, for one row of benchmarks/rsq.py; runs in an environment of its own.

    python benchmarks/_rsq_llmcompressor.py MODEL_DIRECTORY TOKENS.pt OUT.safetensors BITS

Writes the rounded weights of all linears but the head, as they are multiplied.
"""

import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

directory, tokens_path, out, bits = sys.argv[1:5]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
tokens = torch.load(tokens_path)
data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
scheme = {
    "group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": int(bits), "type": "int", "symmetric": True, "strategy": "channel",
                    "observer": "memoryless_mse"},
    }
}  # fmt: skip
recipe = GPTQModifier(config_groups=scheme, ignore=["lm_head"])
oneshot(
    model=model,
    dataset=data,
    recipe=recipe,
    num_calibration_samples=len(tokens),
    max_seq_length=tokens.shape[1],
)
found = {}
for name, module in model.named_modules():
    if hasattr(module, "weight_scale"):
        scale = module.weight_scale.float()
        top = 2 ** (int(bits) - 1)
        codes = (module.weight.float() / scale).round().clamp(-top, top - 1)
        found[f"{name}.weight"] = (codes * scale).contiguous()
save_file(found, out)
print(f"wrote {len(found)} weights")
