"""Prepacking through Inductor: exact, and few compilations over many shapes."""

import masks
import pytest
import torch
import transformers as hf
import zoo

import thresher

pytestmark = pytest.mark.slow


def test_random_shapes_compile_a_handful_of_programs():
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                           num_hidden_layers=1, max_position_embeddings=64)  # fmt: skip
    model = hf.BertModel(config, add_pooling_layer=False).eval()
    torch._dynamo.reset()
    ours = torch.compile(model, backend="thresher")
    draw = torch.Generator().manual_seed(0)
    counts = []
    with torch.no_grad(), thresher.sessions.collect() as made:
        for _ in range(30):
            rows, width = (int(torch.randint(2, 60, (), generator=draw)) for _ in range(2))
            lengths = torch.randint(1, width + 1, (rows,), generator=draw).tolist()
            mask = masks.right([*lengths[1:], width])
            inputs = zoo.tokens(mask)
            torch.testing.assert_close(
                ours(**inputs).last_hidden_state[mask.bool()],
                model(**inputs).last_hidden_state[mask.bool()],
                atol=1e-5,
                rtol=1e-5,
            )
            counts.append(sum(s.counters.lowered for s in made))
    assert len(made) <= 3 and counts[-1] <= 6
    assert counts[-1] == counts[9], "something was compiled after the first ten batches"
    assert sum(s.counters.packed for s in made) >= 28
