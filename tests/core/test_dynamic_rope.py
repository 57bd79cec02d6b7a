"""Rotary positions that follow the longest sequence met: packed, in one graph, and noted as the model notes them."""

import copy

import torch
import zoo
from tiny_llama import make

import thresher


def batch(tokens: int, side: str) -> dict:
    lengths = torch.tensor([tokens, tokens // 2 + 1, 3])
    mask = (torch.arange(tokens)[None] < lengths[:, None]).long()
    ids = torch.randint(1, 90, mask.shape, generator=torch.Generator().manual_seed(tokens))
    return dict(input_ids=ids, attention_mask=mask if side == "right" else mask.flip(1), use_cache=False)


def test_dynamic_positions_are_packed_and_grow_and_shrink_as_the_models_do():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make(num_hidden_layers=1, max_position_embeddings=12, rope_parameters=rope)
    zoo.spread(model)
    own = copy.deepcopy(model)
    fast = thresher.compile(model, batch(6, "right"), "exact", target="reference", dynamic=True)
    assert fast.report["prepack"].rewritten and len(fast.reports) == 1
    ours, theirs = model.model.rotary_emb, own.model.rotary_emb
    grown = []
    for tokens, side in (
        (9, "left"),
        (20, "right"),
        (15, "left"),
        (12, "right"),
        (7, "right"),
        (17, "left"),
        (5, "left"),
    ):
        given = batch(tokens, side)
        real = given["attention_mask"].bool()
        with torch.no_grad():
            expected = own(**given).logits[real]
        torch.testing.assert_close(fast(**given).logits[real], expected)
        assert torch.equal(ours.inv_freq, theirs.inv_freq)
        assert int(ours.max_seq_len_cached) == int(theirs.max_seq_len_cached)
        grown.append(int(ours.max_seq_len_cached))
    assert grown == [12, 20, 20, 20, 12, 17, 12]
    assert fast.counters[0].packed == fast.counters[0].calls and len(fast.sessions) == 1
    assert "forward" not in ours.__dict__


def test_a_model_that_went_back_shares_no_memory_with_its_first_frequencies():
    """Its own code then puts the first ones in the others' place, and ours writes there."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make(num_hidden_layers=1, max_position_embeddings=12, rope_parameters=rope).bfloat16()
    with torch.no_grad():
        model(**batch(20, "right")), model(**batch(6, "right"))
    place = model.model.rotary_emb
    first = place.original_inv_freq.clone()
    assert place.inv_freq.data_ptr() == place.original_inv_freq.data_ptr()
    fast = thresher.compile(model, batch(6, "right"), "exact", target="reference", dynamic=True)
    fast(**batch(20, "right"))
    assert torch.equal(place.original_inv_freq, first) and int(place.max_seq_len_cached) == 20
    assert place.inv_freq.dtype == torch.float32 and not torch.equal(place.inv_freq, first.float())
