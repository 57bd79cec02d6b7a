"""Random tiny Hugging Face models: decoders of every rope kind, encoders, experts; unmodified classes, sizes of ours."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
import zoo

VOCABULARY = 60
_TOKENS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def ropes(size: int) -> dict[str, dict[str, Any]]:
    """Every kind of rotary positions that transformers has, for heads of this size."""
    half, near = size // 2, dict(original_max_position_embeddings=16)
    return {
        "default": {},
        "linear": dict(factor=2.0),
        "dynamic": dict(factor=2.0),
        "yarn": dict(factor=4.0, **near),
        "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **near),
        "longrope": dict(short_factor=[1.0] * half, long_factor=[2.0] * half, factor=4.0,
                         original_max_position_embeddings=6),
    }  # fmt: skip


def _sizes(draw: random.Random) -> dict[str, Any]:
    heads = draw.choice((1, 2, 4))
    size = draw.choice((8, 8, 16, 24, 64, 96))
    return dict(
        **_TOKENS, hidden_size=8 * heads, intermediate_size=draw.choice((20, 48)), num_attention_heads=heads,
        num_key_value_heads=draw.choice([k for k in (1, 2, 4) if heads % k == 0]), head_dim=size,
        num_hidden_layers=draw.choice((1, 2)), max_position_embeddings=64,
    )  # fmt: skip


def _llama(draw):
    sizes = _sizes(draw)
    kind = draw.choice(list(ropes(8)))
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ropes(sizes["head_dim"])[kind]}
    return f"llama {kind}", hf.LlamaForCausalLM(hf.LlamaConfig(
        **sizes, rope_parameters=rope, hidden_act=draw.choice(("silu", "gelu", "relu")),
        attention_bias=draw.random() < 0.5, mlp_bias=draw.random() < 0.5, tie_word_embeddings=draw.random() < 0.5,
    ))  # fmt: skip


def _windowed(draw):
    sizes = {**_sizes(draw), "num_hidden_layers": 2}
    kinds = ["sliding_attention", "full_attention"]
    name = draw.choice(("mistral", "qwen3", "gemma2", "gemma3"))
    if name == "mistral":
        return name, hf.MistralForCausalLM(hf.MistralConfig(**sizes, sliding_window=4))
    if name == "qwen3":
        config = hf.Qwen3Config(**sizes, use_sliding_window=True, sliding_window=4, layer_types=kinds)
        return name, hf.Qwen3ForCausalLM(config)
    own = dict(query_pre_attn_scalar=8, sliding_window=4, layer_types=kinds)
    if name == "gemma2":
        return name, hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes, **own, attn_implementation="eager"))
    return name, hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes, **own))


def _old_decoder(draw):
    heads = draw.choice((1, 2, 4))
    name = draw.choice(("gpt2", "opt", "gpt_neox"))
    act = draw.choice(("relu", "gelu"))
    if name == "gpt2":
        return name, hf.GPT2LMHeadModel(hf.GPT2Config(**_TOKENS, n_embd=8 * heads, n_inner=20, n_head=heads, n_layer=1,
                                                      n_positions=64, activation_function=act))  # fmt: skip
    if name == "opt":
        return name, hf.OPTForCausalLM(hf.OPTConfig(
            **_TOKENS, hidden_size=8 * heads, word_embed_proj_dim=8 * heads, ffn_dim=20, num_attention_heads=heads,
            num_hidden_layers=1, max_position_embeddings=64, activation_function=act))  # fmt: skip
    return name, hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(
        **_TOKENS, hidden_size=16 * heads, intermediate_size=48, num_attention_heads=heads, num_hidden_layers=1,
        max_position_embeddings=64, hidden_act=act, use_parallel_residual=draw.random() < 0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}))  # fmt: skip


def _encoder(draw):
    heads = draw.choice((1, 2, 4))
    sizes = dict(hidden_size=8 * heads, intermediate_size=draw.choice((20, 48)), num_attention_heads=heads,
                 num_hidden_layers=draw.choice((1, 2)), max_position_embeddings=64)  # fmt: skip
    name = draw.choice(("bert", "roberta", "modernbert"))
    if name == "modernbert":
        kinds = ["full_attention", "sliding_attention"][: sizes["num_hidden_layers"]]
        return name, hf.ModernBertModel(hf.ModernBertConfig(
            **_TOKENS, **sizes, cls_token_id=1, sep_token_id=2, local_attention=4, layer_types=kinds))  # fmt: skip
    act = draw.choice(("relu", "gelu"))
    kind, config = {"bert": (hf.BertModel, hf.BertConfig), "roberta": (hf.RobertaModel, hf.RobertaConfig)}[
        name
    ]
    return name, kind(config(vocab_size=VOCABULARY, pad_token_id=0, hidden_act=act, **sizes))


def _experts(draw):
    sizes = {**_sizes(draw), "num_hidden_layers": 1}
    return "mixtral", hf.MixtralForCausalLM(
        hf.MixtralConfig(**sizes, num_local_experts=3, num_experts_per_tok=2)
    )


KINDS: tuple[Callable[[random.Random], tuple[str, torch.nn.Module]], ...] = (
    _llama,
    _encoder,
    _windowed,
    _old_decoder,
    _experts,
)
ENCODERS = ("bert", "roberta", "modernbert")


def model(draw: random.Random, number: int) -> tuple[str, torch.nn.Module]:
    """A model in eval mode and what to call it. number: of the kind, so that each has its turn; two in six are Llamas."""
    torch.manual_seed(draw.randrange(1 << 30))
    name, made = KINDS[number % 6 % 5](draw)
    zoo.spread(made)
    return name, made.eval().requires_grad_(False)
