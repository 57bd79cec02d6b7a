"""Every architecture is packed, with every kind of mask, or declined with a sentence; it is never wrong."""

import leniently
import masks
import pytest
import torch
import zoo
from sampled import sampled

import thresher

WINDOWED = ("mistral", "gemma2", "gemma3", "modernbert")
DECLINED = {
    "vit": "called without attention_mask",
}
MASKS = [(name, mask) for name, mask in masks.every_kind() if mask.shape == (3, 12)]
MASKS.append(("one_token_rows_of_three", masks.right((1, 12, 1))))
CACHED = zoo.WINDOW - 1  # columns that a sliding cache keeps


def at_real_tokens(name: str, tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Like `masks.at_real_tokens`, and a sliding cache at its own columns."""
    if name.endswith((".keys", ".values")) and tensor.shape[2] == CACHED:
        return tensor.transpose(1, 2)[mask[:, -CACHED:].bool()]
    return masks.at_real_tokens(tensor, mask)


def assert_same(actual, expected, mask, atol=2e-5):
    pairs = list(zip(masks.outputs(actual), masks.outputs(expected), strict=True))
    for (name, a), (_, e) in pairs:
        assert a.shape == e.shape and a.dtype == e.dtype, name
        if "pooler" in name and not mask[:, 0].all():
            continue  # it reads the first column, which holds pads
        a, e = at_real_tokens(name, a, mask), at_real_tokens(name, e, mask)
        torch.testing.assert_close(a, e, atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def packed(name, **options):
    model, inputs = zoo.ZOO[name].build()
    torch._dynamo.reset()
    return model, thresher.compile(model, inputs, target="reference", **options)


def slow(case):
    """A case that only the full suite runs."""
    return pytest.param(case, marks=pytest.mark.slow)


# The rest differ from these in what prepacking does not look at.
CORE = ("gemma2", "gpt2", "bloom", "mpt", "t5_encoder")  # and those of the tests below
PACKED = [
    n if n in CORE else pytest.param(n, marks=pytest.mark.thorough) for n in zoo.TEXT if n not in DECLINED
]


@pytest.mark.parametrize("name", PACKED)
def test_every_architecture_equals_the_padded_model_at_real_tokens(name):
    model, ours = packed(name, require={"prepack": 1.0}, verify=False)
    for kind, mask in MASKS:
        inputs = zoo.tokens(mask)
        with torch.no_grad():
            expected = model(**inputs)
        try:
            assert_same(ours(**inputs), expected, mask)
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from None
    (counters,) = ours.counters
    reasons = set(counters.padded)
    holes = {r for r in reasons if "holes" in r}
    assert bool(holes) == (name in WINDOWED), reasons
    assert counters.packed == len(MASKS) - sum(counters.padded.values()) + 1  # and the example
    assert counters.padded["The batch has no padding."] == 1
    assert counters.padded["The batch has fewer than two real tokens."] == 2


@pytest.mark.parametrize("name", DECLINED)
@pytest.mark.filterwarnings("ignore::thresher.ThresherWarning")
def test_what_is_declined_says_why_and_runs_as_it_was(name):
    model, inputs = zoo.ZOO[name].build()
    torch._dynamo.reset()
    ours = leniently.compile(model, inputs)
    (miss,) = ours.report["prepack"].missed
    assert DECLINED[name] in miss.reason and miss.reason.endswith(".")
    with torch.no_grad():
        expected = model(**inputs)
    for (_, a), (_, e) in zip(masks.outputs(ours(**inputs)), masks.outputs(expected), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("kind", sampled(["float32"], ["bool", "int32", "float32"]))
def test_masks_of_every_dtype(kind):
    model, inputs = zoo.ZOO["bert"].build()
    mask = masks.mixed(zoo.LENGTHS)
    inputs = zoo.tokens(mask)
    typed = {**inputs, "attention_mask": mask.to(getattr(torch, kind))}
    torch._dynamo.reset()
    ours = thresher.compile(model, typed, target="reference", verify=False)
    with torch.no_grad():
        expected = model(**inputs)
    assert_same(ours(**typed), expected, mask)
    assert ours.counters[0].packed == 2


def test_rows_below_at_and_above_the_window():
    """A window counts earlier tokens of the same row, whatever stands before it in the packed row."""
    model, ours = packed("mistral")
    for calls, offset in enumerate((-1, 0, 1), 2):
        mask = masks.left((zoo.WINDOW + offset, zoo.WINDOW + offset, 3), width=12)
        inputs = zoo.tokens(mask)
        with torch.no_grad():
            expected = model(**inputs)
        assert_same(ours(**inputs), expected, mask)
        assert ours.counters[0].packed == calls


def test_a_window_first_shown_by_a_longer_batch_is_not_missed():
    """Compiled where every row fits the window, then called beyond it."""
    model, _ = zoo.ZOO["mistral"].build()
    torch._dynamo.reset()
    short, long = masks.right((3, 5, 6)), masks.right((20, 4, 12))
    ours = thresher.compile(model, zoo.tokens(short), target="reference", dynamic=True)
    with torch.no_grad():
        expected = model(**zoo.tokens(long))
    actual = ours(**zoo.tokens(long))
    torch.testing.assert_close(actual.logits[long.bool()], expected.logits[long.bool()], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sampled(["llama"], ["llama", "bert"]))
def test_double_precision_agrees_to_twelve_digits(name):
    model, inputs = zoo.ZOO[name].build()
    model = model.double()
    torch._dynamo.reset()
    ours = thresher.compile(model, inputs, target="reference", verify=False)
    with torch.no_grad():
        expected = model(**inputs)
    assert_same(ours(**inputs), expected, inputs["attention_mask"], atol=1e-12)
    assert ours.counters[0].packed == 2


@pytest.mark.parametrize("name", sampled(["bert"], ["llama", "bert"]))
def test_bfloat16_is_as_close_as_padding_itself(name):
    """Padded against one row alone is what bfloat16 leaves open; packing stays within twice that."""
    model, inputs = zoo.ZOO[name].build()
    model = model.to(torch.bfloat16)
    mask = inputs["attention_mask"]
    torch._dynamo.reset()
    ours = thresher.compile(model, inputs, target="reference", verify=False)
    with torch.no_grad():
        padded = model(**inputs)[0]
        alone = [model(input_ids=inputs["input_ids"][r : r + 1, :n])[0][0] for r, n in enumerate(zoo.LENGTHS)]
    open_ = max(float((padded[r, :n] - a).abs().max()) for r, (n, a) in enumerate(zip(zoo.LENGTHS, alone)))
    error = float((ours(**inputs)[0] - padded)[mask.bool()].abs().max())
    assert ours.counters[0].packed == 2
    assert error <= 2 * open_ + 0.02 * float(padded.abs().max())
