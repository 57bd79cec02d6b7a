"""Random tiny Hugging Face models, one per architecture, with what a reader of their graph should find.

The classes are unmodified; only the sizes and the weights are ours. Sizes differ from one another (batch
3, sequence 12, width 32, 4 heads of 8, 2 KV heads, MLP 48, vocabulary 96), so that a mixed-up dimension is
an error and not a coincidence. Weights are drawn wide enough that attention is far from uniform: with the
small default spread a token that sees what it must not see would hardly change.

    model, inputs = zoo.ZOO["llama"].build()
    model, inputs = zoo.ZOO["llama"].build(attention="eager")   # matmul + softmax instead of SDPA
"""

from __future__ import annotations

import transformers as hf
from zoo_entry import (
    DECODER,
    ENCODER,
    IMAGE_TOKEN,
    LENGTHS,
    SEED,
    TOKENS,
    WIDTH,
    WINDOW,
    ZOO,
    Entry,
    Inputs,
    add,
    pixels,
    spread,
    tokens,
)  # fmt: skip
from zoo_images import BESIDE

__all__ = ["BESIDE", "DECODER", "ENCODER", "IMAGE_TOKEN", "LENGTHS", "SEED", "TEXT", "TOKENS", "WIDTH", "WINDOW", "ZOO",
           "Entry", "Inputs", "spread", "tokens"]  # fmt: skip

# Decoders with rotary positions and RMS norms.
add(
    "llama",
    lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, num_key_value_heads=2)),
    "llama",
    kv_heads=2,
)
add(
    "llama_reglu",
    lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, num_key_value_heads=2, hidden_act="relu")),
    "llama",
    kv_heads=2,
    activation="relu",
)
add(
    "mistral",
    lambda: hf.MistralForCausalLM(
        hf.MistralConfig(**DECODER, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW)
    ),
    "mistral",
    kv_heads=2,
    windows=(WINDOW, WINDOW),
)
add(
    "qwen2",
    lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER, num_key_value_heads=2)),
    "qwen2",
    kv_heads=2,
)
add(
    "qwen3",
    lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, num_key_value_heads=2, head_dim=8)),
    "qwen3",
    kv_heads=2,
)
add(
    "gemma2",
    lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **DECODER,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            attn_implementation="eager",  # the implementation its soft-cap needs
        )
    ),
    "gemma2",
    kv_heads=2,
    activation="gelu_tanh",
    windows=(WINDOW, None),
    softcap=True,
)
add(
    "gemma3",
    lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **DECODER,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "gemma3_text",
    kv_heads=2,
    activation="gelu_tanh",
    windows=(WINDOW, None),
)
add(
    "phi3",
    lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**DECODER, num_key_value_heads=2)),
    "phi3",
    kv_heads=2,
    fused_qkv=True,
)
add(
    "arcee",
    lambda: hf.ArceeForCausalLM(hf.ArceeConfig(**DECODER, num_key_value_heads=2, head_dim=8)),
    "arcee",
    kv_heads=2,
    gated=False,
    activation="relu2",
)

# Decoders with layer norms.
add(
    "gpt2",
    lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**TOKENS, n_embd=32, n_inner=48, n_head=4, n_layer=2, n_positions=64)
    ),
    "gpt2",
    gated=False,
    activation="gelu_new",
    norm="layer",
    positions="learned",
    fused_qkv=True,
)
add(
    "opt",
    lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            **TOKENS,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=64,
        )
    ),
    "opt",
    gated=False,
    activation="relu",
    norm="layer",
    positions="learned",
)
add(
    "gpt_neox",
    lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**DECODER)),
    "gpt_neox",
    gated=False,
    activation="gelu",
    norm="layer",
    fused_qkv=True,
)
add(
    "bloom",
    lambda: hf.BloomForCausalLM(hf.BloomConfig(**TOKENS, hidden_size=32, n_head=4, n_layer=2)),
    "bloom",
    gated=False,
    activation="gelu_new",
    norm="layer",
    positions="alibi",
    fused_qkv=True,
)
add(
    "mpt",
    lambda: hf.MptForCausalLM(
        hf.MptConfig(**TOKENS, d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=64)
    ),
    "mpt",
    gated=False,
    activation="gelu",
    norm="layer",
    positions="alibi",
    fused_qkv=True,
)

# Encoders.
add(
    "bert",
    lambda: hf.BertModel(hf.BertConfig(**ENCODER, **WIDTH)),
    "bert",
    causal=False,
    gated=False,
    activation="gelu",
    norm="layer",
    positions="learned",
)
add(
    "distilbert",
    lambda: hf.DistilBertModel(hf.DistilBertConfig(**ENCODER, dim=32, hidden_dim=48, n_heads=4, n_layers=2)),
    "distilbert",
    causal=False,
    gated=False,
    activation="gelu",
    norm="layer",
    positions="learned",
)
add(
    "roberta",
    lambda: hf.RobertaModel(hf.RobertaConfig(**ENCODER, **WIDTH)),
    "roberta",
    causal=False,
    gated=False,
    activation="gelu",
    norm="layer",
    positions="counted",
)
add(
    "modernbert",
    lambda: hf.ModernBertModel(
        hf.ModernBertConfig(
            **DECODER,
            cls_token_id=1,
            sep_token_id=2,
            local_attention=WINDOW,  # half of it to each side
            layer_types=["full_attention", "sliding_attention"],
        )
    ),
    "modernbert",
    causal=False,
    activation="gelu",
    norm="layer",
    fused_qkv=True,
    windows=(None, WINDOW),
)
add(
    "t5_encoder",
    lambda: hf.T5EncoderModel(
        hf.T5Config(
            vocab_size=96,
            pad_token_id=0,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_heads=4,
            num_layers=2,
            use_cache=False,
        )
    ),
    "t5",
    causal=False,
    gated=False,
    activation="relu",
    positions="bias",
)
add(
    "vit",
    lambda: hf.ViTModel(hf.ViTConfig(**WIDTH, image_size=16, patch_size=4)),
    "vit",
    causal=False,
    gated=False,
    activation="gelu",
    norm="layer",
    positions="learned",
    inputs=pixels,
)

TEXT = tuple(name for name, entry in ZOO.items() if entry.inputs is tokens)
"""Models that take `input_ids` and `attention_mask` and nothing else."""
