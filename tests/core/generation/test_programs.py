"""Calls of all sizes are laid out alike, so that they can share programs."""

import random

import pytest
import torch
from tiny_llama import make

import thresher
from thresher.generation.programs import alike


def test_a_slice_is_laid_out_as_if_made_anew():
    wide = torch.arange(12).reshape(2, 6)
    for tensor in (wide[:, -1:], wide[:1], wide.t()):
        made = alike(tensor)
        assert torch.equal(made, tensor) and made.stride() == torch.empty(tensor.shape).stride()
    assert alike(wide) is not wide[:] and alike(torch.ones(2, 3)).is_contiguous()


def mixed(count: int):
    """Calls of `generate`: 1 to 64 rows, 3 to 47 tokens, padded or not, with and without a mask, in each mode in turn."""
    modes = [
        {},
        dict(num_beams=3),
        dict(cache_implementation="static"),
        dict(do_sample=True, num_return_sequences=2),
    ]
    drawn, noise = random.Random(0), torch.Generator().manual_seed(0)
    for number in range(count):
        rows = drawn.choice([1, 1, 2, 3, 8, 5 if number % 5 else 64])
        tokens = drawn.choice([3, 5, 9, 20, 33, 47])
        ids = torch.randint(1, 96, (rows, tokens), generator=noise)
        mask = torch.ones_like(ids)
        if rows > 1 and drawn.random() < 0.6:
            for row in range(1, rows):
                mask[row, : drawn.randint(0, tokens - 2)] = 0
        given = dict(input_ids=ids * mask)
        if not bool(mask.all()) or drawn.random() < 0.5:
            given["attention_mask"] = mask
        yield {
            **given,
            "max_new_tokens": 3,
            "do_sample": False,
            "pad_token_id": 0,
            **modes[number % len(modes)],
        }


@pytest.mark.parametrize("count", [12, pytest.param(50, marks=pytest.mark.thorough)])
def test_mixed_calls_share_four_programs(count):
    """Prompts of one row, all other prompts, and the steps of each of two kinds of cache."""
    model = make(num_hidden_layers=1)
    example = dict(
        input_ids=torch.randint(1, 96, (4, 20)), attention_mask=torch.ones(4, 20, dtype=torch.long)
    )
    example["attention_mask"][1, :7] = 0
    fast = thresher.compile(model, example, "exact", target="reference")
    made = []
    for number, given in enumerate(mixed(count)):
        torch.manual_seed(number)
        found = fast.generate(**given)
        made.append(fast.last_call.programs)
        torch.manual_seed(number)
        assert torch.equal(found, model.generate(**given)), given
    assert sum(made) <= 4 and not any(made[10:]), made
