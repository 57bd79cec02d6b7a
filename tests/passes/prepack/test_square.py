"""As many rows as tokens a row, with dynamic sizes: torch gives both one symbol."""

import pytest
import torch
import transformers as hf

import thresher

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


@pytest.mark.filterwarnings("ignore:thresher rewrote nothing")
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_square_batch_runs_padded_and_the_next_one_is_packed(kind):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config, make = {"bert": (hf.BertConfig, hf.BertModel), "llama": (hf.LlamaConfig, hf.LlamaModel)}[kind]
    model = make(config(**SMALL)).eval()
    square = batch(8, 8)
    compiled = thresher.compile(model, square, "exact", dynamic=True, target="reference")
    (miss,) = compiled.sessions[0].report["prepack"].missed
    assert "8 rows of as many tokens" in miss.reason
    for given in (square, batch(4, 9)):
        real = given["attention_mask"].bool()
        with torch.no_grad():
            want = model(**given)[0][real]
        torch.testing.assert_close(compiled(**given)[0][real], want, rtol=1e-4, atol=1e-5)
    assert compiled.report["prepack"].rewritten
