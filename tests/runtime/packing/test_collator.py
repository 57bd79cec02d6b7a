"""Training on joined sequences gives the loss and gradients of training on padded ones."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.errors import ArgumentError
from thresher.runtime.packing.collator import IGNORE, PackingCollator, block_mask


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=9), st.one_of(st.none(), st.integers(9, 30)))
def test_every_token_is_there_once_with_its_position_and_label(lengths, capacity):
    features = [{"input_ids": [100 * i + j for j in range(n)]} for i, n in enumerate(lengths)]
    batch = PackingCollator(capacity, pad_token_id=-1)(features)
    ids, segment = batch["input_ids"], batch["segment_ids"]
    real = segment > 0
    assert sorted(ids[real].tolist()) == sorted(t for f in features for t in f["input_ids"])
    assert ids[~real].eq(-1).all() and ids.shape[1] <= (capacity or sum(lengths))
    assert torch.equal(batch["position_ids"][real], ids[real] % 100)
    expected = torch.where(real & (ids % 100 > 0), ids, IGNORE)
    assert torch.equal(batch["labels"], expected)
    ends = batch["cu_seqlens"].tolist()
    assert ends[0] == 0 and ends[-1] == ids.numel() and batch["cu_seqlens"].dtype == torch.int32
    for begin, end in pairwise(ends):
        flat = ids.reshape(-1)[begin:end]
        assert end > begin and (flat // 100 == flat[0] // 100).all()
    if capacity is None:
        assert ids.shape[0] <= 1 and real.all()


def test_own_labels_and_tensors_are_taken():
    features = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([IGNORE, IGNORE, 7])}]
    assert PackingCollator()(features)["labels"].tolist() == [[IGNORE, IGNORE, 7]]


@pytest.mark.parametrize(
    "feature, word",
    [
        ({"input_ids": [1, 2], "labels": [1]}, "one label for each token"),
        ({"input_ids": [[1, 2]]}, "flat sequence"),
        ({"input_ids": [1] * 9}, "capacity"),
    ],
)
def test_bad_features_are_refused(feature, word):
    with pytest.raises(ArgumentError, match=word):
        PackingCollator(8)([feature])


def test_block_mask_lets_padding_see_only_itself():
    mask = block_mask(torch.tensor([[1, 1, 2, 0, 0]]))
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    both_ways = block_mask(torch.tensor([[1, 1, 2, 0, 0]]), causal=False)
    assert torch.equal(both_ways, mask | mask.mT)


def _tiny_llama():
    transformers = pytest.importorskip("transformers", reason="needs pip install 'thresher[demo]'")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("capacity", [None, 16])
def test_loss_and_gradients_equal_the_padded_batchs(capacity):
    model = _tiny_llama()
    make = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 50, (n,), generator=make) for n in (3, 12, 1, 7, 16)]
    width = max(map(len, prompts))
    padded = torch.stack([torch.nn.functional.pad(p, (0, width - len(p))) for p in prompts])
    mask = torch.arange(width) < torch.tensor([[len(p)] for p in prompts])
    expected = model(input_ids=padded, attention_mask=mask.long(), labels=padded.where(mask, IGNORE)).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    batch = PackingCollator(capacity)([{"input_ids": p} for p in prompts])
    loss = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=block_mask(batch["segment_ids"]),
        labels=batch["labels"],
        use_cache=False,
    ).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
