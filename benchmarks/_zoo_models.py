"""Every model class of transformers' auto mappings, as small as its config allows, and a batch for it.

A config is made small by the names of its integers (`RULES`), in nested configs too. Where that gives no model that
runs, `HINTS` says what else it takes, and why.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch

RULES: tuple[tuple[str, int], ...] = (
    (r"^(decoder_|encoder_)?vocab_size$|^n_vocab$|^vocabulary_size$", 128),
    (r"^(text_|vision_)?(hidden_size|d_model|dim|n_embd|embed_dim|embedding_size|hidden_dim|model_dim|word_embed_proj_dim"
     r"|encoder_hidden_dim|decoder_hidden_dim|lm_hidden_size|projection_dim|emb_dim|backbone_hidden_size)$", 64),
    (r"(intermediate_size|ffn_dim|d_ff|d_inner|n_inner|ffn_hidden_size|mlp_dim|inner_dim|intermediate_dim)$", 96),
    (r"^(moe_|shared_expert_).*intermediate_size$", 32),
    (r"^(num_|n_)?(hidden_|encoder_|decoder_|text_|self_attention_)?(layers?|blocks|hidden_groups)$|^(num_|n_)(\w+_)?layers?$"
     r"|^encoder_layers$|^decoder_layers$|^depth$", 2),
    (r"^(num_|n_)?(encoder_|decoder_|text_)?(attention_)?heads?$|^num_attention_heads$|^num_heads$|^n_head$"
     r"|_attention_heads$", 4),
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads|kv_heads)$", 2),
    (r"^(attention_)?head_dim$|^d_kv$|^kv_channels$|^d_head$|^v_head_dim$|^qk_nope_head_dim$", 16),
    (r"^(qk_rope_head_dim|rotary_dim)$", 8),
    (r"^(q|kv)_lora_rank$", 32),
    (r"^(num_|n_)(local_|routed_)?experts$", 4),
    (r"^(num_experts_per_tok(en)?|moe_topk|moe_k|num_selected_experts|moe_top_k|experts_per_token|top_k_experts)$", 2),
    (r"^(n_group|topk_group|num_expert_group)$", 1),
    (r"^(first_k_dense_replace)$", 1),
    (r"^image_size$", 32), (r"^patch_size$", 8),
    (r"^(mamba_)?(d_state|state_size|ssm_state_size)$", 8),
    (r"^(num_mel_bins|num_mel_filters)$", 16), (r"^max_source_positions$", 50),
)  # fmt: skip
"""Integers by name, and what a larger one becomes."""

HINTS: dict[str, tuple[dict[str, Any], str]] = {
    "BloomConfig": ({"n_layer": 2}, "its layers are named n_layer, and num_hidden_layers is an alias"),
    "CTRLConfig": ({"dff": 96}, "its inner width is named dff"),
    "FalconConfig": ({"num_kv_heads": 4}, "with the old block layout its key heads are all heads or one"),
    "GPTBigCodeConfig": ({"n_inner": 96}, "its inner width is None by default"),
    "MptConfig": ({"max_seq_len": 128}, "its ALiBi is built for max_seq_len positions"),
    "ReformerConfig": ({"axial_pos_shape": [4, 16], "axial_pos_embds_dim": [32, 32]}, "its axial positions must multiply to "
                       "the hidden size"),
    "XLNetConfig": ({"d_head": 16}, "d_head times n_head must be d_model"),
    "GptOssConfig": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "its YaRN expects 4096 positions"),
    "Phi3Config": ({"partial_rotary_factor": 1.0}, "its rotary share is of another head width"),
    "GPTNeoConfig": ({"attention_types": [[["global", "local"], 1]]}, "its kinds of layers are written as multiples"),
    "Gemma3nTextConfig": ({"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [96] * 4,
                           "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 16,
                           "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "vocab_size_per_layer_input": 128},
                          "its last layers use keys and values of earlier ones of each kind"),
    "Gemma4TextConfig": ({"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16},
                         "it has a second vocabulary, of inputs by layer"),
    "GraniteMoeHybridConfig": ({"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16,
                                "mamba_chunk_size": 16}, "all its layers are Mamba by default"),
    "Lfm2MoeConfig": ({"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, "it has no layer_types"),
    "DeepseekV2Config": ({"num_experts_per_tok": 2}, "it leaves out the number of experts a token"),
    "Dots1Config": ({"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}, "it leaves out its experts"),
    "DoryConfig": ({"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, "it has three parts"),
    "LongcatFlashConfig": ({"head_dim": 8, "zero_expert_num": 2}, "its head_dim is what rotates"),
    "CohereCompassTextConfig": ({"rope_parameters": {k: {"rope_type": "default", "rope_theta": 1e4} for k in
                                 ("full_attention", "sliding_attention")}}, "it has no rotary parameters by default"),
    "ReformerModelWithLMHead": ({"is_decoder": True}, "its language model is refused as an encoder"),
    "XmodConfig": ({"default_language": "en_XX"}, "it wants to know its language"),
    "EsmcConfig": ({"num_key_value_heads": 4}, "it refuses grouped heads"),
    "CpmAntConfig": ({"dim_head": 16, "dim_ff": 96, "prompt_length": 8, "position_bias_num_buckets": 32}, "its own names"),
    "LukeConfig": ({"entity_vocab_size": 64, "entity_emb_size": 16}, "it has a second vocabulary, of entities"),
    "LiltConfig": ({"hidden_size": 96}, "its width is six coordinates'"),
    "LayoutLMv3Config": ({"hidden_size": 96, "coordinate_size": 16, "shape_size": 16}, "its width is six coordinates'"),
    "KimiLinearConfig": ({"linear_num_heads": 4, "linear_head_dim": 16}, "its delta layers have sizes of their own"),
    "BailingHybridConfig": ({"linear_num_heads": 4, "linear_head_dim": 16}, "its delta layers have sizes of their own"),
    "FalconH1Config": ({"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_chunk_size": 16},
                       "its scans have sizes of their own"),
    "FSMTConfig": ({"src_vocab_size": 128, "tgt_vocab_size": 128}, "its own names"),
    "EsmConfig": ({"vocab_size": 128, "mask_token_id": 32, "pad_token_id": 1}, "it has no vocabulary by default"),
    "BambaConfig": ({"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1,
                     "mamba_chunk_size": 16}, "its kinds of layers come from the numbers of those with attention"),
}  # fmt: skip
"""Configs, or models, that need more than the rules: values, `part.name` for one in a nested config, and the reason."""

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}


def classes(kinds: tuple[str, ...] = ()) -> dict[str, tuple[type, type]]:
    """Model classes by name, each with its config's class. kinds: beginnings of names of mappings; none for all."""
    from transformers.models.auto import modeling_auto

    found: dict[str, tuple[type, type]] = {}
    for name in dir(modeling_auto):
        if not re.fullmatch(r"MODEL\w*_MAPPING", name) or (
            kinds and not any(name == f"{k}_MAPPING" for k in kinds)
        ):
            continue
        mapping = getattr(modeling_auto, name)
        for config in mapping.keys():  # noqa: SIM118 (not a dict)
            with contextlib.suppress(ValueError):  # named by the mapping, and not in this transformers
                models = mapping[config]
                for model in models if isinstance(models, (tuple, list)) else (models,):
                    found.setdefault(model.__name__, (model, config))
    return dict(sorted(found.items()))


def one(name: str) -> tuple[type, type]:
    """A model class of transformers by name, and its config's class."""
    import transformers

    model = getattr(transformers, name)
    return model, model.config_class


def shrunk(config: Any) -> dict[str, Any]:
    """Keyword arguments for a config of the same class with small integers."""
    given: dict[str, Any] = {}
    for name, known in vars(config).items():
        if name.startswith("_") or isinstance(known, bool):
            continue
        if name == "head_dim" and "qk_rope_head_dim" in vars(config):
            continue  # such a config works it out, from what rotates
        if hasattr(known, "to_dict") and hasattr(known, "model_type"):
            given[name] = type(known)(**shrunk(known))
        elif isinstance(known, int):
            small = next((v for pattern, v in RULES if re.search(pattern, name)), None)
            if name == "num_key_value_heads" and "kv_lora_rank" in vars(config):
                small = 4  # as many as queries have: keys are made for each from the latent
            if small is not None and known > small:
                given[name] = small
    for name, value in _TOKENS.items():
        if name in vars(config) and name != "decoder_start_token_id":
            given[name] = value
    for name, known in vars(config).items():
        if (
            name.endswith(("_token_id", "_token_index"))
            and name not in given
            and isinstance(known, int)
            and known > 127
        ):
            given[name] = 3
    if getattr(config, "is_encoder_decoder", False) or "decoder_start_token_id" in vars(config):
        given["decoder_start_token_id"] = 0
    given.update(_by_layer(config, given))
    rope = vars(config).get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        heads = given.get("num_attention_heads", getattr(config, "num_attention_heads", 4))
        width = given.get("head_dim") or given.get("hidden_size", 64) // heads
        third = 3 * (half := int(width * rope.get("partial_rotary_factor", 1.0)) // 2) // 8
        given["rope_parameters"] = {**rope, "mrope_section": [half - 2 * third, third, third]}
    for name, small in _UNSAID.items():
        if vars(config).get(name, 0) is None and name not in given:
            given[name] = small
    return given


_UNSAID = {"head_dim": 16, "num_key_value_heads": 2}
"""Integers that a config leaves out, and that its model wants."""


def _by_layer(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of each layer, for the layers that are kept: one of each kind, as they come."""
    counted = next((n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in given), None)
    layers, known = (given[counted], getattr(config, counted)) if counted else (None, None)
    lists = {n: list(v) for n, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == known}
    if not layers or not lists:
        kinds = vars(config).get("layer_types") if layers else None
        return {"layer_types": (list(dict.fromkeys(kinds)) * layers)[:layers]} if kinds else {}
    kinds = next(
        (lists[n] for n in ("layer_types", "layers_block_type") if n in lists), next(iter(lists.values()))
    )
    kept = [kinds.index(kind) for kind in dict.fromkeys(map(str, kinds)) if kind in kinds]
    kept = ((kept or [0]) * layers)[:layers]
    return {n: type(v)(lists[n][i] for i in kept) for n, v in vars(config).items() if n in lists}


def tiny(config_class: type, model: str = "") -> Any:
    """The small config of a class; `model` may have a hint of its own."""
    given = shrunk(config_class())
    hints = {**HINTS.get(config_class.__name__, ({}, ""))[0], **HINTS.get(model, ({}, ""))[0]}
    for name, value in hints.items():
        inner, _, field = name.rpartition(".")
        if inner:
            setattr(given[inner], field, value)
        else:
            given[name] = value
    return config_class(**given)


def build(model_class: type, config_class: type) -> torch.nn.Module:
    """A random model in eval mode, its matrices of a size that lets tokens differ."""
    torch.manual_seed(0)
    model = model_class(tiny(config_class, model_class.__name__)).eval()
    for module in model.modules():  # caches would be results, and some forwards do not take the word
        if getattr(getattr(module, "config", None), "use_cache", None):
            module.config.use_cache = False
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2 and p.is_floating_point():
                p.normal_(0, 0.5 if "embed" in name else p.shape[-1] ** -0.5)
            elif "bias" in name and p.is_floating_point():
                p.normal_(0, 0.05)
    return model


class NoBatch(Exception):
    """Why no batch is made for a class, as a sentence."""


def _image(config: Any, rows: int, make: torch.Generator) -> torch.Tensor:
    """Random pixels [rows, channels, height, width] for a vision config."""
    size = getattr(config, "image_size", None)
    size = size if isinstance(size, int) else 32
    return torch.randn(rows, getattr(config, "num_channels", 3), size, size, generator=make)


def batch(
    model: torch.nn.Module, left: bool = False, lengths: tuple[int, ...] = (14, 9, 3)
) -> dict[str, Any]:
    """A padded batch of what the model's forward takes. Raises NoBatch."""
    takes: Mapping[str, Any] = inspect.signature(model.forward).parameters
    config = model.config
    rows, longest = len(lengths), max(lengths)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    real = real.flip(1) if left else real
    make = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 120, (rows, longest), generator=make) * real
    given: dict[str, Any] = {}
    if "input_ids" in takes and "attention_mask" in takes:
        given = {"input_ids": ids, "attention_mask": real.long()}
        if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
            given["decoder_input_ids"] = torch.randint(4, 120, (rows, 5), generator=make)
    elif "input_ids" in takes and "pixel_values" not in takes:
        given = {"input_ids": ids}  # a model without a padding mask
    elif "pixel_values" in takes:
        vision = getattr(config, "vision_config", config)
        given = {"pixel_values": _image(vision, 2, make)}
    elif "input_features" in takes:
        width = getattr(config, "num_mel_bins", None) or getattr(config, "feature_projection_input_dim", 80)
        frames = 2 * getattr(config, "max_source_positions", 50)
        given = {"input_features": torch.randn(2, width, frames, generator=make)}
        if "decoder_input_ids" in takes:
            given["decoder_input_ids"] = torch.randint(4, 120, (2, 5), generator=make)
    elif "input_values" in takes:
        sound = torch.tensor((2400, 1600))
        real = torch.arange(2400) < sound[:, None]
        given = {"input_values": torch.randn(2, 2400, generator=make) * real}
        if "attention_mask" in takes:
            given["attention_mask"] = real.long()
    else:
        raise NoBatch(
            f"Its forward takes {', '.join(list(takes)[:4])}; batches of text, images and sound are made."
        )
    dual = getattr(config, "vision_config", None) is not None and not any(
        getattr(config, n, None) is not None for n in ("image_token_id", "image_token_index")
    )  # two towers, and no text with images in it
    if dual and "input_ids" in given:  # such a text is pooled at its end
        end = getattr(getattr(config, "text_config", config), "eos_token_id", None)
        last = real & ~real.roll(-1, 1) if not left else torch.arange(longest) == longest - 1
        given["input_ids"] = given["input_ids"].masked_fill(last, end) if isinstance(end, int) else ids
    if dual and "pixel_values" in takes and "pixel_values" not in given:
        given["pixel_values"] = _image(config.vision_config, rows, make)
    if "input_ids" in given and "bbox" in takes:
        corner = torch.randint(0, 90, (rows, longest, 2), generator=make)
        given["bbox"] = torch.cat((corner, corner + 9), -1)
    if "use_cache" in takes:
        given["use_cache"] = False
    return given
