"""A token that a near tie sends to another expert is not called wrong; one sent there by no tie is, or rounded otherwise."""

from __future__ import annotations

import captures
import mixtures
import pytest
import torch

from thresher import backend
from thresher.lowering.reference import Reference
from thresher.recipe import Recipe
from thresher.runtime import choices
from thresher.runtime.compare import as_packed
from thresher.runtime.judge import Judge

aten = torch.ops.aten
PICKS = {
    "topk": (lambda s: s.topk(1, dim=-1).indices.squeeze(-1), aten.topk.default),
    "argmax": (lambda s: s.argmax(-1), aten.argmax.default),
    "max": (lambda s: s.max(-1).indices, aten.max.dim),
}


class Routed(torch.nn.Module):
    """Tokens that score 100 for one of two experts, and `gap` more for the other: every value is exact in bf16."""

    def __init__(self, gap, pick):
        super().__init__()
        self.scores, self.experts, self.pick = torch.nn.Embedding(64, 2), torch.nn.Embedding(2, 32), pick
        token = torch.arange(64)
        self.scores.weight.data = 100 + gap * torch.nn.functional.one_hot(token % 2, 2).float()
        self.experts.weight.data = torch.stack([torch.arange(32.0), -torch.arange(32.0)])

    def forward(self, ids):
        scores = self.scores(ids)
        return self.experts(self.pick(scores)) + 1


def coarser(program, node, by):
    """The program whose `node` reads its first argument rounded as a bf16 sum with `by` is: the same in fp32."""
    given = node.args[0]
    half = program.insert(node, torch.ops.prims.convert_element_type.default, given, torch.bfloat16)
    more = program.insert(node, aten.sub.Tensor, program.insert(node, aten.add.Tensor, half, by), by)
    node.update_arg(
        0, program.insert(node, torch.ops.prims.convert_element_type.default, more, given.meta["val"].dtype)
    )


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize(
    ("gap", "by", "results", "holds"),
    [(1, 256, 0, True), (10, 4096, 0, False), (1, 256, 256, False)],
    ids=["near tie", "no tie", "near tie, and results rounded otherwise"],
)
def test_a_choice_on_a_near_tie_may_fall_otherwise(pick, gap, by, results, holds):
    chosen, target = PICKS[pick]
    ids = torch.arange(52).view(4, 13)
    program = captures.dynamo(Routed(gap, chosen).to(torch.bfloat16).eval(), {"ids": ids})
    inputs = captures.arguments(program, {"ids": ids})
    after = program.copy()
    coarser(after, next(iter(after.nodes(target))), by)
    if results:
        coarser(after, after.outputs[0], results)
    with torch.no_grad():
        verdict = Judge(program, inputs, Reference()).exact(program, after, 1e-2)
    assert verdict.holds == holds, verdict.why
    assert holds or verdict.error > 0.02


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_a_packed_mixture_is_followed_to_other_experts(kind, monkeypatch):
    """The captured program, padded, is given the picks of the packed one's tokens, at each token its own."""
    model, given = mixtures.build(kind).to(torch.bfloat16), mixtures.batch()
    program = captures.dynamo(model, given)
    torch.manual_seed(1)  # a batch in which coarser scores send tokens elsewhere
    inputs = captures.arguments(program, mixtures.batch())
    with torch.no_grad():
        after, report = backend.run_pipeline(program, Recipe.of(prepack=True), inputs)
        assert report.passes[0].rewritten and after.packing is not None
        for node in after.nodes(aten.topk.default):
            coarser(after, node, 4.0)
        verdict = Judge(program, inputs, Reference()).exact(program, after, 1e-2)
        assert verdict.holds and verdict.error < 0.03, verdict.why
        packed, inputs = as_packed(program, after, inputs)
        real = inputs[after.packing.mask] != 0
        picks = choices.run(packed, inputs, Reference())[1]
        assert picks.picked and not choices.run(program, inputs, Reference(), picks, real)[1].unlike
        real[0, 0] = False
        assert choices.run(program, inputs, Reference(), picks, real)[1].unlike
        monkeypatch.setattr(choices, "alike", lambda *given: None)
        alone = Judge(program, inputs, Reference()).exact(program, after, 1e-2)
        assert not alone.holds and alone.error > 0.1, "no token went elsewhere: the test shows nothing"
