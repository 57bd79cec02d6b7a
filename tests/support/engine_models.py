"""The model of the tests of `target="tensorrt"`, and the GPU they build for."""

import torch
import zoo
from tiny_llama import make, prompt

SM = "SM120"


def model_and_inputs(method=""):
    layers = 2 if method == "transprune" else 1  # tokens are left out behind a first layer
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=2)
    if method == "deft":
        sizes.update(hidden_act="relu", num_attention_heads=8)  # heads of 8 values: no fused kernel has them
    model = make(**sizes)
    model.config.use_cache = False
    model = model.to(torch.bfloat16 if method == "deft" else torch.float16)
    ids = prompt(3, 16, span=None)
    if method in ("transprune", "zipvl"):
        ids[:, 1:6] = zoo.IMAGE_TOKEN
        return model, {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[0, 9:] = mask[1, 5:] = 0
    return model, {"input_ids": ids, "attention_mask": mask}
