"""The tiny models and masks that other tests use are what they say they are."""

import masks
import pytest
import torch
import zoo


@torch.no_grad()
def hidden(model, inputs):
    result = model(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_model_builds_the_same_twice(name):
    entry = zoo.ZOO[name]
    (first, inputs), (second, again) = entry.build(), entry.build()
    assert not first.training and first.config.model_type == entry.family
    assert type(first).__module__.startswith("transformers.")
    assert torch.equal(hidden(first, inputs), hidden(second, again))


@pytest.mark.parametrize("name", zoo.TEXT)
def test_causal_is_what_the_model_does(name):
    model, inputs = zoo.ZOO[name].build()
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][2, 6] += 1  # in the middle of the row that has no padding
    difference = (hidden(model, inputs) - hidden(model, changed)).abs().amax(-1)
    assert difference[2, 6] > 1e-2
    assert (difference[2, :6].max() < 1e-5) == zoo.ZOO[name].causal
    assert difference[2, 7] > 1e-3, "weights so small that attention carries nothing"
    assert difference[:2].max() == 0


@pytest.mark.parametrize("name", [n for n in zoo.TEXT if all(zoo.ZOO[n].windows)])
def test_windows_are_what_the_model_does(name):
    """A token further back than all layers' windows together has no influence; the last one within has."""
    model, _ = zoo.ZOO[name].build()
    inputs = zoo.tokens(torch.ones(1, 20, dtype=torch.long))
    reach = sum(window - 1 for window in zoo.ZOO[name].windows)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 0] += 1
    difference = (hidden(model, inputs) - hidden(model, changed)).abs().amax(-1)[0]
    assert difference[reach] > 0 and difference[reach + 1 :].max() < 1e-6


@pytest.mark.parametrize("name", zoo.TEXT)
@pytest.mark.parametrize("side", [masks.right, masks.left])
def test_padding_is_not_seen(name, side):
    if zoo.ZOO[name].positions == "counted" and side is masks.left:
        pytest.skip("its positions count the tokens that are not the pad token")
    model, _ = zoo.ZOO[name].build()
    inputs = zoo.tokens(side(zoo.LENGTHS))
    noisy = {**inputs, "input_ids": inputs["input_ids"] + (1 - inputs["attention_mask"]) * 5}
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(hidden(model, noisy)[real], hidden(model, inputs)[real], atol=1e-5, rtol=0)


def test_masks():
    lengths = (2, 4, 0)
    assert masks.right(lengths).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert masks.left(lengths, 5).tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert masks.mixed((1, 1)).tolist() == [[1], [1]]
    assert masks.mixed((1, 1, 1), 2).tolist() == [[1, 0], [0, 1], [1, 0]]
    assert masks.holed((5, 3)).tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]]
    kinds = dict(masks.every_kind(12))
    assert all(mask.shape[1] == 12 and mask.dtype == torch.int64 for mask in kinds.values())
    assert len({tuple(mask.flatten().tolist()) for mask in kinds.values()}) == len(kinds)


def test_comparison_looks_at_real_tokens_only():
    mask = masks.right((2, 3))
    cache = torch.zeros(2, 4, 3, 8)
    expected = {"hidden": torch.zeros(2, 3, 5), "cache": (cache,), "pooled": torch.zeros(2, 5)}

    def with_error(key, place, value=1.0):
        wrong = expected["cache"][0].clone() if key == "cache" else expected[key].clone()
        wrong[place] = value
        return {**expected, key: (wrong,) if key == "cache" else wrong}

    masks.assert_equal_at_real_tokens(with_error("hidden", (0, 2)), expected, mask)
    masks.assert_equal_at_real_tokens(with_error("cache", (0, slice(None), 2), float("nan")), expected, mask)
    for key, place in [("hidden", (0, 1)), ("cache", (1, 0, 2)), ("pooled", (0, 0))]:
        with pytest.raises(AssertionError, match=rf"output \.{key}"):
            masks.assert_equal_at_real_tokens(with_error(key, place), expected, mask)
    with pytest.raises(AssertionError, match=r"output \.hidden"):
        masks.assert_equal_at_real_tokens(with_error("hidden", (0, 0), float("nan")), expected, mask)
    with pytest.raises(AssertionError, match="nothing to compare"):
        masks.assert_equal_at_real_tokens({}, {}, mask)
