"""AttnCon on a model that folds the scale of attention into its queries and keys."""

import captures
import torch
from factored import factored
from tiny_llama import make, prompt

from thresher.graph.nodes import value
from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.quantizer.scores import _attention, scorer
from thresher.passes.structure.recover import recover


@torch.no_grad()
def test_the_factors_count_once():
    model, found = make(), []
    for each, factors in ((model, (1.0, 1.0)), (factored(model), (64 * 8**-0.5, 0.25))):
        program = captures.once(each, dict(input_ids=prompt()))
        layer = recover(program).layers[0]
        one = scorer(program, layer, RSQConfig(importance="attncon"))
        draw, values = torch.Generator().manual_seed(0), {}
        for node in one.targets[2:]:
            values[node] = torch.ones(value(node).shape, dtype=torch.bool).tril()
        for node, factor in zip(
            one.targets[:2], factors, strict=True
        ):  # what the operator is given, of the same projections
            values[node] = torch.randn(value(node).shape, generator=draw) * 2 * factor
        found.append(_attention(one.site, one.targets, values, None))
    torch.testing.assert_close(found[1], found[0])
