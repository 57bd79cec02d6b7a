"""As many rows as tokens a row, with dynamic sizes: torch gives both one symbol."""

import pytest
import torch
import transformers as hf

import thresher
from thresher import sessions

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    pad_token_id=0,
)


def batch(rows, columns):
    mask = torch.ones(rows, columns, dtype=torch.long)
    mask[0, columns // 2 :] = 0
    return {"input_ids": torch.randint(1, 97, mask.shape), "attention_mask": mask}


@pytest.fixture(params=[pytest.param("bert", marks=pytest.mark.thorough), "llama"])
def model(request):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config, make = {"bert": (hf.BertConfig, hf.BertModel), "llama": (hf.LlamaConfig, hf.LlamaModel)}[
        request.param
    ]
    return make(config(**SMALL)).eval()


def check(model, call, *batches):
    for given in batches:
        real = given["attention_mask"].bool()
        with torch.no_grad():
            want, got = model(**given)[0][real], call(**given)[0][real]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_square_example_is_packed_and_so_is_every_other_shape(model):
    compiled = thresher.compile(model, batch(8, 8), "exact", dynamic=True, target="reference")
    check(model, compiled, batch(8, 8), batch(4, 9), batch(9, 9))
    assert len(compiled.sessions) == 1 and compiled.counters[0].packed == 4


@pytest.mark.filterwarnings("ignore:thresher rewrote nothing")
def test_torch_compile_runs_a_square_batch_padded_and_the_next_one_packed(model):
    options = {"recipe": "exact", "target": "reference"}
    fast = torch.compile(model, backend="thresher", dynamic=True, options=options)
    check(model, fast, batch(8, 8))
    (miss,) = sessions.recent()[-1].report["prepack"].missed
    assert "8 rows of as many tokens" in miss.reason
    check(model, fast, batch(4, 9))
    assert sessions.recent()[-1].report["prepack"].rewritten
