"""Every pair of methods, and all together: within the sum of the budgets, or refused with both names and the reason.

THRESHER_UPDATE_DOCS=1 python -m pytest tests/e2e/test_composition.py   # writes the table in docs/composition.md
"""

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import captures
import pytest
import torch
import zoo
from sampled import sampled

import thresher
from thresher import backend
from thresher.errors import ArgumentError, ThresherError
from thresher.passes.base import PASSES
from thresher.passes.catalog import PASS_MODULES
from thresher.passes.order import ordered
from thresher.recipe import Recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "composition.md"
BEGIN, END = "<!-- table: written by tests/e2e/test_composition.py -->", "<!-- end of table -->"
MODELS = {"Llama": "llama_reglu", "BERT": "bert"}
METHODS = ("prepack", "transprune", "zipvl", "deft", "rsq", "nvfp4")
HERE = tuple(m for m in METHODS if m in PASSES)
PAIRS = list(itertools.combinations(HERE, 2))
# Options at which the methods find something to do in models of width 32.
OPTIONS = {
    "prepack": True,
    "transprune": {
        "stages": ((1, 0.5),), "min_image_tokens": 1, "bucket": 1, "min_saving": 0.0, "image_token_id": zoo.IMAGE_TOKEN,
        "budget": 2.0,
    },
    "zipvl": {"keep": 0.5, "recent": 2, "spread": 2, "sinks": 1, "bucket": 1, "min_saving": 0.0, "budget": 2.0},
    "deft": {"min_bytes": 0},
    "rsq": {"group_size": 32, "budget": 1.0, "rotate_down": False},  # DEFT skips neurons, which a rotation would mix
    # 2.0 as for pruning: behind it, other keys chosen by rounded scores change a random model's results wholly
    "nvfp4": {"min_weights": 0, "budget": 2.0},
}  # fmt: skip


def example(name: str) -> dict[str, torch.Tensor]:
    """The model's example, columns 1 to 4 of every row an image."""
    inputs = dict(zoo.ZOO[name].inputs())
    ids = inputs["input_ids"].clone()
    ids[:, 1:5] = zoo.IMAGE_TOKEN
    return {**inputs, "input_ids": ids}


@functools.cache
def statistics(name: str) -> str | None:
    """What rsq reads: a tiny calibration, saved; None where this version cannot make it."""
    if "rsq" not in PASSES or not hasattr(thresher, "quantize"):
        return None
    import tempfile

    (model, _), inputs = zoo.ZOO[name].build(), example(name)
    path = Path(tempfile.mkdtemp()) / "rsq.safetensors"
    try:
        thresher.quantize(model, [dict(inputs)], {"rsq": OPTIONS["rsq"]}).save(path)
    except ThresherError:
        return None  # what the pass then says stands in the table
    return str(path)


def recipe(names: tuple[str, ...], model: str) -> Recipe:
    extra = {}
    if "rsq" in names and statistics(MODELS[model]):
        extra["stats"] = statistics(MODELS[model])
    return Recipe.of({n: OPTIONS[n] for n in names}, **extra)


@functools.cache
def run(names: tuple[str, ...], model: str, prove: bool = True):
    """(program, report), or the refusal."""
    inputs = example(MODELS[model])
    program = captures.of_zoo(MODELS[model], "export-dynamic")
    try:
        asked = dataclasses.replace(recipe(names, model), verify=prove)
        return backend.run_pipeline(program, asked, captures.arguments(program, inputs))
    except ArgumentError as refusal:
        return refusal


def check(outcome, names: tuple[str, ...]) -> None:
    if isinstance(outcome, ArgumentError):
        assert all(n in str(outcome) for n in names), f"the refusal does not name both: {outcome}"
        return
    _, report = outcome
    assert [p.name for p in report.passes] == sorted(names, key=PASS_MODULES.index)
    for account in report.passes:
        assert account.rolled_back is None, account.rolled_back
        assert account.rewritten or account.missed, f"{account.name} looked at no site"
        assert all(re.match(r"[A-Z(`\w].*[.!]$", m.reason, re.S) for m in account.missed)
    assert report.error is not None and report.error <= report.budget


# Of a model without a decoder's passes, the pairs that both find something to do in it.
PLAIN = [
    *((pair, "Llama") for pair in PAIRS),
    *(
        (pair, "BERT")
        for pair in PAIRS
        if pair in (("prepack", "deft"), ("prepack", "nvfp4"), ("prepack", "rsq"))
    ),
]


@pytest.mark.parametrize("pair, model", sampled(PLAIN, PAIRS, list(MODELS)), ids=str)
def test_a_pair_composes_or_is_refused(pair, model):
    check(run(pair, model), pair)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_passes_run_in_one_order_whatever_theirs(pair):
    def order(names):
        try:
            return ordered(Recipe.of({n: OPTIONS[n] for n in names}))
        except ArgumentError:
            return None

    assert order(pair) == order(pair[::-1])


@pytest.mark.thorough
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_the_other_order_gives_the_same_program(pair, model):
    # it need not be proven: it must give the program that is
    first, second = run(pair, model), run(pair[::-1], model, prove=False)
    assert type(first) is type(second)
    if not isinstance(first, ArgumentError):
        assert first[0].text() == second[0].text()


@pytest.mark.parametrize("model", sampled(["Llama"], list(MODELS)))
def test_all_together_run_as_a_compiled_model(model):
    outcome = run(HERE, model)
    check(outcome, HERE)
    if isinstance(outcome, ArgumentError):
        return
    (network, _), inputs = zoo.ZOO[MODELS[model]].build(), example(MODELS[model])
    network.config.use_cache = False
    compiled = thresher.compile(network, inputs, recipe(HERE, model), target="reference")
    certificate = compiled.certificate
    assert certificate.holds
    with torch.no_grad():
        assert torch.isfinite(compiled(**inputs)[0]).all()


def test_what_one_pass_took_the_next_does_not_take_again():
    alone, (_, report) = run(("nvfp4",), "Llama")[1], run(("deft", "nvfp4"), "Llama")
    assert len(report["deft"].rewritten) == 2
    shared = set(alone["nvfp4"].rewritten) - set(report["nvfp4"].rewritten)
    assert {s.rsplit(".", 1)[1] for s in shared} == {"down_proj", "up_proj"}  # sparse_mlp reads both


def cell(outcome) -> str:
    if isinstance(outcome, ArgumentError):
        return f"refused: {outcome}"
    _, report = outcome
    parts = []
    for p in report.passes:
        reason = "" if p.rewritten or not p.missed else f" ({p.missed[0].reason})"
        parts.append(f"{p.name} {len(p.rewritten)} of {len(p.rewritten) + len(p.missed)}{reason}")
    size = "exact to rounding" if report.error < 1e-5 else f"{report.error:.1g}"
    rounding = report.budget and all(p.exact for p in report.passes if p.rewritten)
    limit = "the model's own rounding" if rounding else f"{report.budget:.2g}"
    return "; ".join(parts) + f"; error {size}, budget {limit}"


def table(models: Sequence[str]) -> str:
    lines = [f"| recipe | {' | '.join(models)} |", "| --- |" + " --- |" * len(models)]
    for names in [*[(h,) for h in HERE], *PAIRS, HERE]:
        cells = [cell(run(names, model)).replace("|", "\\|").replace("\n", " ") for model in models]
        lines.append(f"| {' + '.join(names) if names != HERE else 'all'} | {' | '.join(cells)} |")
    missing = [m for m in METHODS if m not in HERE]
    if missing:
        lines += ["", f"Not in this version: {', '.join(missing)}."]
    return "\n".join(lines)


def test_the_page_is_up_to_date(pytestconfig):
    """The first model's column, and with --thorough all of them."""
    written = PAGE.read_text()
    before, _, rest = written.partition(BEGIN)
    old, _, after = rest.partition(END)
    update = os.environ.get("THRESHER_UPDATE_DOCS")
    models = list(MODELS) if update or pytestconfig.getoption("--thorough") else list(MODELS)[:1]
    new = table(models)
    if update:
        PAGE.write_text(f"{before}{BEGIN}\n\n{new}\n\n{END}{after}")
        return

    def rows(text: str) -> list[list[str]]:
        """Each row's recipe and counts, in the columns of `models`; sentences and measured errors may lag behind."""
        cells = [
            re.split(r"(?<!\\)\|", line)[1:] for line in text.strip().splitlines() if line.startswith("|")
        ]
        return [
            [row[0].strip(), *re.findall(r"\w+ \d+ of \d+|refused", "|".join(row[1 : 1 + len(models)]))]
            for row in cells
        ]

    assert rows(old) == rows(new), (
        "run: THRESHER_UPDATE_DOCS=1 python -m pytest tests/e2e/test_composition.py"
    )
