"""Rows padded on the right go on as those padded on the left do."""

import pytest
import torch
import vlm_zoo
from tiny_llama import make, prompt
from transformers import DynamicCache

from thresher.compiled import Compiled
from thresher.generation.padding import on_the_left
from thresher.recipe import Recipe

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
IDS = torch.tensor([[5, 6, 7, 0, 0], [1, 2, 3, 4, 5]])


@pytest.fixture(scope="module")
def model():
    return make(num_hidden_layers=1)


@pytest.mark.filterwarnings("ignore:Rows padded on the right")
def test_all_that_goes_by_token_is_moved(model):
    beside = dict(
        inputs_embeds=torch.randn(2, 5, 3), position_ids=torch.arange(30).view(3, 2, 5), token_type_ids=IDS + 1,
        pixel_values=IDS.float(),
    )  # fmt: skip
    args, named = on_the_left(model, (IDS,), dict(attention_mask=MASK, **beside))
    assert args[0].tolist() == [[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]]
    assert named["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5]
    assert torch.equal(named["inputs_embeds"][0, 2:], beside["inputs_embeds"][0, :3])
    assert torch.equal(named["position_ids"][:, 0, 2:], beside["position_ids"][:, 0, :3])
    assert named["token_type_ids"][0].tolist() == [1, 1, 6, 7, 8]
    assert named["pixel_values"] is beside["pixel_values"]


def test_other_calls_are_left_as_they_are(model):
    full = DynamicCache()
    full.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    for given in (
        dict(input_ids=IDS, attention_mask=MASK.flip(1)),
        dict(input_ids=IDS),
        dict(input_ids=IDS[:, :1], attention_mask=MASK, past_key_values=full),
        dict(input_ids=IDS[:, :3], attention_mask=MASK),  # of a past that is held elsewhere
    ):
        assert on_the_left(model, (), given) == ((), given)


def test_rows_generate_as_alone(model):
    ids = prompt(2, span=None)
    given = dict(input_ids=ids.clone(), attention_mask=torch.ones_like(ids))
    given["input_ids"][1, 40:], given["attention_mask"][1, 40:] = 0, 0
    greedy = dict(max_new_tokens=4, do_sample=False)
    with pytest.warns(UserWarning, match="padding_side='left'"):
        out = Compiled(model, Recipe.of("exact"), target="reference").generate(**given, **greedy)
    alone = model.generate(ids[1:, :40], **greedy)
    assert torch.equal(out[1, 8:], alone[0])


def test_the_zoos_batches_are_the_same_on_either_side():
    class Model:
        config = vlm_zoo.build("Qwen2-VL").config

    given = vlm_zoo.batch("Qwen2-VL", vlm_zoo.build("Qwen2-VL"), (1, 2))
    right = vlm_zoo.padded_right(given)
    assert not right["attention_mask"][0, -1]
    with pytest.warns(UserWarning):
        _, back = on_the_left(Model, (), right)
    assert all(torch.equal(back[name], given[name]) for name in given)
