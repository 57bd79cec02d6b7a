"""How the models of `vlm_zoo` are built, and what their images, videos and sounds are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

MARKS = MARK, VIDEO, START, END = 120, 121, 122, 123
_TEXT = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
             eos_token_id=None)  # fmt: skip
_VISION = dict(hidden_size=24, intermediate_size=40, num_attention_heads=3, num_hidden_layers=2)
_QWEN_MARKS = dict(
    image_token_id=MARK, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END
)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """make: builds the model. media: for the images of each row, the inputs that hold them and the tokens of each.
    mark: the id of an image's tokens. beside: further inputs, from ids. later: their value at tokens behind the prompt."""

    make: Callable[[], torch.nn.Module]
    media: Callable[[Any, Sequence[int]], tuple[Batch, int]]
    mark: int = MARK
    beside: Callable[[torch.Tensor], Batch] = lambda ids: {}
    later: int = 0


def _pixels(model: Any, rows: Sequence[int], size: int = 32) -> Batch:
    return {"pixel_values": _noise(sum(rows), 3, size, size)}


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _clip(**sizes: Any) -> Any:
    return hf.CLIPVisionConfig(**_VISION, image_size=32, patch_size=8, projection_dim=24, **sizes)


def _siglip(patch: int = 8) -> Any:
    return hf.SiglipVisionConfig(**_VISION, image_size=32, patch_size=patch, vision_use_head=False)


def _fixed(tokens: int) -> Callable[[Any, Sequence[int]], tuple[Batch, int]]:
    return lambda model, rows: (_pixels(model, rows), tokens)


def _llava() -> Any:
    config = hf.LlavaConfig(
        vision_config=_clip(),
        text_config=hf.LlamaConfig(**_TEXT),
        image_token_id=MARK,
        image_token_index=MARK,
    )
    return hf.LlavaForConditionalGeneration(config)


def _pixtral() -> Any:
    vision = hf.PixtralVisionConfig(
        **_VISION | {"hidden_size": 32, "num_attention_heads": 4}, image_size=32, patch_size=8
    )
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.MistralConfig(**_TEXT, sliding_window=None), image_token_index=MARK,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def _sized(model: Any, rows: Sequence[int]) -> tuple[Batch, int]:
    count = sum(rows)
    return {**_pixels(model, rows), "image_sizes": torch.tensor([[32, 32]] * count)}, 16


def _mistral3() -> Any:
    vision = hf.PixtralVisionConfig(
        **_VISION | {"hidden_size": 32, "num_attention_heads": 4}, image_size=32, patch_size=4
    )
    text = hf.MistralConfig(**_TEXT, sliding_window=None)
    return hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(
            vision_config=vision, text_config=text, image_token_index=MARK, spatial_merge_size=2
        )
    )


def _next(config: Any, model: Any, vision: Any, text: Any) -> Any:
    return model(
        config(
            vision_config=vision, text_config=text, image_token_index=MARK, image_grid_pinpoints=[[32, 32]]
        )
    )


def _tiles(model: Any, rows: Sequence[int]) -> tuple[Batch, int]:
    """An overview and one tile an image, with a token at the end of each of the tile's lines."""
    count = sum(rows)
    given = {"pixel_values": _noise(count, 2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * count)}
    return given, 16 + 4 * 5


def _next_video() -> Any:
    config = hf.LlavaNextVideoConfig(
        vision_config=_clip(), text_config=hf.LlamaConfig(**_TEXT), image_token_index=MARK, video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 32]],
    )  # fmt: skip
    return hf.LlavaNextVideoForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    vision = dict(
        depth=1, embed_dim=24, hidden_size=32, num_heads=3, mlp_ratio=2, patch_size=4, temporal_patch_size=2
    )
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(
            vision_config=vision, text_config=dict(**_TEXT, rope_parameters=_ROPE), **_QWEN_MARKS
        )
    )


def _qwen2_5_vl() -> Any:
    vision = dict(depth=2, hidden_size=24, out_hidden_size=32, intermediate_size=40, num_heads=3, patch_size=4,
                  temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1])  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            vision_config=vision, text_config=dict(**_TEXT, rope_parameters=_ROPE), **_QWEN_MARKS
        )
    )


def _qwen3_vl(experts: bool) -> Any:
    vision = dict(depth=3, hidden_size=24, out_hidden_size=32, intermediate_size=40, num_heads=2, patch_size=4,
                  temporal_patch_size=2, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])  # fmt: skip
    text = dict(**_TEXT, head_dim=8, rope_parameters={**_ROPE, "mrope_interleaved": True})
    if experts:
        text |= dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
        config = hf.Qwen3VLMoeConfig(vision_config=vision, text_config=text, **_QWEN_MARKS)
        return hf.Qwen3VLMoeForConditionalGeneration(config)
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(vision_config=vision, text_config=text, **_QWEN_MARKS)
    )


def _patches(model: Any, rows: Sequence[int]) -> tuple[Batch, int]:
    count = sum(rows)
    grid = torch.tensor([[1, 8, 8]] * count)
    return {"pixel_values": _noise(count * 64, 3 * 2 * 4 * 4), "image_grid_thw": grid}, 16


def _video_patches(model: Any, rows: Sequence[int]) -> tuple[Batch, int]:
    count = sum(rows)
    grid = torch.tensor([[2, 8, 4]] * count)
    return {"pixel_values_videos": _noise(count * 64, 3 * 2 * 4 * 4), "video_grid_thw": grid}, 16


def _types(ids: torch.Tensor) -> Batch:
    return {"mm_token_type_ids": (ids == MARK).long() + 2 * (ids == VIDEO).long()}


def _idefics3(config: Any, model: Any, vision: Any) -> Any:
    text = hf.LlamaConfig(**_TEXT)
    tower = vision(**_VISION, image_size=32, patch_size=4)
    return model(
        config(vision_config=tower, text_config=text, image_token_id=MARK, scale_factor=2, pad_token_id=0)
    )


def _by_row(model: Any, rows: Sequence[int]) -> tuple[Batch, int]:
    """[rows, images, 3, 32, 32], a row's missing ones black."""
    images = _noise(len(rows), max(rows), 3, 32, 32)
    for row, count in enumerate(rows):
        images[row, count:] = 0
    return {"pixel_values": images}, 16


def _internvl() -> Any:
    vision = hf.InternVLVisionConfig(**_VISION, image_size=[32, 32], patch_size=[4, 4])
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(vision_config=vision, text_config=hf.Qwen2Config(**_TEXT), image_token_id=MARK)
    )


def _gemma3() -> Any:
    text = hf.Gemma3TextConfig(
        **_TEXT, head_dim=8, sliding_window=24, layer_types=["sliding_attention", "full_attention"]
    )
    config = hf.Gemma3Config(vision_config=_siglip(4), text_config=text, image_token_index=MARK, mm_tokens_per_image=16,
                             boi_token_index=START, eoi_token_index=END)  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config)


def _paligemma() -> Any:
    text = hf.GemmaConfig(**_TEXT, head_dim=8)
    config = hf.PaliGemmaConfig(
        vision_config=_siglip(), text_config=text, image_token_index=MARK, projection_dim=32
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def _aya() -> Any:
    text = hf.Cohere2Config(**_TEXT, sliding_window=24, layer_types=["sliding_attention", "full_attention"])
    config = hf.AyaVisionConfig(vision_config=_siglip(4), text_config=text, image_token_index=MARK)
    return hf.AyaVisionForConditionalGeneration(config)


def _mllama() -> Any:
    text = hf.MllamaTextConfig(**_TEXT | {"num_hidden_layers": 4}, cross_attention_layers=[1, 2])
    vision = hf.MllamaVisionConfig(
        hidden_size=24, num_hidden_layers=2, num_global_layers=1, attention_heads=3, intermediate_size=40, image_size=32,
        patch_size=8, max_num_tiles=1, intermediate_layers_indices=[0, 1], vision_output_dim=72,
        supported_aspect_ratios=[[1, 1]],
    )  # fmt: skip
    config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=MARK)
    return hf.MllamaForConditionalGeneration(config)


def _crossed(model: Any, rows: Sequence[int]) -> tuple[Batch, int]:
    batch, most = len(rows), max(rows)
    there = (torch.arange(most)[None] < torch.tensor(rows)[:, None]).long()
    return {
        "pixel_values": _noise(batch, most, 1, 3, 32, 32),
        "aspect_ratio_mask": there[:, :, None],
        "aspect_ratio_ids": there,
    }, 1


def _qwen2_audio() -> Any:
    audio = dict(num_mel_bins=8, encoder_layers=1, encoder_attention_heads=3, encoder_ffn_dim=40, d_model=24,
                 max_source_positions=32)  # fmt: skip
    text = hf.Qwen2Config(**_TEXT)
    config = hf.Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=MARK)
    return hf.Qwen2AudioForConditionalGeneration(config)


def _sounds(model: Any, rows: Sequence[int]) -> tuple[Batch, int]:
    count = sum(rows)
    return {
        "input_features": _noise(count, 8, 64),
        "feature_attention_mask": torch.ones(count, 64, dtype=torch.long),
    }, 16


ZOO: dict[str, Entry] = {
    "LLaVA": Entry(_llava, _fixed(16)),
    "LLaVA, Pixtral's tower": Entry(_pixtral, _sized),
    "LLaVA-NeXT": Entry(
        lambda: _next(
            hf.LlavaNextConfig, hf.LlavaNextForConditionalGeneration, _clip(), hf.LlamaConfig(**_TEXT)
        ),
        _tiles,
    ),
    "LLaVA-OneVision": Entry(
        lambda: _next(
            hf.LlavaOnevisionConfig,
            hf.LlavaOnevisionForConditionalGeneration,
            _siglip(),
            hf.Qwen2Config(**_TEXT),
        ),
        _tiles,
    ),
    "LLaVA-NeXT-Video": Entry(
        _next_video,
        lambda model, rows: ({"pixel_values_videos": _noise(sum(rows), 4, 3, 32, 32)}, 16),
        VIDEO,
    ),
    "Qwen2-VL": Entry(_qwen2_vl, _patches, MARK, _types),
    "Qwen2.5-VL": Entry(_qwen2_5_vl, _patches, MARK, _types),
    "Qwen2.5-VL, video": Entry(_qwen2_5_vl, _video_patches, VIDEO, _types),
    "Qwen3-VL": Entry(lambda: _qwen3_vl(False), _patches, MARK, _types),
    "Qwen3-VL-MoE": Entry(lambda: _qwen3_vl(True), _patches, MARK, _types),
    "SmolVLM": Entry(
        lambda: _idefics3(hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration, hf.SmolVLMVisionConfig),
        _by_row,
    ),
    "Idefics3": Entry(
        lambda: _idefics3(hf.Idefics3Config, hf.Idefics3ForConditionalGeneration, hf.Idefics3VisionConfig),
        _by_row,
    ),
    "InternVL": Entry(_internvl, _fixed(16)),
    "Gemma 3": Entry(_gemma3, _fixed(16), MARK, lambda ids: {"token_type_ids": (ids == MARK).long()}),
    "PaliGemma": Entry(
        _paligemma, _fixed(16), MARK, lambda ids: {"token_type_ids": torch.zeros_like(ids)}, 1
    ),
    "Mistral 3": Entry(_mistral3, _sized),
    "Aya Vision": Entry(_aya, _fixed(16)),
    "Mllama": Entry(_mllama, _crossed),
    "Qwen2-Audio": Entry(_qwen2_audio, _sounds),
}
