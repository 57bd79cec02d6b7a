"""Adding an operator is its own folder and one line of the catalog: nothing else names it, and everything knows it."""

import importlib
import sys
import textwrap

import pytest
import small_programs
import torch

import thresher.kernels
from thresher import ops
from thresher.kernels import catalog
from thresher.lowering.catalog import TARGETS
from thresher.lowering.coverage import coverage
from thresher.lowering.decompose import decompose, own_nodes
from thresher.lowering.providers import provider_notes
from thresher.machine import device_rates
from thresher.machine.devices import DEVICES, Surface
from thresher.passes.cost.model import CostModel
from thresher.passes.tokens.axes import BATCH, SEQUENCE, propagate

FAMILY = '''
"""Linears over weights kept as signs and one scale a row: `thresher::sign_linear`."""

import torch
from torch import fx

from thresher.graph.nodes import argument
from thresher.graph.token_labels import row_by_row
from thresher.pricing import LinearRate, Prices, dtype_of
from thresher.ops import Sample, define
from thresher.plain_form import Plain, Spelling


def _samples(device, dtype):
    make = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, generator=make).to(device, dtype)
    signs = torch.rand(4, 8, generator=make).lt(0.5).to(device)
    scale = torch.rand(4, generator=make).to(device, dtype)
    return [Sample("batch", (x, signs, scale)), Sample("shifted", (x, signs, scale, 0.5))]


def _price(model: Prices, node: fx.Node) -> float:
    weights = model.numel(argument(node, "signs"))
    rows = model.numel(node) / max(model.numel(argument(node, "scale")), 1)
    return model.linear(rows, weights, dtype_of(node), "sign_linear", bits=1)


def _plain(x, signs, scale, shift=0.0):
    weight = torch.where(signs, 1.0, -1.0).to(x.dtype) * scale[:, None]
    return torch.nn.functional.linear(x, weight) + shift


def _spell(spelling: Spelling, node: fx.Node) -> fx.Node:
    x, signs, scale = node.args[:3]
    ones = spelling.constant("sign_linear.values", node, torch.tensor([-1.0, 1.0]))
    weight = spelling.once((signs, scale), node, lambda v, b, s: v[b.long()] * s[:, None], [ones, signs, scale])
    shift = argument(node, "shift")
    return spelling.traced(node, lambda x, w: torch.nn.functional.linear(x, w) + shift, [x, weight])


def _weight(side):
    return torch.rand(side, side) < 0.5, torch.ones(side)


@define(
    "sign_linear(Tensor x, Tensor signs, Tensor scale, float shift=0.0) -> Tensor",
    fake=lambda x, signs, scale, shift=0.0: x.new_empty((*x.shape[:-1], signs.shape[0])),
    inputs=_samples,
    tolerance={torch.float32: 1e-6},
    providers=("quick",),
    price=_price,
    tokens=row_by_row,
    plain=Plain(run=_plain, spell=_spell, loss="It widens its weights: no exported operator reads signs."),
    rates=[LinearRate("sign_linear", _weight, lambda x, *weight: sign_linear(x, *weight))],
)
def sign_linear(x, signs, scale, shift=0.0):
    rows = [(torch.where(s, x, -x)).sum(-1) * c for s, c in zip(signs, scale)]
    return torch.stack(rows, -1) + shift


@sign_linear.provider("quick", device="cpu")
def _quick(x, signs, scale, shift=0.0):
    return _plain(x, signs, scale, shift)
'''


@pytest.fixture
def op(tmp_path, monkeypatch):
    """The family above, added as anyone would: a folder among the kernels and a line in the catalog."""
    folder = tmp_path / "signs"
    folder.mkdir()
    (folder / "__init__.py").write_text(textwrap.dedent(FAMILY))
    monkeypatch.setattr(thresher.kernels, "__path__", [*thresher.kernels.__path__, str(tmp_path)])
    monkeypatch.setattr(catalog, "FAMILIES", (*catalog.FAMILIES, "signs"))
    if "thresher.kernels.signs" in sys.modules:  # its schema can be defined once in a process
        yield ops._OPS.setdefault("sign_linear", sys.modules["thresher.kernels.signs"].sign_linear)
    else:
        importlib.invalidate_caches()
        catalog.load()
        yield ops.get("sign_linear")
    del ops._OPS["sign_linear"]  # other tests ask for all operators


def two_linears(op):
    """A Program of two such linears over the same weights, and a call of it."""
    signs, scale = torch.rand(8, 8) < 0.5, torch.rand(8)
    given = {"x": torch.randn(2, 5, 8)}

    def function(x, signs, scale):
        return op.overload(torch.relu(op.overload(x, signs, scale)), signs, scale, 0.25)

    return small_programs.program(function, given, {"signs": signs, "scale": scale}), list(given.values())


def test_a_family_in_a_folder_of_its_own_is_known_everywhere(op):
    program, given = two_linears(op)
    expected = program.run(*given)

    for sample in op.inputs(torch.device("cpu"), torch.float32):
        torch.library.opcheck(op.overload, sample.args)
        torch.testing.assert_close(op(*sample.args), op.reference(*sample.args), rtol=1e-6, atol=1e-6)

    node = program.nodes(op.overload)[0]
    cost = CostModel(DEVICES["H100"])
    assert cost.node(node) == cost.linear(10, 64, "float32", bits=1) < cost.linear(10, 64, "float32")
    cost.device.surfaces["sign_linear"] = Surface((1, 16), (1, 64), ((3.0, 3.0), (3.0, 3.0)))
    try:
        assert cost.node(node) == pytest.approx(3.0)
    finally:
        del cost.device.surfaces["sign_linear"]

    axes = propagate(program, {program.placeholders[0]: (BATCH, SEQUENCE, None)})
    assert not axes.stopped and axes[program.outputs[0]] == (BATCH, SEQUENCE, None)

    for target in TARGETS:
        entries = coverage(program, target).entries
        runs_it = target in ("reference", "inductor", "aoti", "tensorrt")
        assert [e.how for e in entries] == ["native" if runs_it else "fallback"] * 2, target
        assert runs_it or all("widens" in e.reason for e in entries)
    assert provider_notes(program) == ["thresher::sign_linear runs 2 times on quick."]

    plain = program.copy()
    decompose(plain)
    assert not own_nodes(plain) and len(plain.nodes(torch.ops.aten.linear.default)) == 2
    assert (
        len(plain.nodes(torch.ops.aten.where.self)) == 0
    )  # spelled with the shared weight, not traced twice
    assert len(plain.nodes(torch.ops.aten.index.Tensor)) == 1
    for actual, wanted in zip(plain.run(*given), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)

    cases = {kernel: make for kernel, _, _, make in device_rates._cases((1,), (8,), ())}
    assert cases["sign_linear"]()().shape == (1, 8)


def test_tokens_that_its_rule_stops_are_said_with_the_reason(op):
    program, _ = two_linears(op)
    axes = propagate(program, {program.placeholders[0]: (BATCH, None, SEQUENCE)})
    assert "sums over the sequence dimension" in axes.stopped[program.nodes(op.overload)[0]]


def test_every_provider_that_a_definition_names_is_there():
    """One whose file the folder's `__init__` forgot to import would be missed by nobody else."""
    for known in ops.all_ops():
        assert [p.name for p in known.providers][: len(known.preference)] == list(known.preference), (
            known.name
        )
