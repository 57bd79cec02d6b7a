"""A model that Dynamo cuts in two hands one row of positions on for all rows; it runs at any number of rows."""

import pytest
import torch

import thresher


class Cut(torch.nn.Module):
    """Adds what is the same for all rows, [1, tokens, 8], behind a graph break."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(16, 8)
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None):
        places = torch.arange(input_ids.shape[1])[None, :, None] * torch.ones(8)
        torch._dynamo.graph_break()
        return self.linear(self.embed(input_ids) * places)


@pytest.mark.filterwarnings("ignore::thresher.ThresherWarning")
@pytest.mark.parametrize("dynamic", [True, None])
def test_a_cut_model_runs_at_any_number_of_rows(dynamic):
    model = Cut().eval()
    ids = torch.arange(12).view(3, 4)
    torch._dynamo.reset()
    options = {"nvfp4": {"min_weights": 0, "budget": 9.0}}
    ours = thresher.compile(model, {"input_ids": ids}, options, target="reference", dynamic=dynamic)
    for rows in (ids, ids[:1], ids[:2, :3].contiguous(), ids):
        with torch.no_grad():
            expected = model(input_ids=rows)
        assert (ours(input_ids=rows) - expected).norm() <= 0.3 * expected.norm()
