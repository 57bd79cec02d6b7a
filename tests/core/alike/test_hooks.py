"""Hooks that are set on a model after it was compiled whole."""

import torch
from tiny_llama import make

import thresher


def test_a_hook_that_is_set_later_runs_and_one_that_is_taken_off_does_not():
    model = make(num_hidden_layers=2)
    ids = torch.randint(1, 90, (3, 7), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    fast = thresher.compile(model, given, "none", target="reference")
    with torch.no_grad():
        before = fast(**given).logits
        hook = model.model.layers[-1].mlp.register_forward_hook(lambda module, args, out: out * -3)
        hooked, expected = fast(**given).logits, model(**given).logits
        hook.remove()
        after = fast(**given).logits
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(hooked, expected)
    torch.testing.assert_close(after, before)
