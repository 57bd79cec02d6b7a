"""A snapshot notices every edit of a program, and nothing else."""

import dataclasses

import pytest
import torch

from thresher import explain, testing
from thresher.graph.program import Weight
from thresher.graph.snapshot import Snapshot

aten = torch.ops.aten


@pytest.fixture(scope="module")
def captured():
    return explain(*testing.tiny_model(layers=1), "none").before[0]


def adds(p):
    p.insert(p.output_node, aten.relu.default, p.nodes(aten.linear.default)[0])


def adds_an_input(p):
    with p.graph.inserting_before(p.placeholders[0]):
        p.graph.placeholder("more")


def removes(p):
    node = next(n for n in reversed(p.nodes()) if not n.users or n in p.outputs)
    p.output_node.args = ((p.nodes()[0],),)
    p.graph.erase_node(node)


def reads_another(p):
    first, second = p.nodes(aten.linear.default)[:2]
    first.replace_all_uses_with(second)


def changes_a_number(p):
    p.nodes(aten.unflatten.int)[0].update_arg(1, 1)


def changes_a_keyword(p):
    p.nodes(aten.scaled_dot_product_attention.default)[0].update_kwarg("is_causal", False)


def changes_an_operator(p):
    p.nodes(aten.relu.default)[0].target = aten.silu.default


def moves(p):
    first, second = p.nodes(aten.linear.default)[:2]
    first.append(second)


def reads_another_weight(p):
    p.nodes(aten.linear.default)[0].args[1].target = p.nodes(aten.linear.default)[1].args[1].target


def holds_another_weight(p):
    name, held = next(iter(p.weights.items()))
    p.weights[name] = dataclasses.replace(held, tensor=held.tensor.clone())


def adds_a_weight(p):
    p.add_weight(Weight("mine", torch.ones(1)))


def renames_an_input(p):
    p.input_names[0] = "tokens"


def sets_a_plan(p):
    p.calls = object()


EDITS = [
    adds, adds_an_input, removes, reads_another, changes_a_number, changes_a_keyword, changes_an_operator, moves,
    reads_another_weight, holds_another_weight, adds_a_weight, renames_an_input, sets_a_plan,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
def test_an_edit_is_seen(captured, edit):
    program = captured.copy()
    before = Snapshot(program)
    edit(program)
    assert before.edit(program) is not None
    assert Snapshot(program).edit(program) is None


def test_looking_is_no_edit(captured):
    program = captured.copy()
    before = Snapshot(program)
    program.text(), program.fingerprint(), program.copy().clean(), program.fake_mode()
    other = program.copy()
    adds(other)
    for node in program.graph.nodes:
        node.meta["seen"] = True
    assert before.edit(program) is None


def test_an_edit_that_was_undone_is_seen_too(captured):
    """A new node under an old name is another node."""
    program = captured.copy()
    before, old = Snapshot(program), program.nodes(aten.relu.default)[0]
    new = program.insert(old, aten.relu.default, old.args[0])
    old.replace_all_uses_with(new)
    program.graph.erase_node(old)
    assert before.edit(program) is not None
