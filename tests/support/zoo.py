"""Random tiny Hugging Face models, one per architecture, with what a reader of their graph should find.

The classes are unmodified; only the sizes and the weights are ours. Sizes differ from one another (batch
3, sequence 12, width 32, 4 heads of 8, 2 KV heads, MLP 48, vocabulary 96), so that a mixed-up dimension is
an error and not a coincidence. Weights are drawn wide enough that attention is far from uniform: with the
small default spread a token that sees what it must not see would hardly change.

    model, inputs = zoo.ZOO["llama"].build()
    model, inputs = zoo.ZOO["llama"].build(attention="eager")   # matmul + softmax instead of SDPA
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import masks
import torch
import transformers as hf

SEED = 7
LENGTHS = (5, 8, 12)
WINDOW = 8  # LENGTHS has one row below it, one equal and one above
IMAGE_TOKEN = 90
_TOKENS = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_WIDTH = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2)
_DECODER = dict(**_TOKENS, **_WIDTH, max_position_embeddings=64)
_ENCODER = dict(vocab_size=96, pad_token_id=0, max_position_embeddings=64)

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """One model and the facts about it that structure recovery must find.

    Attributes:
        make: builds the model, without arguments.
        inputs: builds keyword arguments for its forward.
        family: the transformers `model_type`.
        causal: a token sees no later token.
        attention, mlp: number of sites in the graph, all towers together.
        gated: the MLP multiplies two projections.
        activation: `relu`, `relu2`, `gelu`, `gelu_tanh` (as one op), `gelu_new` (tanh spelled out), `silu`.
        norm: `rms` or `layer`.
        positions: `rope`, `learned`, `counted` (learned, at the number of tokens so far that are not the pad
            token), `alibi` or `bias` (T5's relative bias).
        kv_heads: fewer than the 4 query heads means grouped-query attention.
        fused_qkv: one linear makes q, k and v.
        windows: per attention site, the sliding window in tokens, or None.
        softcap: attention logits go through tanh.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    inputs: Callable[[], Inputs]
    family: str
    causal: bool
    attention: int
    mlp: int
    gated: bool
    activation: str
    norm: str
    positions: str
    kv_heads: int
    fused_qkv: bool
    windows: tuple[int | None, ...]
    softcap: bool

    def build(self, attention: str | None = None) -> tuple[torch.nn.Module, Inputs]:
        """The model in eval mode and example inputs; the same call gives the same numbers."""
        torch.manual_seed(SEED)
        model = self.make()
        if attention is not None:
            model.set_attn_implementation(attention)
        spread(model)
        return model.eval(), self.inputs()


def spread(model: torch.nn.Module) -> None:
    """Weights at which signals keep their size: matrices by fan-in, the rest near where it was."""
    rng = torch.Generator().manual_seed(SEED)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if id(parameter) in embeddings:
                parameter.copy_(noise)
            elif parameter.dim() >= 2:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)


def tokens(mask: torch.Tensor | None = None) -> Inputs:
    """`input_ids` and `attention_mask`, int64 `[3, 12]`, padded on the right unless a mask is given."""
    mask = masks.right(LENGTHS) if mask is None else mask
    rng = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, IMAGE_TOKEN, mask.shape, generator=rng)
    return {"input_ids": ids.masked_fill(~mask.bool(), 0), "attention_mask": mask}


def _pixels() -> Inputs:
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(SEED))}


ZOO: dict[str, Entry] = {}


def _add(
    name: str,
    make: Callable[[], torch.nn.Module],
    family: str,
    *,
    causal: bool = True,
    gated: bool = True,
    activation: str = "silu",
    norm: str = "rms",
    positions: str = "rope",
    kv_heads: int = 4,
    fused_qkv: bool = False,
    attention: int = 2,
    mlp: int = 2,
    windows: tuple[int | None, ...] | None = None,
    softcap: bool = False,
    inputs: Callable[[], Inputs] = tokens,
) -> None:
    sizes = (attention, mlp, gated, activation, norm, positions, kv_heads, fused_qkv)
    windows = (None,) * attention if windows is None else windows
    ZOO[name] = Entry(name, make, inputs, family, causal, *sizes, windows, softcap)


# Decoders with rotary positions and RMS norms.
_add(
    "llama",
    lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER, num_key_value_heads=2)),
    "llama",
    kv_heads=2,
)
_add(
    "llama_reglu",
    lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER, num_key_value_heads=2, hidden_act="relu")),
    "llama",
    kv_heads=2,
    activation="relu",
)
_add(
    "mistral",
    lambda: hf.MistralForCausalLM(
        hf.MistralConfig(**_DECODER, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW)
    ),
    "mistral",
    kv_heads=2,
    windows=(WINDOW, WINDOW),
)
_add(
    "qwen2",
    lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_DECODER, num_key_value_heads=2)),
    "qwen2",
    kv_heads=2,
)
_add(
    "qwen3",
    lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER, num_key_value_heads=2, head_dim=8)),
    "qwen3",
    kv_heads=2,
)
_add(
    "gemma2",
    lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **_DECODER,
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
_add(
    "gemma3",
    lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **_DECODER,
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
_add(
    "phi3",
    lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_DECODER, num_key_value_heads=2)),
    "phi3",
    kv_heads=2,
    fused_qkv=True,
)
_add(
    "arcee",
    lambda: hf.ArceeForCausalLM(hf.ArceeConfig(**_DECODER, num_key_value_heads=2, head_dim=8)),
    "arcee",
    kv_heads=2,
    gated=False,
    activation="relu2",
)

# Decoders with layer norms.
_add(
    "gpt2",
    lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**_TOKENS, n_embd=32, n_inner=48, n_head=4, n_layer=2, n_positions=64)
    ),
    "gpt2",
    gated=False,
    activation="gelu_new",
    norm="layer",
    positions="learned",
    fused_qkv=True,
)
_add(
    "opt",
    lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            **_TOKENS,
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
_add(
    "gpt_neox",
    lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_DECODER)),
    "gpt_neox",
    gated=False,
    activation="gelu",
    norm="layer",
    fused_qkv=True,
)
_add(
    "bloom",
    lambda: hf.BloomForCausalLM(hf.BloomConfig(**_TOKENS, hidden_size=32, n_head=4, n_layer=2)),
    "bloom",
    gated=False,
    activation="gelu_new",
    norm="layer",
    positions="alibi",
    fused_qkv=True,
)
_add(
    "mpt",
    lambda: hf.MptForCausalLM(
        hf.MptConfig(**_TOKENS, d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=64)
    ),
    "mpt",
    gated=False,
    activation="gelu",
    norm="layer",
    positions="alibi",
    fused_qkv=True,
)

# Encoders.
_add(
    "bert",
    lambda: hf.BertModel(hf.BertConfig(**_ENCODER, **_WIDTH)),
    "bert",
    causal=False,
    gated=False,
    activation="gelu",
    norm="layer",
    positions="learned",
)
_add(
    "distilbert",
    lambda: hf.DistilBertModel(hf.DistilBertConfig(**_ENCODER, dim=32, hidden_dim=48, n_heads=4, n_layers=2)),
    "distilbert",
    causal=False,
    gated=False,
    activation="gelu",
    norm="layer",
    positions="learned",
)
_add(
    "roberta",
    lambda: hf.RobertaModel(hf.RobertaConfig(**_ENCODER, **_WIDTH)),
    "roberta",
    causal=False,
    gated=False,
    activation="gelu",
    norm="layer",
    positions="counted",
)
_add(
    "modernbert",
    lambda: hf.ModernBertModel(
        hf.ModernBertConfig(
            **_DECODER,
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
_add(
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
_add(
    "vit",
    lambda: hf.ViTModel(hf.ViTConfig(**_WIDTH, image_size=16, patch_size=4)),
    "vit",
    causal=False,
    gated=False,
    activation="gelu",
    norm="layer",
    positions="learned",
    inputs=_pixels,
)


# Vision and language.
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
    text = hf.LlamaConfig(**_DECODER, num_key_value_heads=2)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    )


def _with_image(inputs: Inputs) -> Inputs:
    """Tokens 1 to 4 of every row stand for its image of 4 patches."""
    inputs["input_ids"][:, 1:5] = IMAGE_TOKEN
    return inputs


def _llava_inputs() -> Inputs:
    return {**_with_image(tokens()), **_pixels()}


def _qwen2_vl() -> torch.nn.Module:
    vision = dict(
        depth=1, embed_dim=24, hidden_size=32, num_heads=3, mlp_ratio=2, patch_size=4, temporal_patch_size=2
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = dict(**_DECODER, num_key_value_heads=2, rope_parameters=rope)
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


_add(
    "llava",
    _llava,
    "llava",
    kv_heads=2,
    attention=3,  # CLIP's last layer is not read: LLaVA takes the one before it
    mlp=3,
    inputs=_llava_inputs,
)
_add("qwen2_vl", _qwen2_vl, "qwen2_vl", kv_heads=2, attention=3, mlp=3, inputs=_qwen2_vl_inputs)

TEXT = tuple(name for name, entry in ZOO.items() if entry.inputs is tokens)
"""Models that take `input_ids` and `attention_mask` and nothing else."""


def _qwen2_5_vl() -> tuple[torch.nn.Module, Inputs]:
    """As Qwen2-VL, with the vision tower's window attention; its language model has the same graph."""
    vision = dict(
        depth=2, hidden_size=24, out_hidden_size=32, intermediate_size=40, num_heads=3, patch_size=4,
        temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1],
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = dict(**_DECODER, num_key_value_heads=2, rope_parameters=rope)
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
