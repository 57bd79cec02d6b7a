"""SentenceTransformer.encode and CrossEncoder.predict through a compiled transformer: the same numbers, packed."""

import copy
import pickle

import numpy as np
import pytest
import torch

from thresher.compiled import Compiled
from thresher.errors import ArgumentError, NothingRewrittenError
from thresher.integrations.sentence_transformers import optimize
from thresher.tools import models

library = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")
TEXTS = ["one", "a text that is somewhat longer than the first one was", "three words here"] * 3 + [
    "the last"
]
PAIRS = [("a question", text) for text in TEXTS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Directories of a tiny encoder and a tiny ranker, with MiniLM's tokenizer."""
    tokenizer, found = models.load("minilm")[1], {}
    sizes = dict(
        vocab_size=30522, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    for kind, more in (("BertModel", {}), ("BertForSequenceClassification", {"num_labels": 1})):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(transformers.BertConfig(**sizes, **more, initializer_range=0.2))
        found[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(found[kind])
        tokenizer.save_pretrained(found[kind])
    return found


@pytest.fixture(scope="module")
def embedder(folders):
    plain = library.SentenceTransformer(str(folders["BertModel"]), device="cpu")
    fast = copy.deepcopy(plain)
    assert optimize(fast, "exact", target="reference", tokens_per_batch=40) is fast
    return plain, fast


def packed(model):
    inner = next(part.model for part in model.children() if hasattr(part, "model"))
    assert isinstance(inner, Compiled)
    return sum(c.packed for c in inner.counters)


@pytest.mark.parametrize(
    "how", [{}, {"batch_size": 4}, {"convert_to_tensor": True}, {"normalize_embeddings": True}]
)
def test_encode_gives_the_same_rows_in_order(embedder, how):
    plain, fast = embedder
    before = packed(fast)
    expected, found = plain.encode(TEXTS, **how), fast.encode(TEXTS, **how)
    assert type(found) is type(expected) and packed(fast) > before
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5)


def test_one_text_and_lists_and_other_precision(embedder):
    plain, fast = embedder
    np.testing.assert_allclose(fast.encode("one text"), plain.encode("one text"), atol=1e-5)
    for kind in ("sentence_embedding", "token_embeddings"):
        for a, b in zip(
            *(m.encode(TEXTS, output_value=kind, convert_to_numpy=False) for m in embedder), strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    ours, theirs = (m.encode(TEXTS, precision="binary") for m in embedder)
    assert ours.shape == theirs.shape and len(fast.encode([])) == 0


def test_texts_of_all_lengths_run_the_program_that_optimize_made(folders):
    """`encode` runs under inference mode, for whose tensors Dynamo compiles anew."""
    fast = library.SentenceTransformer(str(folders["BertModel"]), device="cpu")
    optimize(fast, "exact", target="reference")
    for given in (TEXTS, TEXTS[:2], ["some words " * n for n in range(1, 9)]):
        fast.encode(given)
    inner = fast[0].model
    assert len(inner.sessions) == 1 and inner.sessions[0].counters.calls == 4


def test_batches_hold_up_to_the_budget_of_tokens(embedder):
    _, fast = embedder
    groups = list(fast.encode._groups(TEXTS))
    assert [t for g in groups for t in g] == TEXTS and len(groups) > 1
    sizes = [sum(map(len, fast.tokenizer(g)["input_ids"])) for g in groups]
    assert all(n <= 40 or len(g) == 1 for n, g in zip(sizes, groups))
    assert [len(g) for g in type(fast.encode)(fast, "encode", 1)._groups(TEXTS)] == [1] * len(TEXTS)


@pytest.mark.parametrize("method", ["encode_query", "encode_document", "encode"])
def test_what_passes_the_librarys_own_batch_size_on_goes_by_tokens_too(embedder, method, monkeypatch):
    plain, fast = embedder
    seen = []
    own = type(fast.encode)._groups
    monkeypatch.setattr(
        type(fast.encode), "_groups", lambda self, texts: seen.append(len(texts)) or own(self, texts)
    )
    more = {"batch_size": 32} if method == "encode" else {}
    found = getattr(fast, method)(inputs=TEXTS, show_progress_bar=True, **more)
    np.testing.assert_allclose(found, getattr(plain, method)(TEXTS), atol=1e-5)
    assert seen == [len(TEXTS)]
    assert len(getattr(fast, method)(TEXTS, batch_size=4)) == len(TEXTS) and len(seen) == 1


def test_a_copy_in_another_process_is_compiled_too(embedder):
    plain, fast = embedder
    other = pickle.loads(pickle.dumps(fast))
    assert other.encode.model is other
    np.testing.assert_allclose(other.encode(TEXTS[:4]), plain.encode(TEXTS[:4]), atol=1e-5)
    assert packed(other)


def test_a_cross_encoder(folders):
    plain = library.CrossEncoder(str(folders["BertForSequenceClassification"]), device="cpu")
    fast = optimize(copy.deepcopy(plain), "exact", target="reference", tokens_per_batch=60)
    before = packed(fast)
    np.testing.assert_allclose(fast.predict(PAIRS), plain.predict(PAIRS), atol=1e-5)
    assert packed(fast) > before
    batches = sum(c.packed for c in fast[0].model.counters)
    fast.rank("a question", TEXTS)
    assert (
        sum(c.packed for c in fast[0].model.counters)
        == batches + len(list(fast.predict._groups(PAIRS)))
        > batches + 1
    )
    ranks = [[r["corpus_id"] for r in m.rank("a question", TEXTS[:3])] for m in (plain, fast)]
    assert ranks[0] == ranks[1]


def test_what_cannot_be_is_refused(embedder, folders):
    plain, fast = embedder
    with pytest.raises(ArgumentError, match="optimized before"):
        optimize(fast)
    with pytest.raises(ArgumentError, match="a SentenceTransformer or CrossEncoder"):
        optimize(torch.nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="tokens_per_batch"):
        optimize(copy.deepcopy(plain), tokens_per_batch=0)
    with pytest.raises(NothingRewrittenError):
        optimize(copy.deepcopy(plain), {"rsq": True}, target="reference")
