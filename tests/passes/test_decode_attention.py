"""Decoding over a padded cache: keys that the mask hides are not read, and nothing else changes."""

import leniently
import pytest
import tiny_llama
import torch
import zoo

import thresher
from thresher import sessions

RECIPE = {"target": "reference", "prepack": True, "decode_attention": True}


def decode(call, inputs, steps):
    mask, logits = inputs["attention_mask"], []
    with torch.no_grad():
        out = call(**inputs, use_cache=True)
        for _ in range(steps):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            positions = mask.sum(1, keepdim=True) - 1
            out = call(input_ids=out.logits[:, -1:].argmax(-1), attention_mask=mask, position_ids=positions,
                       past_key_values=out.past_key_values, use_cache=True)  # fmt: skip
            logits.append(out.logits)
    return torch.cat(logits, 1)


def test_decoding_equals_the_model():
    torch._dynamo.reset()
    model, inputs = zoo.ZOO["llama"].build()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)  # left-padded, as decoders are
    fast = torch.compile(model, backend="thresher", options=RECIPE, dynamic=True)
    torch.testing.assert_close(decode(fast, inputs, 3), decode(model, inputs, 3), rtol=1e-4, atol=1e-5)
    last = sessions.recent()[-1]
    assert (
        len(last.report["decode_attention"].rewritten) == 2 and last.report["decode_attention"].error < 1e-5
    )


class Attend(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def given(rows, **changed):
    make = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 4, 1, 8), "k": (2, 2, 9, 8), "v": (2, 2, 9, 8)}
    found = {n: torch.randn(s, generator=make) for n, s in shapes.items()}
    found["mask"] = torch.arange(9).expand(rows, 1, 1, 9) >= torch.tensor([4, 0])[:rows, None, None, None]
    return {**found, **changed}


@pytest.mark.parametrize("rows", [1, 2])
def test_one_mask_for_all_rows_and_hidden_values_that_are_no_numbers(rows):
    inputs = given(rows)
    expected = Attend().eval()(**inputs)
    fast = leniently.compile(Attend().eval(), inputs, decode_attention=True, dynamic=False)
    assert len(fast.report["decode_attention"].rewritten) == 1
    torch.testing.assert_close(fast(**inputs), expected, rtol=1e-5, atol=1e-6)
    inputs["k"][0, :, :4], inputs["v"][0, :, :4] = float("nan"), float("inf")  # a row's pads
    torch.testing.assert_close(fast(**inputs)[0], expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mask": torch.zeros(2, 1, 1, 9)}, "added to the scores"),
        ({"mask": torch.ones(2, 4, 1, 9, dtype=torch.bool)}, "differs between heads"),
        ({"q": torch.randn(2, 4, 3, 8), "mask": torch.ones(2, 1, 3, 9, dtype=torch.bool)}, None),
    ],
)
def test_other_attentions_stay(changed, said):
    inputs = given(2, **changed)
    fast = leniently.compile(Attend().eval(), inputs, decode_attention=True, dynamic=False)
    report = fast.report["decode_attention"]
    assert not report.rewritten and [said in m.reason for m in report.missed] == ([True] if said else [])
    torch.testing.assert_close(fast(**inputs), Attend().eval()(**inputs))


def test_weights_of_a_step_are_rounded_too(tmp_path):
    """Whoever looks for a decoder's layers comes before their attention is made unlike PyTorch's."""
    model = tiny_llama.make(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    batch = {
        "input_ids": tiny_llama.prompt(tokens=12, span=None),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
    }
    thresher.quantize(model, [batch], thresher.RSQ(bits=4, method="nearest")).save(
        tmp_path / "codes.safetensors"
    )
    options = {"rsq": {"budget": 10.0}, "stats": str(tmp_path / "codes.safetensors"), "verify": False}
    fast = thresher.compile(model, batch, "exact", target="reference", **options)
    fast.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    step = sessions.recent()[-1].report
    assert len(step["decode_attention"].rewritten) == 2 and len(step["rsq"].rewritten) == 14
