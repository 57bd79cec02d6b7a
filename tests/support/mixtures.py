"""Tiny random mixtures of experts of transformers, and a padded batch for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

_SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, head_dim=16,
              num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
_LATENT = dict(kv_lora_rank=32, q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM, dict(num_local_experts=4)),
    "qwen3_moe": (hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM,
                  dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)),
    "gpt_oss": (hf.GptOssConfig, hf.GptOssForCausalLM, dict(num_local_experts=4, num_experts_per_tok=2,
                sliding_window=8, layer_types=["full_attention"],
                rope_parameters={"rope_type": "default", "rope_theta": 1e4})),
    "deepseek_v3": (hf.DeepseekV3Config, hf.DeepseekV3ForCausalLM,
                    dict(_LATENT, head_dim=None, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4,
                         n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=0, n_group=2, topk_group=1)),
    "llama4": (hf.Llama4TextConfig, hf.Llama4ForCausalLM,
               dict(intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1,
                    attention_chunk_size=16)),
}  # fmt: skip


def build(kind: str, experts: str | None = None, **changed: Any) -> torch.nn.Module:
    """A random model in eval mode. experts: transformers' `experts_implementation`, None for its default. changed: of
    its config."""
    torch.manual_seed(0)
    config, model_class, more = KINDS[kind]
    given = {k: v for k, v in {**_SIZES, **more, **changed}.items() if v is not None}
    model = model_class(config(**given)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.normal_(0, 1.0 if "embed" in name else p.shape[-1] ** -0.5)
            elif "bias" in name:
                p.normal_(0, 0.1)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model


def batch(lengths: tuple[int, ...] = (13, 9, 5)) -> dict[str, torch.Tensor]:
    """Right-padded ids and their mask."""
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": torch.randint(4, 64, real.shape) * real,
        "attention_mask": real.long(),
        "use_cache": False,
    }
