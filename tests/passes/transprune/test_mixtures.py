"""Layers with experts, which merge rows and tokens; and what turns out to be impossible only while it is done."""

import captures
import pytest
import torch
from pruned import by_hand, pruned
from tiny_llama import IMAGE, SIZES, make, prompt
from transformers import MixtralConfig, MixtralForCausalLM

from thresher.graph.token_labels import BATCH, SEQUENCE, TOKENS, Stop
from thresher.passes.pipeline import Pipeline
from thresher.passes.tokens.axes import propagate
from thresher.recipe import Recipe

OPTIONS = dict(stages=((1, 0.5),), image_token_id=IMAGE, min_image_tokens=2, bucket=1, min_saving=-9.0, policy="uniform",
               restore="none")  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2])
def test_experts_run_on_kept_tokens(rows):
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    ).eval()
    ids = prompt(rows)
    logits, extras = pruned(model, dict(input_ids=ids), OPTIONS)
    with torch.no_grad():
        expected, at = by_hand(model, ids, {1: extras["kept.1"]})
    assert logits.shape[1] == at.shape[1] == 32
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


class OneRow(torch.nn.Module):
    """Takes a batch of one row apart and back, by sizes or by dimensions of one."""

    def __init__(self, by_sizes: bool):
        super().__init__()
        self.by_sizes, self.linear = by_sizes, torch.nn.Linear(8, 8)

    def forward(self, x):
        flat = x.view(-1, 8) if self.by_sizes else x.squeeze(0)
        made = self.linear(flat)
        return x + (made.view(1, x.shape[1], 8) if self.by_sizes else made.unsqueeze(0))


@pytest.mark.parametrize("by_sizes", [True, False])
def test_one_rows_tokens_are_followed(by_sizes):
    program = captures.of_module(OneRow(by_sizes), x=torch.randn(1, 5, 8))
    axes = propagate(program, {program.placeholders[-1]: (BATCH, SEQUENCE, None)})
    labels = [axes[n] for n in program.nodes()]
    assert (
        not axes.stopped and (TOKENS, None) in labels and axes[program.outputs[0]] == (BATCH, SEQUENCE, None)
    )


def test_what_cannot_be_done_is_left_and_said(monkeypatch):
    """Found while the copy was edited: the program is as it was, and the reason is no fault of anybody's."""

    def prune(program, *_):
        program.output_node.args = ((),)
        raise Stop("layer 1 sums over the tokens")

    monkeypatch.setattr("thresher.passes.transprune.transprune.prune", prune)
    program = captures.once(make(), dict(input_ids=prompt(1)))
    after, report = Pipeline(Recipe.of(None, verify=False, transprune=OPTIONS), inputs=[prompt(1)]).run(
        program
    )
    (missed,) = report["transprune"].missed
    assert missed.reason.endswith("layer 1 sums over the tokens.") and not report["transprune"].rewritten
    given = captures.arguments(program, dict(input_ids=prompt(1)))
    assert torch.equal(after.run(*given)[0], program.run(*given)[0])
