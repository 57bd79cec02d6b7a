"""Embedder of Ray Data: the same embeddings as the model's, by itself and on two workers of which one dies."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from thresher.errors import ArgumentError, ThresherError
from thresher.integrations.batches import groups
from thresher.integrations.ray import Embedder, prepare
from thresher.tools import models

transformers = pytest.importorskip("transformers")
TEXTS = ["one", "a text that is somewhat longer than the first one was", "three words here", "x " * 30] * 4


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=30522, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                     num_attention_heads=4, initializer_range=0.2)  # fmt: skip
    return transformers.BertModel(config).eval(), models.load("minilm")[1]


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory):
    model, tokenizer = encoder
    return prepare(
        model, tmp_path_factory.mktemp("embedder"), "exact", tokenizer=tokenizer, target="reference"
    )


def expected(encoder, texts, pooling="mean"):
    model, tokenizer = encoder
    rows = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer([text], truncation=True, max_length=512, return_tensors="pt"))[0][0]
        rows.append(torch.nn.functional.normalize(hidden.mean(0) if pooling == "mean" else hidden[0], dim=0))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("tokens", [1, 20, 8192])
def test_rows_equal_each_text_alone_and_keep_their_order(encoder, folder, tokens):
    embedder = Embedder(folder, tokens_per_batch=tokens, target="reference", threads=None)
    result = embedder({"text": np.array(TEXTS, dtype=object), "id": np.arange(len(TEXTS))})
    assert list(result["id"]) == list(range(len(TEXTS)))
    assert result["embedding"].shape == (len(TEXTS), 32) and result["embedding"].dtype == np.float32
    np.testing.assert_allclose(result["embedding"], expected(encoder, TEXTS), atol=1e-5)
    if tokens == 8192:
        assert embedder.program.counters.packed == 1


def test_the_first_token_and_other_columns(encoder, tmp_path):
    model, tokenizer = encoder
    prepare(
        model, tmp_path, "exact", tokenizer=tokenizer, pooling="first", normalize=True, target="reference"
    )
    embedder = Embedder(tmp_path, column="body", into="vector", target="reference", threads=None)
    result = embedder({"body": TEXTS[:3]})
    np.testing.assert_allclose(result["vector"], expected(encoder, TEXTS[:3], "first"), atol=1e-5)
    assert len(embedder({"body": []})["vector"]) == 0


def test_a_sentence_transformer_keeps_its_pooling(encoder, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    model, tokenizer = encoder
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    st = library.SentenceTransformer(str(tmp_path / "plain"), device="cpu")
    prepare(st, tmp_path / "folder", "exact", target="reference")
    result = Embedder(tmp_path / "folder", target="reference", threads=None)({"text": TEXTS})
    np.testing.assert_allclose(result["embedding"], st.encode(TEXTS), atol=1e-5)


def test_what_cannot_be_embedded_is_named(encoder, folder, tmp_path):
    embedder = Embedder(folder, target="reference", threads=None)
    for batch, name in (({"body": TEXTS}, "column"), ({"text": ["a", None]}, r"text\[1\]")):
        with pytest.raises(ArgumentError, match=name):
            embedder(batch)
    for name, call in (
        ("folder", lambda: Embedder(tmp_path)),
        ("tokens_per_batch", lambda: Embedder(folder, tokens_per_batch=0)),
        ("tokenizer", lambda: prepare(encoder[0], tmp_path)),
        ("pooling", lambda: prepare(*encoder[:1], tmp_path, tokenizer=encoder[1], pooling="max")),
        ("texts", lambda: prepare(encoder[0], tmp_path, tokenizer=encoder[1], texts=["one"])),
    ):
        with pytest.raises(ArgumentError, match=name):
            call()
    (tmp_path / "embedder.json").write_text("{")
    with pytest.raises(ThresherError, match=r"embedder\.json"):
        Embedder(tmp_path)


def test_groups_hold_every_text_once():
    for counts in ([], [5], [9, 1, 1], [1] * 7, [3, 30, 3]):
        found = [i for group in groups(counts, 8) for i in range(group.start, group.stop)]
        assert found == list(range(len(counts)))
    assert [(g.start, g.stop) for g in groups([3, 30, 3, 4], 8)] == [(0, 1), (1, 2), (2, 4)]


class DiesOnce(Embedder):
    """An Embedder whose process ends in the middle of the job, once."""

    def __init__(self, *args, marker, **kwargs):
        super().__init__(*args, **kwargs)
        self.marker = Path(marker)

    def __call__(self, batch):
        if 5 in batch["id"] and not self.marker.exists():
            self.marker.touch()
            os._exit(1)
        return super().__call__(batch)


@pytest.mark.slow
def test_two_workers_of_which_one_dies_lose_nothing(encoder, folder, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'thresher[ray]'")
    pytest.importorskip("pyarrow")
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": here}})
    try:
        rows = ray.data.from_items([{"id": i, "text": text} for i, text in enumerate(TEXTS)])
        given = {"folder": str(folder), "target": "reference", "marker": str(tmp_path / "died")}
        done = rows.map_batches(
            DiesOnce,
            fn_constructor_kwargs=given,
            batch_size=4,
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=0.5,
        )
        done.write_parquet(str(tmp_path / "out"))
        back = ray.data.read_parquet(str(tmp_path / "out")).to_pandas().sort_values("id")
    finally:
        ray.shutdown()
    assert (tmp_path / "died").exists() and list(back["id"]) == list(range(len(TEXTS)))
    np.testing.assert_allclose(np.stack(back["embedding"].to_numpy()), expected(encoder, TEXTS), atol=1e-5)
    assert json.loads((folder / "embedder.json").read_text())["longest"] == 512
