"""Files that an earlier version wrote still load, and give what they gave then.

`tests/data/written_before` holds a saved model, a quantization, and a file with the model's weights, one call, and what each
gave for it; all were written before the folders of this project were laid anew.
"""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import thresher

FOLDER = Path(__file__).resolve().parents[2] / "data" / "written_before"


@pytest.fixture(scope="module")
def before():
    """The weights, the call, and the logits of both files, by "model/...", "in/..." and "out/..."."""
    return load_file(FOLDER / "llama-expected.safetensors")


def call(before):
    return {name: before[f"in/{name}"] for name in ("input_ids", "attention_mask")}


def close_at_real_tokens(actual, expected, mask):
    torch.testing.assert_close(actual[mask == 1], expected[mask == 1], rtol=1e-5, atol=1e-5)


def test_a_saved_model(before):
    loaded = thresher.load(FOLDER / "llama-exact-nvfp4.thresher", target="reference")
    logits = loaded(**call(before))["logits"]
    close_at_real_tokens(logits, before["out/nvfp4"], before["in/attention_mask"])
    assert loaded.counters.packed == 1


def test_a_quantization(before):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({n.removeprefix("model/"): t for n, t in before.items() if n.startswith("model/")})
    recipe, stats = {"prepack": True, "rsq": True}, FOLDER / "llama-rsq4.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error", thresher.ThresherWarning)
        fast = thresher.compile(model, call(before), recipe, stats=str(stats), target="reference")
    assert fast.report["rsq"].rewritten
    logits = fast(**call(before)).logits
    close_at_real_tokens(logits, before["out/rsq"], before["in/attention_mask"])
