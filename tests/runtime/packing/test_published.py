"""The published prepacking, kept for comparison, continues generation exactly as padding does."""

import pytest
import torch

from thresher.errors import ArgumentError
from thresher.runtime.packing.published import best_fit_decreasing, prepack, unpack_cache


@pytest.mark.parametrize("lengths", [(5, 1, 3, 8), (1, 1, 4), (1,), (6, 6, 6), (2, 9, 4, 4, 1, 7)])
def test_the_first_decoding_step_equals_padded_eager(lengths):
    transformers = pytest.importorskip("transformers", reason="needs pip install 'thresher[demo]'")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ).eval()
    prompts = [torch.randint(1, 50, (n,)).tolist() for n in lengths]
    longest = max(lengths)
    batch = prepack(prompts)
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    positions = (batch.attention_mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(padded, attention_mask=batch.attention_mask, position_ids=positions).logits[:, -1]
        cache = transformers.DynamicCache()
        if longest > 1:
            packed = model(
                batch.input_ids, attention_mask=batch.mask, position_ids=batch.position_ids, use_cache=True
            ).past_key_values
            for i, layer in enumerate(packed.layers):
                cache.update(unpack_cache(layer.keys, batch), unpack_cache(layer.values, batch), i)
        step = model(
            batch.last_tokens,
            attention_mask=batch.attention_mask,
            position_ids=positions[:, -1:],
            past_key_values=cache,
        ).logits[:, -1]
    torch.testing.assert_close(step, expected, rtol=1e-5, atol=1e-5)


def test_rows_are_as_published():
    batch = prepack([[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]])
    assert batch.bins == ((1,), (0, 2))
    assert batch.input_ids.tolist() == [[4, 5, 6, 7], [1, 2, 9, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch.last_tokens.tolist() == [[3], [8], [10]]
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert batch.mask[1, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_the_fullest_row_that_fits_is_chosen():
    # the 2 fits in both rows, [7] and [5, 3], and goes to the fuller
    assert best_fit_decreasing([7, 5, 3, 2], capacity=10) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_empty_prompts_are_refused(prompts):
    with pytest.raises(ArgumentError, match="prompts"):
        prepack(prompts)
