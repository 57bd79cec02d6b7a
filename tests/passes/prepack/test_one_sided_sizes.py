"""A mask of sizes that change beside tokens of sizes that do not: torch may give a program one and not the other."""

import pytest
import torch
import transformers as hf
from sampled import sampled

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    pad_token_id=0,
)
OPTIONS = {"recipe": "exact", "target": "reference", "strict": True}  # a pass with a fault of its own raises


@pytest.mark.filterwarnings("ignore:thresher rewrote nothing")
@pytest.mark.parametrize(
    "kind, changing",
    sampled(
        [("bert", "input_ids"), ("llama", "attention_mask")],
        ["bert", "llama"],
        ["attention_mask", "input_ids"],
    ),
)
def test_sizes_of_one_input_alone(kind, changing):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config, make = {"bert": (hf.BertConfig, hf.BertModel), "llama": (hf.LlamaConfig, hf.LlamaModel)}[kind]
    model = make(config(**SMALL)).eval()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 4:] = 0
    batch = {"input_ids": torch.randint(1, 97, mask.shape), "attention_mask": mask}
    for dim in range(2):
        torch._dynamo.maybe_mark_dynamic(batch[changing], dim)
    fast = torch.compile(model, backend="thresher", options=OPTIONS)
    real = mask.bool()
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch)[0][real], model(**batch)[0][real], rtol=1e-4, atol=1e-5)
