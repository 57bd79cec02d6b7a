"""What a pass must keep to, as one call for its own test suite.

    import thresher.testing
    import my_package                       # registers the pass

    def test_conformance():
        thresher.testing.check_pass("mine")

`check_pass` runs the pass alone on a small transformer (or on models of yours) through the reference target,
and raises one AssertionError that lists everything it found wrong.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from thresher.passes.base import PASSES, Pass
from thresher.passes.calibrate import Calibration
from thresher.passes.pipeline import Pipeline

from . import api, backend
from .errors import ArgumentError, ContractError, ThresherError
from .graph.nodes import value
from .graph.program import Program
from .recipe import CONFIGS, Recipe
from .report import Report
from .strict import compile_strictly

FORBIDDEN = ("thresher.kernels", "thresher.lowering", "thresher.runtime")


class TinyTransformer(torch.nn.Module):
    """Two pre-norm layers with ReLU MLPs, a padding mask and a tied head: something for most passes to find."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2, vocabulary: int = 64):
        super().__init__()
        self.heads = heads
        self.embed = torch.nn.Embedding(vocabulary, width)
        self.layers = torch.nn.ModuleList(TinyLayer(width, heads) for _ in range(layers))
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """input_ids, attention_mask: int64 [batch, sequence]. Logits [batch, sequence, vocabulary]."""
        x = self.embed(input_ids)
        seen = (attention_mask != 0)[:, None, None, :].expand(-1, 1, attention_mask.shape[1], -1)
        for layer in self.layers:
            x = layer(x, seen)
        return torch.nn.functional.linear(self.norm(x), self.embed.weight)


class TinyLayer(torch.nn.Module):
    """Attention and a ReLU MLP, each behind a LayerNorm and added to the stream."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (torch.nn.Linear(width, width) for _ in range(4))
        self.up, self.down = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)
        self.attention_norm, self.mlp_norm = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        h = self.attention_norm(x)
        q, k, v = (m(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.mlp_norm(x))))


def tiny_model(**sizes: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A TinyTransformer with the same weights every time, and a padded batch for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyTransformer(**sizes).eval()
    ids = torch.arange(3 * 11).reshape(3, 11) * 7 % 61 + 2
    mask = (torch.arange(11)[None] < torch.tensor([[4], [11], [7]])).long()
    return model, {"input_ids": ids * mask, "attention_mask": mask}


def check_pass(
    name: str,
    models: Sequence[tuple[torch.nn.Module, Mapping[str, Any]]] | None = None,
    options: Mapping[str, Any] | bool = True,
    *,
    rewrites: bool = True,
    stats: str | Path | None = None,
) -> None:
    """Check one registered pass; raise an AssertionError that lists what is wrong.

    models: (model in eval mode, keyword inputs) pairs; the tiny transformer by default.
    options: of the pass, as in a recipe. rewrites: at least one site of the models must be rewritten.
    stats: the file of calibration statistics that the pass reads, for one that needs data.
    """
    if name not in PASSES:
        raise ArgumentError(
            "name", repr(name), f"one of {', '.join(sorted(PASSES))}", "Import the pass's module first."
        )
    problems = _declaration(PASSES[name])
    if problems:
        raise AssertionError(_message(name, problems))
    extra = {} if stats is None else {"stats": str(stats)}
    recipe, did = Recipe.of({name: options, **extra}), 0
    for model, inputs in models if models is not None else [tiny_model()]:
        found, more = _on_model(PASSES[name], recipe, model, inputs)
        did += found
        problems += more
    if rewrites and not did and not problems:
        problems.append("It rewrote nothing in the given models; pass rewrites=False if that is right.")
    if problems:
        raise AssertionError(_message(name, problems))


def _message(name: str, problems: Sequence[str]) -> str:
    return f"The pass {name!r} does not conform:\n" + "\n".join(f"- {p}" for p in dict.fromkeys(problems))


def _declaration(rewriter: Pass) -> list[str]:
    problems = []
    config = rewriter.config_type
    if config.name != rewriter.name or CONFIGS.get(rewriter.name) is not config:
        problems.append(
            f"Its options are registered under {config.name!r}, and the pass is {rewriter.name!r}."
        )
    try:
        default = config()
    except TypeError as reason:
        return [*problems, f"{config.__name__} needs a default for every option: {reason}."]
    for field in ("after", "before"):
        if not all(isinstance(n, str) and len(n) > 1 for n in getattr(rewriter, field)):
            problems.append(f"`{field}` must be a tuple of passes' names, such as ('deft',).")
    if not rewriter.effect.budget >= 0:
        problems.append("`effect.budget` must be a number from 0.")
    recipe = Recipe.of({rewriter.name: dataclasses.asdict(default)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.toml"
        path.write_text(recipe.to_toml(folder))
        if Recipe.of(path) != recipe:
            problems.append(
                "A recipe with its options does not survive a TOML file: use numbers, strings and tuples."
            )
    source = textwrap.dedent(inspect.getsource(inspect.getmodule(rewriter) or type(rewriter)))
    for node in ast.walk(ast.parse(source)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else \
            [a.name for a in node.names] if isinstance(node, ast.Import) else []  # fmt: skip
        problems += [f"Its module imports {n}: a pass emits operators and never calls kernels."
                     for n in names if n.startswith(FORBIDDEN)]  # fmt: skip
    return problems


def _on_model(
    rewriter: Pass, recipe: Recipe, model: torch.nn.Module, inputs: Mapping[str, Any]
) -> tuple[int, list[str]]:
    problems: list[str] = []
    dry = api.explain(model, inputs, "none")
    if dry.refused:
        return 0, [f"The model was not captured: {dry.refused[0]}"]
    none = dataclasses.replace(recipe, fuel=0)
    for program in dry.before:
        try:
            first = _rewritten(program, recipe)
            _tapped(program, recipe)
        except ContractError as reason:
            return 0, [*problems, str(reason)]
        if first.text() != _rewritten(program, recipe).text():
            problems.append(
                "Rewriting the same program twice gives two programs; a rewrite must be deterministic."
            )
        if _prepared(program, recipe).text() != _rewritten(program, none).text():
            problems.append(
                "It changed the program though no site was rewritten (fuel=0): edit in `rewrite` only."
            )
        problems += [f"The new node {n.name} has no fake value in meta['val']."
                     for n in first.nodes() if isinstance(n.target, torch._ops.OpOverload) and value(n) is None]  # fmt: skip
    try:
        compiled = compile_strictly(model, inputs, recipe, target="reference", may_do_nothing=True)
    except ThresherError as reason:
        return 0, [*problems, f"Compiling raised {type(reason).__name__}: {reason}"]
    for report in compiled.reports:
        account = report[rewriter.name]
        if account.rolled_back:
            problems.append(f"It breaks its declared budget: {account.rolled_back}")
        problems += [f"The reason for {m.site} is no full sentence: {m.reason!r}"
                     for m in account.missed if not _is_sentence(m.reason)]  # fmt: skip
        sites = [*account.rewritten, *(m.site for m in account.missed)]
        doubled = {s for s in sites if sites.count(s) > 1}
        if doubled:
            problems.append(f"Sites are named twice: {', '.join(sorted(doubled))}.")
    return sum(len(r[rewriter.name].rewritten) for r in compiled.reports), problems


def _rewritten(program: Program, recipe: Recipe) -> Program:
    with torch.no_grad():
        return backend.run_pipeline(program, recipe, None)[0]


def _prepared(program: Program, recipe: Recipe) -> Program:
    """The program as the passes of a recipe prepare it, without a check of the results."""
    with torch.no_grad():
        return Pipeline(recipe).prepare(program, Report(recipe.fingerprint()))


def _tapped(program: Program, recipe: Recipe) -> None:
    """Let the passes say where they need data. Raises ContractError where they edit a program meanwhile."""
    try:
        Calibration(recipe).watch(program)
    except ContractError:
        raise
    except ThresherError:  # no pass needs data
        return


def _is_sentence(text: str) -> bool:
    return len(text.split()) >= 3 and bool(re.search(r"[.!?]$", text.strip())) and not text[0].islower()
