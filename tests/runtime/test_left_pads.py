"""A pooler that reads the end of a row where its pads are reads a pad: said once, at the call."""

import warnings

import pytest
import torch
import transformers as hf

import thresher

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
             max_position_embeddings=32)  # fmt: skip


def batch(left):
    real = torch.arange(8) < torch.tensor((8, 5, 3))[:, None]
    real = real.flip(1) if left else real
    return {"input_ids": torch.randint(4, 60, real.shape) * real, "attention_mask": real.long()}


def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():
            call()
    return [str(w.message) for w in caught if "takes a result from" in str(w.message)]


@pytest.mark.parametrize("pools", [True, False])
def test_left_padding_under_a_pooler_is_said_once(pools):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = hf.BertModel(hf.BertConfig(**SIZES), add_pooling_layer=pools).eval()
    fast = thresher.compile(model, batch(False), {"prepack": True}, target="reference")
    assert not said(lambda: fast(**batch(False)))
    first = said(lambda: fast(**batch(True)))
    assert len(first) == int(pools) and all("attention_mask[:, 0] is 0" in s for s in first)
    assert not said(lambda: fast(**batch(True)))


def test_right_padding_under_a_pooler_of_the_last_position_is_said_once():
    """SigLIP's text model takes the last position, whatever it holds."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    sizes = {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = hf.SiglipTextModel(hf.SiglipTextConfig(**sizes, projection_size=32)).eval()
    made = []  # batches that a rewrite is proven on are no caller's
    assert not said(
        lambda: made.append(thresher.compile(model, batch(True), {"prepack": True}, target="reference"))
    )
    fast = made[0]
    assert fast.report["prepack"].rewritten and not said(lambda: fast(**batch(True)))
    first = said(lambda: fast(**batch(False)))
    assert (
        len(first) == 1 and "attention_mask[:, -1] is 0" in first[0] and "padding_side = 'left'" in first[0]
    )
    assert not said(lambda: fast(**batch(False)))
