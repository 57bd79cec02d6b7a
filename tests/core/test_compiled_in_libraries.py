"""A compiled model in transformers' Trainer and pipelines, and in accelerate: each runs the compiled one."""

import copy
import warnings

import pytest
import torch
from sampled import sampled

import thresher
from thresher.compiled import Compiled
from thresher.tools import models

transformers = pytest.importorskip("transformers")
SIZES = dict(
    vocab_size=30522, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
)
TEXTS = ["a short one", "another, which is rather longer than the first one", "third"]


@pytest.fixture(scope="module")
def loaded():
    return models.load("minilm")[1]


@pytest.fixture
def tokenizer(loaded):
    return copy.deepcopy(loaded)  # a pipeline sets its padding side


@pytest.fixture(scope="module")
def classifier(loaded):
    return build("BertForSequenceClassification", loaded)


def build(kind, tokenizer, **more):
    config = transformers.LlamaConfig if "Llama" in kind else transformers.BertConfig
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config(**SIZES, **more)).eval()
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    if "Llama" in kind:
        batch.pop("token_type_ids", None)
    return model, batch, thresher.compile(model, batch, "exact", target="reference", dynamic=True)


def calls(fast):
    return sum(c.calls for c in fast.counters)


TASKS = {
    "text-classification": ("BertForSequenceClassification", TEXTS, lambda a: [x["score"] for x in a]),
    "feature-extraction": ("BertModel", TEXTS, lambda a: [x[0][0][:4] for x in a]),
    "token-classification": (
        "BertForTokenClassification",
        TEXTS,
        lambda a: [[t["score"] for t in x] for x in a],
    ),
    "text-generation": ("LlamaForCausalLM", TEXTS, lambda a: [x[0]["generated_text"] for x in a]),
}


@pytest.mark.parametrize("task", sampled(["text-classification", "text-generation"], list(TASKS)))
def test_pipelines_run_the_compiled_model(task, tokenizer, request):
    kind, texts, picked = TASKS[task]
    classifies = task == "text-classification"
    model, _, fast = request.getfixturevalue("classifier") if classifies else build(kind, tokenizer)
    before = calls(fast)
    tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    more = {"max_new_tokens": 3, "do_sample": False} if task == "text-generation" else {}
    results = []
    for each in (model, fast):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = transformers.pipeline(task, model=each, tokenizer=tokenizer, device="cpu")
            results.append(picked(pipe(texts, batch_size=len(texts), **more)))
    assert calls(fast) > before
    if task == "text-generation":
        assert results[0] == results[1]
    else:
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(torch.tensor(b), torch.tensor(a), atol=1e-5, rtol=1e-4)


def test_trainer_predicts_with_the_compiled_model(classifier, tmp_path):
    model, batch, fast = classifier
    rows = [{k: v[i] for k, v in batch.items()} | {"unused": 1} for i in range(len(TEXTS))]
    before = calls(fast)
    found = []
    for each in (model, fast):
        told = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
        trainer = transformers.Trainer(each, told)
        assert not isinstance(each, Compiled) or isinstance(trainer.model, Compiled)
        found.append(trainer.predict(rows).predictions)
    assert calls(fast) > before
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_prepares_the_compiled_model(classifier, precision):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    model, batch, fast = classifier
    if precision == "bf16":
        fast = copy.copy(fast)  # accelerate sets its forward
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    before = calls(fast)
    ready = accelerator.prepare_model(fast, evaluation_mode=True)
    assert isinstance(ready, Compiled)
    with torch.no_grad():
        got, expected = ready(**batch).logits, model(**batch).logits
    assert calls(fast) > before
    close = {"atol": 1e-5, "rtol": 1e-4} if precision == "no" else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(got.float(), expected, **close)
    back = accelerator.unwrap_model(ready, keep_fp32_wrapper=False)
    before = calls(fast)
    back(**batch)
    assert isinstance(back, Compiled) and calls(fast) > before
    accelerate.state.AcceleratorState._reset_state(True)
