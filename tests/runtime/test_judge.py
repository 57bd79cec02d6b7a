"""The proof knows the precision: it keeps what only rounds, and finds what is wrong, in every dtype."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import captures
import pytest
import torch
import zoo
from sampled import sampled
from wrong_attention import next_segment_too, other_scale, read_as_fp32

from thresher import backend, ops
from thresher.compiled import specialized_floats
from thresher.graph import autocast
from thresher.kernels import catalog
from thresher.passes import base
from thresher.recipe import CONFIGS, PassConfig, Recipe
from thresher.runtime import batches

aten = torch.ops.aten
catalog.load()
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = ["fp32", "bf16", "fp16", "autocast"]
HALVES = ["bf16", "fp16", "autocast"]
MODELS = ["bert", "roberta", "modernbert", "llama", "qwen3", "gemma3"]


@functools.cache
def case(name, dtype):
    """A zoo model captured as it runs in that dtype, with its inputs in the program's order."""
    model, inputs = zoo.ZOO[name].build()
    model = model.to(HALF.get(dtype, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
        program = captures.dynamo(model, inputs)
    return program, captures.arguments(program, inputs)


def account_of(name, dtype, **options):
    program, inputs = case(name, dtype)
    recipe = Recipe.of(options or {"prepack": True})
    with torch.no_grad():
        report = backend.run_pipeline(program, recipe, inputs)[1]
    return report.passes[0]


@pytest.mark.parametrize(
    "name, dtype",
    sampled(
        [
            *(("bert", dtype) for dtype in HALVES),
            ("llama", "autocast"),
            ("roberta", "fp16"),
            ("modernbert", "autocast"),
            ("qwen3", "bf16"),
            ("gemma3", "fp16"),
        ],
        MODELS,
        HALVES,
    ),
)
def test_packing_is_kept_in_half_precision(name, dtype):
    account = account_of(name, dtype)
    assert account.rewritten and account.rolled_back is None and account.against == "float32"
    assert account.own > 1e-5 and account.error <= account.budget
    assert account.budget < 0.3, "so wide a budget finds nothing"
    assert [c.split(" (")[0] for c in account.checked] == ["other lengths", "the example", "permuted"]


FAULTS = [next_segment_too, other_scale, read_as_fp32]
FOUND = [  # each fault in a full precision and in half of one, in the models that the tests above have captured
    *(("bert", next_segment_too, dtype) for dtype in ("fp32", "bf16", "autocast")),
    *(("bert", other_scale, dtype) for dtype in ("fp32", "fp16")),
    *(("bert", read_as_fp32, dtype) for dtype in ("bf16", "fp16")),
    ("llama", next_segment_too, "autocast"),
]


@pytest.mark.parametrize("name, fault, dtype", sampled(FOUND, ["bert", "llama"], FAULTS, DTYPES))
def test_a_wrong_attention_is_found_in_every_dtype(monkeypatch, name, fault, dtype):
    if fault is read_as_fp32 and dtype == "fp32":
        pytest.skip("fp32 values read as fp32 are right")
    op = ops.get("varlen_attention")
    monkeypatch.setattr(op, "providers", [ops.Provider("wrong", "cpu", fault(op))])
    account = account_of(name, dtype)
    assert not account.rewritten and "prepack is wrong here" in account.rolled_back
    for number in (account.error, account.own, account.budget):
        assert (
            number is None or f"{number:.1e}" in account.rolled_back or f"{number:.2e}" in account.rolled_back
        )


@dataclass(frozen=True)
class NudgeConfig(PassConfig):
    """how: "key" multiplies attention's keys by 1 + by; "long" adds `by` at the fourth token and behind."""

    name = "nudge"
    how: str = "key"
    by: float = 0.0


class Nudge(base.Pass[NudgeConfig]):
    """Claims to be exact, and is not."""

    name = "nudge"

    def match(self, program, context):
        return [base.Match(n.name, n) for n in program.nodes(aten.scaled_dot_product_attention.default)]

    def rewrite(self, program, match, context):
        node, config = match.data, context.config
        if config.how == "key":
            made = program.insert(node, aten.mul.Tensor, node.args[1], 1 + config.by)
            node.update_arg(1, made)
            return
        at = node.next
        size = program.insert(at, aten.sym_size.int, node, 2)
        few = program.insert(
            at, torch.ops.aten.lt.Scalar, program.insert(at, aten.arange.default, size), config.by
        )
        wide = program.insert(at, aten.unsqueeze.default, few, -1)
        made = program.insert(at, aten.mul.Tensor, node, wide)
        node.replace_all_uses_with(made, delete_user_cb=lambda u: u is not made and u not in (size,))


@pytest.fixture
def nudge():
    base.register_pass(Nudge)
    yield
    base.PASSES.pop("nudge")
    CONFIGS.pop("nudge")


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_error_below_the_rounding_shows_in_the_higher_precision(nudge, dtype):
    """A thousandth of a scale is lost in bf16, and a wrong pass all the same."""
    account = account_of("bert", dtype, nudge={"by": 1e-3})
    assert account.rolled_back and ("both programs were computed" in account.rolled_back or dtype == "fp32")
    assert account_of("bert", dtype, nudge={"by": 0.0}).rewritten


def test_fixed_budgets_are_an_option(nudge):
    assert account_of("bert", "fp32", nudge={"by": 1e-5}).rolled_back
    kept = account_of("bert", "fp32", nudge={"by": 1e-5}, fixed_budgets=True)
    assert kept.rewritten and kept.budget == 1e-4 and kept.own is None
    assert kept.against == "the program before" and kept.checked == ["the example (3 x 12)"]
    coarse = account_of(
        "bert", "bf16", nudge={"by": 1e-2}, fixed_budgets=True
    )  # more than 1e-4, less than bf16 rounds
    assert coarse.rolled_back and coarse.own is None


def test_what_is_wrong_beside_the_example_alone_is_found(nudge):
    """Rows of six tokens, and a rewrite that forgets what stands behind the sixth: only another length shows it."""
    model, inputs = zoo.ZOO["bert"].build()
    short = torch.zeros_like(inputs["attention_mask"])
    short[:, :6] = 1
    inputs = {**inputs, "attention_mask": short}
    program = captures.dynamo(model, inputs)
    recipe = Recipe.of(nudge={"how": "long", "by": 6.0})
    arguments = captures.arguments(program, inputs)
    with torch.no_grad():
        fixed = backend.run_pipeline(program, Recipe.of(recipe, fixed_budgets=True), arguments)[1].passes[0]
        found = backend.run_pipeline(program, recipe, arguments)[1].passes[0]
    assert fixed.rewritten  # on the example it is right
    assert found.rolled_back and "other lengths" in found.rolled_back


def test_batches_are_few_short_rows_where_sizes_are_free():
    model, inputs = zoo.ZOO["llama"].build()
    inputs = {k: v.repeat(4, 4) for k, v in inputs.items()}
    with specialized_floats():
        program = captures.dynamo(model, inputs, dynamic=True)
    rows, columns = inputs["input_ids"].shape
    sizes = {rows: rows, columns: columns}
    arguments = []
    for name, place in zip(program.input_names, program.placeholders):
        known = place.meta["val"]
        arguments.append(sizes[int(known.node.hint)] if isinstance(known, torch.SymInt) else inputs[name])
    found = batches.further(program, arguments)
    assert [b.label.split(" (")[0] for b in found] == ["other lengths", "permuted"]
    mask = found[0].inputs[program.input_names.index("attention_mask")]
    assert mask.shape == (batches.ROWS, batches.WIDTH)
    assert sorted(mask.sum(1).tolist()) == [1, 2, 3, 8, 15, 16]
    ids = [b.inputs[program.input_names.index("input_ids")] for b in found]
    assert ids[0].shape == ids[1].shape and not torch.equal(*ids)


def test_rows_that_only_some_inputs_leave_open_stay():
    class Pooled(torch.nn.Module):  # reads the mask's rows by index, so that more of them fit
        def forward(self, hidden, attention_mask):
            shown = attention_mask[torch.arange(hidden.shape[0])][:, :, None]
            return (hidden * shown).sum(1)

    given = {"hidden": torch.randn(4, 10, 8), "attention_mask": torch.ones(4, 10, dtype=torch.long)}
    torch._dynamo.maybe_mark_dynamic(given["attention_mask"], 0)
    program = captures.dynamo(Pooled(), given)
    arguments = [given.get(name, 4) for name in program.input_names]
    assert any(isinstance(x, int) for x in arguments)  # the mask's rows are open
    found = batches.further(program, arguments)
    assert found and all({len(x) for x in b.inputs if isinstance(x, torch.Tensor)} == {4} for b in found)


def test_floating_inputs_are_scaled():
    model, inputs = zoo.ZOO["llama"].build()
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}
    program = captures.dynamo(model, given)
    found = batches.further(program, captures.arguments(program, given))
    (scaled,) = [b for b in found if b.label.startswith("scaled")]
    at = program.input_names.index("inputs_embeds")
    assert torch.equal(scaled.inputs[at], found[0].inputs[at] * batches.SCALE)


def test_a_small_result_is_judged_by_what_it_is_computed_from():
    """Two logits may be right by chance; that is no measure for the other program."""
    from thresher.lowering.raised import Raised
    from thresher.lowering.reference import Reference
    from thresher.runtime.witness import expected_errors

    program, inputs = case("bert", "bf16")
    expected = expected_errors(program, inputs, Reference(), Raised(torch.float32))
    assert len(expected) == len(program.outputs) and all(1e-3 < e < 0.2 for e in expected)


def test_autocast_is_off_while_passes_are_judged():
    program, inputs = case("llama", "fp32")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert autocast.ambient()
        with autocast.suspended():
            account = backend.run_pipeline(program, Recipe.of(prepack=True), inputs)[1].passes[0]
    assert account.rewritten and account.error < 1e-5


class Chances:
    """Runs programs plainly, each further off in one number than it is: the captured one by a fiftieth of the largest
    where a row has one token, and by a tenth elsewhere; one with a node more by `other` everywhere."""

    def __init__(self, other, nodes):
        from thresher.lowering.reference import Reference

        self.plain, self.other, self.nodes = Reference(), other, nodes
        self.name, self.fakes = self.plain.name, self.plain.fakes

    def lower(self, program):
        lowered, more = self.plain.lower(program), len(program.nodes()) > self.nodes
        run, mask = lowered.run, program.placeholders.index(program.padding_mask)

        def off(inputs, weights):
            results = [r.clone() for r in run(inputs, weights)]
            size = self.other if more else 0.02 if int(inputs[mask].sum(1).min()) == 1 else 0.1
            results[0][(0,) * results[0].dim()] += size * results[0].abs().max()
            return results

        lowered.run = off
        return lowered


@pytest.mark.parametrize(
    ("other", "by", "holds"),
    [(0.13, 0.0, True), (0.13, 2e-2, False), (0.4, 0.0, False)],
    ids=["chance", "another program", "further off than any result of its own"],
)
def test_a_result_that_is_further_off_by_chance_is_kept(other, by, holds):
    from thresher.runtime.judge import Judge

    program, inputs = case("llama", "bf16")
    after = program.copy()
    node = next(iter(after.nodes(aten.scaled_dot_product_attention.default)))
    node.update_arg(1, after.insert(node, aten.mul.Tensor, node.args[1], 1 + by))
    verdict = Judge(program, inputs, Chances(other, len(program.nodes()))).exact(program, after, 1e-2)
    assert verdict.holds == holds and (verdict.error > 0.1 or by)
