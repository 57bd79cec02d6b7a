"""Where few positions of a row are read, the gather moves before the layers that nothing else reads."""

import torch
from captures import of_module

import thresher
from thresher import testing
from thresher.graph.nodes import value
from thresher.kernels import catalog
from thresher.passes.prepack.early_gather import gather_early

aten = torch.ops.aten
catalog.load()


class TestEarlyGather:
    def test_a_selection_passes_the_head_and_a_soft_cap(self):
        class Head(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.head = torch.nn.Linear(8, 30)

            def forward(self, x):
                return (torch.tanh(self.head(x) / 3.0) * 3.0)[:, -1]

        module, x = Head().eval(), torch.randn(3, 5, 8)
        program = of_module(module, x=x)
        assert gather_early(program) == 1
        program.clean()
        (head,) = program.nodes(aten.linear.default)
        assert tuple(head.meta["val"].shape) == (3, 30)
        torch.testing.assert_close(program.run(x)[0], module(x))

    def test_what_is_read_whole_as_well_stays(self):
        class Both(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.head = torch.nn.Linear(8, 30)

            def forward(self, x):
                y = self.head(x)
                return y, y[:, -1]

        program = of_module(Both().eval(), x=torch.randn(3, 5, 8))
        assert gather_early(program) == 0

    def test_a_selection_of_features_stays(self):
        class Part(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.head = torch.nn.Linear(8, 30)

            def forward(self, x):
                return self.head(x)[:, :, 3]

        assert gather_early(of_module(Part().eval(), x=torch.randn(3, 5, 8))) == 0


def test_what_is_selected_early_is_said_where_it_was_done_though_nothing_is_packed():
    class Last(testing.TinyTransformer):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids, attention_mask)[:, -1]

    one = {k: v[:1] for k, v in testing.tiny_model()[1].items()}  # one row: packing declines
    found = thresher.explain(Last().eval(), one, prepack=True)
    assert not found.report["prepack"].rewritten and not found.report["prepack"].notes
    heads = [p.nodes(aten.linear.default)[-1] for p in (found.before[0], found.after[0])]
    assert [value(h).dim() for h in heads] == [3, 2]
    assert any("selected before the LM head" in note for note in found.report.notes)
