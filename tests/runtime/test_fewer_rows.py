"""A program captured for a fixed number of rows gives the same for fewer, or says that it cannot be told."""

from __future__ import annotations

import captures
import pytest
import torch
import zoo
from sampled import sampled

from thresher import backend
from thresher.graph import capture
from thresher.kernels import catalog
from thresher.lowering.reference import Reference
from thresher.recipe import Recipe
from thresher.runtime.compare import run_plainly
from thresher.runtime.fewer_rows import Untold, first_rows, rows_of, with_fewer_rows
from thresher.runtime.judge import Judge

catalog.load()
ROWS, FEW = 9, 2


def many_rows(name, dtype=torch.float32):
    """A zoo model captured for nine rows of twelve columns, with its inputs."""
    model, inputs = zoo.ZOO[name].build()
    inputs = {k: v.repeat(3, 1) for k, v in inputs.items()}
    program = captures.dynamo(model.to(dtype), inputs)
    return program, captures.arguments(program, inputs)


@pytest.mark.parametrize("name", sampled(["bert", "gemma3"], ["bert", "modernbert", "llama", "gemma3"]))
def test_fewer_rows_give_what_the_whole_gives_for_them(name):
    program, inputs = many_rows(name)
    assert rows_of(program) == ROWS
    before = program.text()
    few = with_fewer_rows(program, ROWS, FEW)
    assert program.text() == before and few.text() != before
    whole, part = (
        run_plainly(program, inputs, Reference()),
        run_plainly(few, first_rows(inputs, FEW), Reference()),
    )
    for w, p in zip(first_rows(whole, FEW), part, strict=True):
        torch.testing.assert_close(p, w, rtol=1e-4, atol=1e-5)


def test_a_size_that_cannot_be_told_is_refused():
    class Rows(torch.nn.Module):
        def forward(self, input_ids):
            return sum(input_ids.float().split([4, 5], 0)[0].sum() for _ in range(2))

    x = torch.randint(0, 9, (ROWS, 4))
    program = capture.from_export(torch.export.export(Rows(), (x,)))
    with pytest.raises(Untold, match="split"):
        with_fewer_rows(program, ROWS, FEW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packing_is_judged_on_few_rows_of_a_fixed_batch(dtype):
    program, inputs = many_rows("bert", dtype)
    with torch.no_grad():
        account = backend.run_pipeline(program, Recipe.of(prepack=True), inputs)[1].passes[0]
    assert account.rewritten and account.own is not None and account.error <= account.budget
    assert account.checked == ["other lengths (12, 1)", "the example (9 x 12)", "permuted"]


def test_a_copy_that_gives_something_else_is_not_used():
    """Each row less the mean over all rows: the same graph for two rows gives other numbers."""

    class Centred(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            x = (input_ids * attention_mask).float()
            return x - x.mean(0)

    torch.manual_seed(0)
    ids, mask = torch.randint(1, 90, (ROWS, 12)), torch.ones(ROWS, 12, dtype=torch.long)
    exported = torch.export.export(Centred(), (), {"input_ids": ids, "attention_mask": mask})
    program = capture.from_export(exported)
    judge = Judge(program, [ids, mask], Reference())
    assert judge.small is None
    assert [b.rows for b in judge.all] == [None, None, None]


def test_what_is_wrong_on_few_rows_alone_is_judged_by_the_whole(monkeypatch):
    """A rewritten program whose copy is wrong, not the program itself, is kept."""
    from thresher.runtime import runs

    made = runs.with_fewer_rows

    def damaged(program, rows, few):
        copy = made(program, rows, few)
        if program.packing is not None:  # the rewritten one
            node = copy.nodes(torch.ops.aten.linear.default)[0]
            twice = copy.insert(node.next, torch.ops.aten.mul.Tensor, node, 2.0)
            node.replace_all_uses_with(twice, delete_user_cb=lambda u: u is not twice)
            copy.graph_module.recompile()
        return copy

    monkeypatch.setattr(runs, "with_fewer_rows", damaged)
    program, inputs = many_rows("bert")
    with torch.no_grad():
        account = backend.run_pipeline(program, Recipe.of(prepack=True), inputs)[1].passes[0]
    assert account.rewritten and "other lengths (12, 1, 2, 3, 6, 11, ...)" in account.checked
