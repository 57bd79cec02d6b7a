"""The second question on caches that kvpress shortened, run by an interpreter that has kvpress.

    PYTHON kvpress_child.py FILE     one JSON line: accuracies by press

FILE is a safetensors file of the decoder's weights ("w." in front) and of the cases; its metadata holds the decoder's
configuration and, by name, the share of the image prompt's keys and values to keep. A press shortens the cache behind each
layer's attention, so the first question is answered from all of it.
"""

from __future__ import annotations

import json
import sys

import torch
from kvpress import ExpectedAttentionPress, KnormPress, SnapKVPress
from safetensors import safe_open
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

PRESSES = {
    "SnapKV": lambda ratio: SnapKVPress(compression_ratio=ratio, window_size=3, kernel_size=1),
    "SnapKV, pooled": lambda ratio: SnapKVPress(compression_ratio=ratio, window_size=3, kernel_size=5),
    "ExpectedAttention": lambda ratio: ExpectedAttentionPress(compression_ratio=ratio, n_future_positions=32, n_sink=0),
    "Knorm": lambda ratio: KnormPress(compression_ratio=ratio),
}  # fmt: skip
BATCH = 64


@torch.no_grad()
def main(path: str) -> None:
    torch.set_num_threads(1)
    with safe_open(path, "pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        about = file.metadata()
    model = LlamaForCausalLM(LlamaConfig(**json.loads(about["config"]))).eval()
    model.load_state_dict({name[2:]: t for name, t in held.items() if name.startswith("w.")})
    found: dict[str, dict[str, float]] = {}
    for budget, share in json.loads(about["shares"]).items():
        for name, make in PRESSES.items():
            first = second = bytes_held = 0
            for start in range(0, len(held["embeds"]), BATCH):
                here = slice(start, start + BATCH)
                embeds, follow = held["embeds"][here], held["follow_up"][here]
                cache = DynamicCache(config=model.config)
                with make(1 - share)(model):
                    out = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
                first += int((out.logits[:, -1].argmax(-1) == held["answer"][here]).sum())
                bytes_held = sum(
                    (layer.keys[0].numel() + layer.values[0].numel()) * 2 for layer in cache.layers
                )
                places = torch.arange(embeds.shape[1], embeds.shape[1] + follow.shape[1])[None]
                past = cache.get_seq_length()
                mask = torch.ones(follow.shape[1], past + follow.shape[1], dtype=torch.bool).tril(past)
                out = model(
                    follow, past_key_values=cache, position_ids=places, attention_mask=mask[None, None]
                )
                second += int((out.logits[:, -1].argmax(-1) == held["second"][here]).sum())
            total = len(held["embeds"])
            found[f"{name}, {budget}"] = {"t1": first / total, "t2": second / total, "bytes": bytes_held}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
