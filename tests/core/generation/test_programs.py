"""Calls of all sizes are laid out alike, so that they can share programs."""

import random

import pytest
import torch
import transformers
from tiny_llama import make

import thresher
from thresher.generation import windows
from thresher.generation.programs import alike
from thresher.generation.request import Request


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


def windowed(name: str):
    """One decoder with windows of 8 tokens in all layers, or in every second one."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=2, sliding_window=8, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    if name == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)).eval()
    kinds = ["sliding_attention", "full_attention"]
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, layer_types=kinds)).eval()


def programs_made(model, calls):
    """How many programs each call made, all of which give the model's own tokens."""
    example = dict(
        input_ids=torch.randint(1, 96, (4, 20)), attention_mask=torch.ones(4, 20, dtype=torch.long)
    )
    example["attention_mask"][1, :7] = 0
    fast = thresher.compile(model, example, "exact", target="reference")
    made = []
    for number, given in enumerate(calls):
        torch.manual_seed(number)
        found = fast.generate(**given)
        made.append(fast.last_call.programs)
        torch.manual_seed(number)
        assert torch.equal(found, model.generate(**given)), given
    return made


@pytest.mark.parametrize("name", ["gemma3", pytest.param("mistral", marks=pytest.mark.thorough)])
def test_windows_add_no_programs(name):
    """Prompts shorter and longer than the window, steps before it is full and behind, in each kind of cache."""
    model = windowed(name)
    calls = [{**given, "max_new_tokens": 7 if number == 1 else 3} for number, given in enumerate(mixed(12))]
    made = programs_made(model, calls)
    assert sum(made) <= 4 and not any(made[10:]), made


def test_a_window_is_kept_where_all_would_be_much_more(monkeypatch):
    model, ids = windowed("gemma3"), torch.randint(1, 96, (1, 5))
    request = Request(model, None, dict(max_new_tokens=4))
    for cache in (transformers.DynamicCache(config=model.config), transformers.StaticCache(model.config, 9)):
        request.keep_whole(cache, ids.shape[1])
        assert not any(cache.is_sliding) and getattr(cache.layers[0], "max_cache_len", 9) == 9
    monkeypatch.setattr(windows, "LEAST", 0)
    cache = transformers.DynamicCache(config=model.config)
    request.keep_whole(cache, 13)
    assert any(cache.is_sliding), "17 tokens are more than two windows of 8"
    for given in (dict(past_key_values=cache), dict(prompt_lookup_num_tokens=3)):
        other = transformers.DynamicCache(config=model.config)
        Request(model, None, given | dict(max_new_tokens=4)).keep_whole(other, 5)
        assert any(other.is_sliding)


@pytest.mark.parametrize("count", [12, pytest.param(50, marks=pytest.mark.thorough)])
def test_mixed_calls_share_four_programs(count):
    """Prompts of one row, all other prompts, and the steps of each of two kinds of cache."""
    model = make(num_hidden_layers=1)
    made = programs_made(model, mixed(count))
    assert sum(made) <= 4 and not any(made[10:]), made
