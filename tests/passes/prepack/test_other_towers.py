"""Packing one padded tower of a model with several: the others run as they were, and cross attention reads rows."""

import pytest
import torch
import transformers as hf

import thresher
from thresher.errors import NothingRewrittenError

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(vocab_size=64, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=3)
ENCODER_DECODER = dict(
    vocab_size=64, pad_token_id=0, decoder_start_token_id=0, bos_token_id=1, eos_token_id=3
)


def t5():
    return hf.T5ForConditionalGeneration(
        hf.T5Config(**ENCODER_DECODER, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )


def bart():
    return hf.BartForConditionalGeneration(
        hf.BartConfig(**ENCODER_DECODER, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=48,
                      decoder_ffn_dim=48, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32)
    )  # fmt: skip


def clip():
    return hf.CLIPModel(
        hf.CLIPConfig(
            text_config=SIZES | TEXT,
            vision_config=dict(SIZES, image_size=16, patch_size=8),
            projection_dim=16,
        )
    )


def batch(side="right"):
    real = torch.arange(9) < torch.tensor((9, 4, 2))[:, None]
    mask = (real if side == "right" else real.flip(1)).long()
    return {
        "input_ids": torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(0)) * mask,
        "attention_mask": mask,
    }


def more(model, width):
    made = torch.Generator().manual_seed(1)
    if isinstance(model, hf.CLIPModel):
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=made)}
    return {"decoder_input_ids": torch.randint(4, 60, (3, width), generator=made), "use_cache": False}


def compiled(model, given, recipe=None, **options):
    torch._dynamo.reset()
    return thresher.compile(model, given, recipe or {"prepack": True}, target="reference", **options)


FURTHER = [(t5, 5, "right"), (t5, 5, "left"), (t5, 9, "right"), (bart, 4, "left"), (clip, 0, "left")]


@pytest.mark.parametrize(
    "make, width, side",
    [
        (t5, 9, "left"), (bart, 4, "right"), (clip, 0, "right"),
        *(pytest.param(*case, marks=pytest.mark.thorough) for case in FURTHER),
    ],
)  # fmt: skip
def test_the_padded_tower_is_packed_by_its_own_mask(make, width, side):
    torch.manual_seed(0)
    model = make().eval()
    given = batch(side) | more(model, width)
    fast = compiled(model, given, dynamic=True)
    assert fast.report["prepack"].rewritten and sum(c.packed for c in fast.counters) == 1
    with torch.no_grad():
        wanted, got = model(**given), fast(**given)
    for name in ("logits", "text_embeds", "image_embeds", "logits_per_image"):
        if name in wanted:
            if make is clip and side == "left" and name != "image_embeds":
                continue  # CLIP pools where the end of text is, which is a pad here
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5)
    body = next(s for s in fast.sessions if s.program.packing).program
    assert body.nodes(torch.ops.thresher.varlen_attention.default) or body.nodes(
        torch.ops.thresher.varlen_attention_masked.default
    )


class Reads(torch.nn.Module):
    """A decoder layer that reads an encoder; `hides`: whether its cross attention hides the encoder's pads."""

    def __init__(self, hides):
        super().__init__()
        self.hides = hides
        self.words, self.q, self.kv, self.own = (
            torch.nn.Embedding(64, 16),
            *(torch.nn.Linear(16, 16) for _ in range(3)),
        )

    def forward(self, input_ids, attention_mask, decoder_input_ids):
        def heads(x):
            return x.unflatten(-1, (2, 8)).transpose(1, 2)

        attend = torch.nn.functional.scaled_dot_product_attention
        mask = (attention_mask != 0)[:, None, None]
        x = self.own(self.words(input_ids))
        x = x + attend(heads(x), heads(x), heads(x), mask).transpose(1, 2).flatten(2)
        q, k = heads(self.q(self.words(decoder_input_ids))), heads(self.kv(x))
        return attend(q, k, k, mask if self.hides else None).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("hides", [True, False])
def test_cross_attention_that_sees_pads_keeps_the_encoder_padded(hides):
    torch.manual_seed(0)
    model, given = Reads(hides).eval(), batch()
    given["decoder_input_ids"] = torch.randint(4, 60, (3, 5))
    if not hides:
        with pytest.raises(NothingRewrittenError, match="attends for, or over, other tokens"):
            compiled(model, given)
        return
    fast = compiled(model, given)
    assert fast.report["prepack"].rewritten
    with torch.no_grad():
        torch.testing.assert_close(fast(**given), model(**given), rtol=1e-4, atol=1e-5)


def test_passes_behind_a_packed_tower_would_not_reach_the_other():
    torch.manual_seed(0)
    model = t5().eval()
    recipe = {"prepack": True, "nvfp4": {"min_weights": 0, "keep": [], "budget": 9.0}, "min_gain": 0.0}
    report = compiled(model, batch() | more(model, 5), recipe).report
    assert (
        "another tower" in report["prepack"].missed[0].reason
        and "nvfp4" in report["prepack"].missed[0].reason
    )
    assert any("decoder" in site for site in report["nvfp4"].rewritten) and report["nvfp4"].coverage == 1.0
