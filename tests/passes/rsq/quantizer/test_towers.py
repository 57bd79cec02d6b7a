"""Quantizing models that read several sequences: each linear counts the real tokens of its own sequence."""

import pytest
import torch
import transformers as hf
from sampled import sampled

import thresher

T5 = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4, pad_token_id=0,
          decoder_start_token_id=0, feed_forward_proj="gated-gelu")  # fmt: skip
CLIP = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)


def t5(width):
    return hf.T5ForConditionalGeneration(hf.T5Config(**T5)), {
        "decoder_input_ids": torch.randint(4, 60, (3, width)),
        "decoder_attention_mask": (torch.arange(width) < torch.tensor((width, 3, 4))[:, None]).long(),
    }


def clip():
    config = hf.CLIPConfig(text_config=dict(CLIP, vocab_size=64, max_position_embeddings=16, eos_token_id=3, bos_token_id=1,
                                            pad_token_id=0),
                           vision_config=dict(CLIP, image_size=16, patch_size=8), projection_dim=16)  # fmt: skip
    return hf.CLIPModel(config), {"pixel_values": torch.randn(3, 3, 16, 16)}


MODELS = {"t5": lambda: t5(5), "t5 of equal lengths": lambda: t5(9), "clip": clip}


@pytest.mark.parametrize("name", sampled(["t5 of equal lengths", "clip"], list(MODELS)))
def test_pads_of_no_tower_count_in_any(name):
    torch.manual_seed(0)
    model, more = MODELS[name]()
    mask = (torch.arange(9) < torch.tensor((9, 4, 6))[:, None]).long()
    given = {"input_ids": torch.randint(4, 60, (3, 9)), "attention_mask": mask, **more}
    others = dict(given)
    for name in [n for n in given if n.endswith("input_ids")]:
        hidden = given[name.replace("input_ids", "attention_mask")] == 0
        others[name] = torch.where(hidden, torch.randint(4, 60, hidden.shape), given[name])
    found = [
        thresher.quantize(model.eval(), [b], thresher.RSQ(bits=4, group_size=-1)) for b in (given, others)
    ]
    first, second = (f.statistics["rsq"] for f in found)
    assert len(first) > 10 and first.keys() == second.keys()
    for site, tensors in first.items():
        for part, tensor in tensors.items():
            assert torch.equal(tensor, second[site][part]), (site, part)
