"""Many calls, few programs: rows, lengths, padding, caches and modes share those that the first calls made."""

import torch
from tiny_llama import make, prompt
from transformers import DynamicCache

import thresher
from thresher.generation.programs import alike

GREEDY = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)


def batch(rows: int, tokens: int, pads: int) -> dict[str, torch.Tensor]:
    """Rows of which the first is padded on the left."""
    ids = prompt(rows, tokens, seed=rows * tokens, span=None)
    mask = torch.ones_like(ids)
    mask[0, :pads], ids[0, :pads] = 0, 0
    return dict(input_ids=ids, attention_mask=mask)


def test_mixed_calls_need_few_programs_and_make_none_after_the_tenth():
    """One row first, then many; unpadded first, then padded; transformers' two kinds of cache in turn."""
    model = make(num_hidden_layers=1)
    fast = thresher.compile(model, batch(2, 11, 4), target="reference")
    made = []
    for call in range(20):
        rows, tokens = (1, 3, 2, 5, 1)[call % 5], 6 + 3 * (call % 7)
        options: dict = {"cache_implementation": "static"} if call % 3 == 2 else {}
        if call % 4 == 3:
            options |= dict(num_beams=2, num_return_sequences=2)
        given = {**batch(rows, tokens, call % 2 * 2), **GREEDY, **options}
        out = fast.generate(**given)
        made.append(fast.last_call.programs)
        if call < 12 or call % 10 == 0:
            assert torch.equal(out, model.generate(**given)), (call, options)
    # a prompt of one row and, the first time, its step are programs of their own
    assert sum(made) <= 6 and not any(made[10:]), made


def test_calls_of_ones_own_share_programs_too():
    """With a cache of the caller's: one row behind many, and steps over caches of any length."""
    model = make(num_hidden_layers=1)
    fast = thresher.compile(model, batch(3, 9, 2), "none", target="reference")
    for rows, tokens in ((3, 12), (1, 7), (2, 20), (1, 5)):
        inputs = batch(rows, tokens, 1)
        past, expected = DynamicCache(), DynamicCache()
        with torch.no_grad():
            fast(**inputs, past_key_values=past)
            model(**inputs, past_key_values=expected)
            for step in range(2):
                mask = torch.nn.functional.pad(inputs["attention_mask"], (0, step + 1), value=1)
                given = dict(input_ids=torch.full((rows, 1), 5), attention_mask=mask)
                actual = fast(**given, past_key_values=past).logits
                torch.testing.assert_close(actual, model(**given, past_key_values=expected).logits)
    assert len(fast.sessions) == 3, "the example's, one for prompts, one for steps"


def test_a_slice_is_laid_out_as_if_made_anew():
    wide = torch.arange(12).reshape(2, 6)
    for tensor in (wide[:, -1:], wide[:1], wide.t()):
        made = alike(tensor)
        assert torch.equal(made, tensor) and made.stride() == torch.empty(tensor.shape).stride()
    assert alike(wide) is not wide[:] and alike(torch.ones(2, 3)).is_contiguous()
