"""An error that no part of Thresher foresaw costs the rewrite, and never the call."""

import warnings

import pytest
import tiny_llama
import torch

import thresher
from thresher.graph import capture
from thresher.passes.prepack.prepack import Prepack


def broken(*_args, **_kwargs):
    raise KeyError("a name nobody knows")


@pytest.mark.parametrize("where", [(capture, "from_places"), (Prepack, "match"), (Prepack, "rewrite")])
def test_a_fault_leaves_the_graph_as_it_was_and_says_so_once(where, monkeypatch):
    monkeypatch.setattr(*where, broken)
    model = tiny_llama.make(num_hidden_layers=1)
    batch = {
        "input_ids": tiny_llama.prompt(2, 6, span=None),
        "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3]),
    }
    torch._dynamo.reset()
    fast = torch.compile(model, backend="thresher", options={"target": "reference"})
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        results = [fast(**batch).logits for _ in range(2)]
    ours = [str(w.message) for w in said if issubclass(w.category, thresher.ThresherWarning)]
    assert (
        len(ours) == 1
        and "KeyError: 'a name nobody knows'" in ours[0]
        and "(in broken, test_left_alone.py line" in ours[0]
    )
    with torch.no_grad():
        assert all(r.equal(model(**batch).logits) for r in results)
    with pytest.raises(thresher.ThresherError, match=r"a fault of (its|Thresher's) own.*KeyError"):
        thresher.compile(model, batch, target="reference")
