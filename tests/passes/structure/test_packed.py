"""Recovery takes deep models, and finds the same structure in a packed program."""

import captures
import pytest
import transformers as hf
import zoo
from sampled import sampled

import thresher.backend  # noqa: F401  (registers the operators that a packed graph holds)
from thresher.passes.pipeline import Pipeline
from thresher.passes.structure.recover import recover
from thresher.recipe import Recipe


def test_twelve_layers():
    config = hf.LlamaConfig(
        vocab_size=96, hidden_size=36, intermediate_size=48, num_attention_heads=9, num_key_value_heads=3,
        num_hidden_layers=12, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    structure = recover(captures.export(hf.LlamaForCausalLM(config).eval(), zoo.tokens()))
    assert len(structure.layers) == 12 and structure.missed == [] and structure.head.tied


@pytest.mark.parametrize("name", sampled(["llama", "bert"], ["llama", "gpt2", "bert"]))
def test_a_packed_program_has_the_same_structure(name):
    program = captures.of_zoo(name, "dynamo-dynamic")
    packed, report = Pipeline(Recipe.of({"prepack": {}})).run(program)
    assert report.rewritten == 1
    before, after = recover(program), recover(packed)
    assert {a.spelling for a in after.attentions} == {"varlen"}
    for old, new in zip(before.attentions, after.attentions, strict=True):
        assert (new.fqn, new.visibility, new.heads, new.kv_heads) == (
            old.fqn,
            old.visibility,
            old.heads,
            old.kv_heads,
        )
        assert new.scale == pytest.approx(old.scale) and new.q.rows.equal(old.q.rows)
    assert [layer.fqn for layer in after.layers] == [layer.fqn for layer in before.layers]
    assert [m.weight_fqn for m in after.linears] == [m.weight_fqn for m in before.linears][
        : len(after.linears)
    ]
    assert {e.kind for e in after.embeddings} == {e.kind for e in before.embeddings}
    for layer in after.layers:
        assert layer.complete and {"cu_seqlens", "max_len"} <= {n.name for n in layer.inputs}
