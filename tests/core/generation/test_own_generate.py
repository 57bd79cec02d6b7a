"""`generate` of a model compiled in place: right behind a cut, or refused before the first token."""

import warnings

import pytest
import torch
from tiny_llama import IMAGE, SPAN, make, prompt

import thresher
from thresher.errors import ArgumentError

GREEDY = dict(max_new_tokens=4, do_sample=False)
PRUNE = {
    "transprune": dict(
        min_image_tokens=2, bucket=1, min_saving=0.0, image_token_id=IMAGE, stages=((1, 0.5),)
    ),
    "zipvl": dict(keep=0.5, recent=4, spread=4, bucket=4, min_saving=0.0, image_token_id=IMAGE, kv="drop"),
}


def in_place(name: str):
    model = make(num_hidden_layers=2)
    model.compile(backend="thresher", options={name: PRUNE[name], "target": "reference"})
    return model


def padded() -> dict[str, torch.Tensor]:
    ids = prompt(2)
    ids[1] = torch.cat([ids[1, :8] * 0, ids[1, :40]])
    return dict(input_ids=ids, attention_mask=(ids != 0).long())


@pytest.fixture(autouse=True)
def apart():
    torch._dynamo.reset()  # models compiled in place share torch's limit on programs of one class


@pytest.mark.parametrize("name", PRUNE)
def test_padding_is_refused_before_a_token(name):
    model, heard = in_place(name), []
    with pytest.raises(
        ArgumentError, match=r"thresher\.compile\(model, batch, recipe\)\.generate"
    ) as refused:
        model.generate(**padded(), **GREEDY, stopping_criteria=[lambda *_: heard.append(0) or False])
    assert refused.value.argument == "attention_mask" and not heard


def test_a_prompt_without_padding_is_right_and_its_drafts_are_refused():
    model, ids = in_place("transprune"), prompt(1)
    fast = thresher.compile(
        make(num_hidden_layers=2), dict(input_ids=ids), target="reference", transprune=PRUNE["transprune"]
    )
    assert torch.equal(model.generate(ids, **GREEDY), fast.generate(ids, **GREEDY))
    with pytest.raises(ArgumentError, match="several tokens at once"):
        model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3)


def test_rows_with_images_of_different_sizes_are_refused_though_nothing_is_padded():
    ids = prompt(2)
    ids[1, SPAN.start : SPAN.start + 16] = 5
    with pytest.raises(ArgumentError, match="different numbers of tokens"):
        in_place("transprune").generate(ids, **GREEDY)


def test_that_nothing_is_rounded_is_said_once():
    model = make(num_hidden_layers=1)
    options = dict(PRUNE["zipvl"], kv="quantize")
    model.compile(backend="thresher", options={"zipvl": options, "target": "reference"})
    with pytest.warns(UserWarning, match="rounds nothing") as heard:
        model.generate(prompt(1), max_new_tokens=2, do_sample=False)
        model.generate(prompt(1), max_new_tokens=2, do_sample=False)
    assert sum("rounds nothing" in str(w.message) for w in heard) == 1


def test_compiling_on_a_padded_batch_warns_of_nothing():
    """Neither the example's call nor its check hands keys and values to anybody."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The rows of this call")
        thresher.compile(
            make(num_hidden_layers=2), padded(), target="reference", transprune=PRUNE["transprune"]
        )
