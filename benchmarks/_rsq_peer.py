"""One peer's quantization of SmolLM2, for one row of benchmarks/rsq_peers.py; runs in the peer's own environment.

    python benchmarks/_rsq_peer.py PEER MODEL_DIRECTORY TOKENS.pt OUT.safetensors BITS GROUP THREADS

GROUP -1 is a row. Writes the weights that changed, as they are multiplied: rounded linears, and what the method scaled.
Prints one line of JSON: seconds by the clock and of CPU time for the peer's own work, and its version.
"""

import importlib.metadata
import json
import os
import sys
import time

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

peer, directory, tokens_path, out, bits, group, threads = sys.argv[1:8]
BITS, GROUP = int(bits), int(group)
torch.set_num_threads(int(threads))
tokens = torch.load(tokens_path)


def load():
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def linears(model):
    return {
        n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")
    }


def on_grid(weight, scale, zero):
    """Codes' values of a weight that a tool left unrounded beside its scales: [N, K] by [N, groups]."""
    shape = weight.shape
    w, s = weight.float().reshape(shape[0], scale.shape[1], -1), scale.float()[..., None]
    top = 2 ** (BITS - 1)
    z = 0.0 if zero is None else zero.float()[..., None]
    return (((w / s).round() + z).clamp(-top, top - 1) - z).mul(s).reshape(shape)


def llmcompressor(model):
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    data = Dataset.from_dict(
        {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    )
    awq = peer == "llm-compressor-awq"
    weights = {"num_bits": BITS, "type": "int", "symmetric": not awq, "observer": "memoryless_mse",
               "strategy": "channel" if GROUP < 0 else "group"}  # fmt: skip
    if GROUP > 0:
        weights["group_size"] = GROUP
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if awq:
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        recipe = [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    else:
        recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
    oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1])  # fmt: skip
    for module in linears(model).values():
        scale, zero = module.weight_scale, getattr(module, "weight_zero_point", None)
        module.weight.data = on_grid(
            module.weight, scale, None if zero is None or not bool(zero.any()) else zero
        )
    return model


def autoround(model):
    from auto_round import AutoRound

    tokenizer = AutoTokenizer.from_pretrained(directory)
    data = [{"input_ids": t[None], "attention_mask": torch.ones_like(t)[None]} for t in tokens]
    iterations = int(os.environ.get("PEER_ITERATIONS", "50"))
    tool = AutoRound(model, tokenizer=tokenizer, bits=BITS, group_size=GROUP, sym=True, iters=iterations,
                     nsamples=len(tokens), seqlen=tokens.shape[1], dataset=data, batch_size=4, device_map="cpu",
                     amp=False, enable_torch_compile=False)  # fmt: skip
    made, _ = tool.quantize()
    return made


def gptqmodel(_):
    from gptqmodel import GPTQModel, QuantizeConfig

    tool = GPTQModel.load(directory, QuantizeConfig(bits=BITS, group_size=GROUP, sym=True, device="cpu"))
    tool.quantize([{"input_ids": t.tolist(), "attention_mask": [1] * len(t)} for t in tokens], batch_size=4)
    made = load()
    found = {n: m for n, m in tool.model.named_modules() if hasattr(m, "dequantize_weight")}
    for name, module in linears(made).items():
        module.weight.data = (
            found[name].dequantize_weight().float().reshape(-1).view(module.weight.shape[::-1]).t()
        )
    return made


def hqq(model):
    from hqq.core.quantize import Quantizer

    for module in linears(model).values():
        packed, meta = Quantizer.quantize(module.weight.data, nbits=BITS, group_size=None if GROUP < 0 else GROUP, axis=1,
                                          channel_wise=True, device="cpu", compute_dtype=torch.float32)  # fmt: skip
        module.weight.data = Quantizer.dequantize(packed, meta).float().view_as(module.weight)
    return model


def torchao(model):
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    grain = PerAxis(0) if GROUP < 0 else PerGroup(GROUP)
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{BITS}"), granularity=grain)
    quantize_(model, config, filter_fn=lambda m, n: n in chosen)
    for module in linears(model).values():
        module.weight = torch.nn.Parameter(module.weight.dequantize(), False)
    return model


PEERS = {
    "llm-compressor-gptq": (llmcompressor, "llmcompressor"),
    "llm-compressor-awq": (llmcompressor, "llmcompressor"),
    "auto-round": (autoround, "auto-round"),
    "gptqmodel": (gptqmodel, "gptqmodel"),
    "hqq": (hqq, "hqq"),
    "torchao": (torchao, "torchao"),
}
run, package = PEERS[peer]
model = load()
chosen = set(linears(model))
before = {n: t.clone() for n, t in model.state_dict().items()}
wall, cpu = time.perf_counter(), time.process_time()
with torch.no_grad() if peer in ("hqq", "torchao") else torch.enable_grad():
    made = run(model)
spent = time.perf_counter() - wall, time.process_time() - cpu
after = {n: t for n, t in made.state_dict().items() if n in before}
changed = {
    n: t.detach().float().contiguous().clone()
    for n, t in after.items()
    if t.shape == before[n].shape and not torch.equal(t, before[n])
}
save_file(changed, out)
lost = [n for n in chosen if f"{n}.weight" not in changed]
assert not lost, f"not quantized: {lost[:3]}"
print(json.dumps({"version": importlib.metadata.version(package), "wall_s": round(spent[0], 1),
                  "cpu_s": round(spent[1], 1), "changed": len(changed)}))  # fmt: skip
