"""The zoo's models of vision and language."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from zoo_entry import (
    DECODER,
    IMAGE_TOKEN,
    SEED,
    Inputs,
    add,
    pixels,
    spread,
    tokens,
)


def _llava() -> torch.nn.Module:
    vision = hf.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=3,
        num_hidden_layers=2,
        image_size=16,
        patch_size=8,
        projection_dim=24,
    )
    text = hf.LlamaConfig(**DECODER, num_key_value_heads=2)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    )


def _with_image(inputs: Inputs) -> Inputs:
    """Tokens 1 to 4 of every row stand for its image of 4 patches."""
    inputs["input_ids"][:, 1:5] = IMAGE_TOKEN
    return inputs


def _llava_inputs() -> Inputs:
    return {**_with_image(tokens()), **pixels()}


def _qwen2_vl() -> torch.nn.Module:
    vision = dict(
        depth=1, embed_dim=24, hidden_size=32, num_heads=3, mlp_ratio=2, patch_size=4, temporal_patch_size=2
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = dict(**DECODER, num_key_value_heads=2, rope_parameters=rope)
    markers = dict(
        image_token_id=IMAGE_TOKEN, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93
    )
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(vision_config=vision, text_config=text, **markers)
    )


def _qwen2_vl_inputs() -> Inputs:
    patches = torch.randn(48, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(SEED))
    inputs = _with_image(tokens())
    images = (inputs["input_ids"] == IMAGE_TOKEN).long()
    grid = torch.tensor([[1, 4, 4]] * 3)
    return {**inputs, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": images}


add(
    "llava",
    _llava,
    "llava",
    kv_heads=2,
    attention=3,  # CLIP's last layer is not read: LLaVA takes the one before it
    mlp=3,
    inputs=_llava_inputs,
)
add("qwen2_vl", _qwen2_vl, "qwen2_vl", kv_heads=2, attention=3, mlp=3, inputs=_qwen2_vl_inputs)


def _qwen2_5_vl() -> tuple[torch.nn.Module, Inputs]:
    """As Qwen2-VL, with the vision tower's window attention; its language model has the same graph."""
    vision = dict(
        depth=2, hidden_size=24, out_hidden_size=32, intermediate_size=40, num_heads=3, patch_size=4,
        temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1],
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = dict(**DECODER, num_key_value_heads=2, rope_parameters=rope)
    markers = dict(
        image_token_id=IMAGE_TOKEN, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93
    )
    torch.manual_seed(SEED)
    model = hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **markers)
    )
    spread(model)
    return model.eval(), _qwen2_vl_inputs()


BESIDE: dict[str, Callable[[], tuple[torch.nn.Module, Inputs]]] = {"qwen2_5_vl": _qwen2_5_vl}
"""Models that differ too little from one of the zoo to be put through every test."""
