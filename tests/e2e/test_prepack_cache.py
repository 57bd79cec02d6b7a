"""A packed prefill returns a KV cache that goes on: greedy decoding equals the padded model's."""

import copy

import leniently
import masks
import pytest
import torch
import zoo

import thresher
from thresher.tools import models


def greedy(model, prefill, inputs, steps):
    """Token ids [rows, steps], from the last real token of each row, and the cache after them."""
    mask = inputs["attention_mask"]
    rows = torch.arange(mask.shape[0])
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)  # of each row, wherever its padding is
    result = prefill(**inputs, use_cache=True)
    cache, token, chosen = result.past_key_values, result.logits[rows, last].argmax(-1), []
    position = mask.sum(1)
    for _ in range(steps):
        chosen.append(token)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
        with torch.no_grad():
            result = model(input_ids=token[:, None], attention_mask=mask, position_ids=position[:, None],
                           past_key_values=cache, use_cache=True)  # fmt: skip
        token, position = result.logits[:, -1].argmax(-1), position + 1
    return torch.stack(chosen, 1), cache


def positions(mask):
    """As `generate` numbers them: from the first real token."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.thorough), "gpt2"])
def test_twenty_steps_after_a_packed_prefill_equal_the_padded_model(name):
    model, _ = zoo.ZOO[name].build()
    torch._dynamo.reset()
    ours = None
    for side in (masks.left, masks.right, masks.mixed):
        inputs = zoo.tokens(side((5, 12, 1)))
        inputs["position_ids"] = positions(inputs["attention_mask"])
        if ours is None:
            ours = thresher.compile(model, {**inputs, "use_cache": True}, target="reference", verify=False)
        with torch.no_grad():
            expected, _ = greedy(model, model, inputs, 20)
        actual, cache = greedy(model, ours, inputs, 20)
        assert torch.equal(actual, expected)
        assert cache.layers[0].keys.shape[2] == 12 + 20
    assert ours.counters[0].packed == 4


@pytest.mark.slow
def test_decoding_may_go_through_the_compiled_model_too():
    """A call with a cache is not a prefill: it runs as it was, and the tokens are the same."""
    model, _ = zoo.ZOO["llama"].build()
    inputs = zoo.tokens(masks.left((5, 12, 3)))
    inputs["position_ids"] = positions(inputs["attention_mask"])
    torch._dynamo.reset()
    ours = torch.compile(model, backend="thresher", options={"prepack": True, "target": "reference"})
    with pytest.warns(thresher.ThresherWarning, match="rewrote nothing"), torch.no_grad():
        actual, _ = greedy(lambda **k: ours(**k), ours, inputs, 4)
    with torch.no_grad():
        expected, _ = greedy(model, model, inputs, 4)
    assert torch.equal(actual, expected)


def test_explicit_positions_are_gathered_and_not_renumbered():
    """Positions that start anywhere and jump: the packed model sees each token's own."""
    model, _ = zoo.ZOO["llama"].build()
    mask = masks.holed((5, 9, 12))
    inputs = zoo.tokens(mask)
    inputs["position_ids"] = torch.arange(12).expand(3, 12) * 2 + torch.tensor([[3], [0], [7]])
    torch._dynamo.reset()
    ours = thresher.compile(model, inputs, target="reference", verify=False)
    with torch.no_grad():
        expected = model(**inputs)
    real = mask.bool()
    assert ours.counters[0].packed == 1
    torch.testing.assert_close(ours(**inputs).logits[real], expected.logits[real], atol=2e-5, rtol=1e-5)


def test_hidden_states_of_every_layer_come_back_padded():
    model, _ = zoo.ZOO["llama"].build()
    mask = masks.mixed((5, 9, 12))
    inputs = {**zoo.tokens(mask), "output_hidden_states": True}
    torch._dynamo.reset()
    ours = thresher.compile(model, inputs, target="reference", verify=False)
    with torch.no_grad():
        expected = model(**inputs)
    actual = ours(**inputs)
    assert ours.counters[0].packed == 2 and len(actual.hidden_states) == len(expected.hidden_states) == 3
    for a, e in zip(actual.hidden_states, expected.hidden_states):
        torch.testing.assert_close(a[mask.bool()], e[mask.bool()], atol=2e-5, rtol=1e-5)


def test_attention_maps_are_declined():
    model, _ = zoo.ZOO["llama"].build(attention="eager")
    inputs = {**zoo.tokens(), "output_attentions": True}
    torch._dynamo.reset()
    with pytest.warns(thresher.ThresherWarning):
        ours = leniently.compile(model, inputs)
    (miss,) = ours.report["prepack"].missed
    assert miss.reason.endswith(".")
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).attentions[0], model(**inputs).attentions[0])


class LastToken(torch.nn.Module):
    """What a caller who wants the next token writes."""

    def __init__(self, model, by_length):
        super().__init__()
        self.model, self.by_length = model, by_length

    def forward(self, input_ids, attention_mask):
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        if not self.by_length:
            return logits[:, -1]
        return logits[torch.arange(logits.shape[0]), attention_mask.sum(1) - 1]


@pytest.mark.parametrize("by_length", [False, True])
def test_the_head_runs_on_the_positions_that_are_read(by_length):
    model, _ = zoo.ZOO["llama"].build()
    inputs = zoo.tokens((masks.right if by_length else masks.left)((5, 9, 12)))
    reader = LastToken(model, by_length).eval()
    torch._dynamo.reset()
    ours = thresher.compile(reader, inputs, target="reference")
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs), reader(**inputs), atol=2e-5, rtol=1e-5)
    layout = ours.sessions[0].program.packing
    heads = [n for n in layout.epilogue.nodes(torch.ops.aten.linear.default)]
    assert [tuple(n.meta["val"].shape) for n in heads] == [(3, 96)]
    assert ours.counters[0].packed == 2


def test_logits_to_keep_leaves_the_head_one_row_each():
    model, _ = zoo.ZOO["llama"].build()
    inputs = {**zoo.tokens(masks.left((5, 9, 12))), "logits_to_keep": 1}
    torch._dynamo.reset()
    ours = thresher.compile(model, inputs, target="reference")
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, model(**inputs).logits, atol=2e-5, rtol=1e-5)
    assert ours.counters[0].packed == 2


@pytest.mark.slow
def test_smollm2_continues_from_a_packed_prefill():
    try:
        model, tokenizer = models.smollm2()
    except Exception as reason:
        pytest.skip(f"SmolLM2 cannot be had here: {reason}")
    # of 30 layers alike, six do; test_nvfp4 compiles all
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:6], 6
    batch = models.mixed_length_batch(tokenizer, 4, max_len=48)
    lengths = batch["attention_mask"].sum(1).tolist()
    torch._dynamo.reset()
    ours = None
    for side in (masks.left, masks.right):
        mask = side(lengths)
        ids = torch.zeros_like(mask)
        ids[mask.bool()] = batch["input_ids"][batch["attention_mask"].bool()]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
        if ours is None:
            example = {**inputs, "use_cache": True}
            ours = thresher.compile(model, example, target="reference", verify=False)
        packed = ours.counters[0].packed
        with torch.no_grad():
            expected, _ = greedy(model, model, copy.copy(inputs), 20)
        assert expected.unique().numel() > 8  # else it would say little that the tokens are equal
        actual, _ = greedy(model, ours, inputs, 20)
        assert ours.counters[0].packed > packed
        assert torch.equal(actual, expected)
