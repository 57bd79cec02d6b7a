"""Accuracy of the tiny model under token pruning: first question, and a second one on the pruned cache.

The first question (t1) is asked with the image and prunes it. The second (t2), about the same image, reads
the pruned keys and values. Controls: random and uniform choice; an oracle that keeps the evidence of both
questions' first answer, and an anti-oracle that drops it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import thresher
from thresher import given_tokens
from thresher.generation.prefill import prefill
from thresher.runtime.kv.cache import ATTENTION, MixedPrecisionCache
from thresher.runtime.kv.policy import KVPolicy

from . import data, train
from .model import TinyVLM

BATCH = 64
ORACLES = ("oracle", "anti-oracle")


@dataclass
class Case:
    """A batch: embeddings [B, 103, d], types, evidence scores [B, 103], and both answers [B]."""

    embeds: torch.Tensor
    types: torch.Tensor
    evidence: torch.Tensor
    answer: torch.Tensor
    follow_up: torch.Tensor
    second: torch.Tensor


def cases(model: TinyVLM, questions: int, mode: int, seed: int) -> Iterator[Case]:
    """Batches of test images, each with two questions of a mode about different colours."""
    make = torch.Generator().manual_seed(1000 + seed)
    for _ in range(-(-questions // BATCH)):
        scene = data.draw(BATCH, "test", make)
        subject = torch.rand(BATCH, data.COLOURS, generator=make).argsort(1)[:, :2]
        modes = torch.full((BATCH, 2), mode)
        answers, cells = data.answer(scene, modes, subject)
        text = data.question(modes, subject)
        with torch.no_grad():
            embeds, types = model.embed(scene.images, text[:, 0])
        evidence = torch.zeros(BATCH, embeds.shape[1])
        evidence.scatter_(1, data.patches_of_cell(cells[:, 0]).flatten(1), 1.0)
        follow = torch.cat([answers[:, :1], text[:, 1]], dim=1)  # our own answer, then the next question
        yield Case(embeds, types, evidence, answers[:, 0], follow, answers[:, 1])


class Pruned:
    """The decoder compiled with a recipe; asks both questions. target: see thresher.compile.

    held: how keys and values are held for the second question; None as they come out.
    """

    def __init__(
        self, model: TinyVLM, target: str = "reference", held: KVPolicy | None = None, **recipe: Any
    ):
        self.model, self.recipe, self.target, self.held = model, recipe, target, held
        self.call: Any = None

    def ask(self, case: Case, scores: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each answer is right: bool [B] for t1 and t2."""
        decoder = self.model.decoder
        inputs = dict(inputs_embeds=case.embeds, use_cache=True)
        with given_tokens.token_types(case.types, scores), torch.no_grad():
            if self.call is None:
                torch._dynamo.reset()
                self.call = thresher.compile(
                    decoder, inputs, target=self.target, dynamic=False, verify=False, **self.recipe
                )
            if self.held is None:
                out = self.call(**inputs)
                second = follow_up(decoder, out.past_key_values, case)
            else:
                cache = MixedPrecisionCache(decoder.config, self.held)
                out = prefill(self.call, {"inputs_embeds": case.embeds}, cache)
                decoder.set_attn_implementation(ATTENTION)
                second = decoder(case.follow_up, past_key_values=cache).logits[:, -1].argmax(-1)
                decoder.set_attn_implementation("sdpa")
        first = out.logits[:, -1].argmax(-1)
        return first == case.answer, second == case.second


@torch.no_grad()
def follow_up(decoder: Any, past: Any, case: Case) -> torch.Tensor:
    """The answer to the second question, read layer by layer from caches of different lengths."""
    inner = decoder.model
    hidden = inner.embed_tokens(case.follow_up)
    count, start = hidden.shape[1], case.embeds.shape[1]
    rotary = inner.rotary_emb(hidden, torch.arange(start, start + count)[None])
    for index, layer in enumerate(inner.layers):
        held = past.layers[index].keys.shape[2]
        mask = torch.ones(count, held + count, dtype=torch.bool).tril(held)[None, None]
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=past)
    return decoder.lm_head(inner.norm(hidden))[:, -1].argmax(-1)


def accuracy(
    model: TinyVLM,
    questions: int,
    seed: int,
    mode: int = data.CHAIN,
    held: KVPolicy | None = None,
    **recipe: Any,
) -> dict[str, float]:
    """t1, t2 accuracy and the share of FLOPs under a recipe; `policy` may be an oracle. held: see `Pruned`."""
    options = dict(recipe.get("transprune", {}))
    oracle = options.get("policy") if options.get("policy") in ORACLES else None
    if oracle:
        recipe = {**recipe, "transprune": {**options, "policy": "given"}}
    asker = Pruned(model, held=held, **recipe)
    right, again, total = 0.0, 0.0, 0
    for number, case in enumerate(cases(model, questions, mode, seed)):
        scores = None
        if oracle:
            noise = torch.rand(case.evidence.shape, generator=torch.Generator().manual_seed(number))
            scores = noise + 10 * (case.evidence if oracle == "oracle" else -case.evidence)
        first, second = asker.ask(case, scores)
        right, again, total = right + first.sum().item(), again + second.sum().item(), total + len(first)
    name = "transprune" if options else "zipvl"
    left = asker.call.report[name].flops_left if name in recipe else None
    share = 1.0 if left is None else left
    return {"t1": right / total, "t2": again / total, "flops_share": share, "questions": total}


POLICIES = ("random", "uniform", "oracle", "anti-oracle", "fastv", "iga", "ttv", "transprune")
SPREAD = (0.3, 0.5)  # shares of the kept tokens that are spread evenly over the image
PRUNE = dict(min_image_tokens=1, bucket=1, min_saving=-1.0)
PROBES = dict(recent=8, spread=8, bucket=1, min_saving=-1.0)


def pruning(policy: str, keep: float, **more: Any) -> dict[str, Any]:
    return dict(transprune={**PRUNE, "policy": policy, "stages": ((1, keep),), **more})


CALIBRATED = "zipvl, calibrated to tau .975, protected"


@contextmanager
def shares(model: TinyVLM, options: dict[str, Any], seed: int) -> Iterator[str]:
    """A file of ZipVL's shares, calibrated on 256 questions that are not asked again."""
    apart = list(cases(model, 256, data.CHAIN, 77 + seed))
    with tempfile.TemporaryDirectory() as scratch, given_tokens.token_types(apart[0].types):
        batches = [dict(inputs_embeds=case.embeds, use_cache=True) for case in apart]
        path = str(Path(scratch) / "shares.safetensors")
        thresher.calibrate(model.decoder, batches, zipvl=options).save(path)
        yield path


def run(bench: Any, args: argparse.Namespace) -> None:
    """All rows and claims, over `args.seeds` and the seeds in the records `args.more`."""
    questions = 256 if args.quick else 2048
    seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    results: dict[tuple[str, float], list[dict[str, float]]] = {}

    def note(name: str, keep: float, found: dict[str, float], seed: int) -> None:
        bench.row(
            part="tiny_vlm", form=name, keep=keep, seed=seed, **{k: round(v, 4) for k, v in found.items()}
        )
        results.setdefault((name, keep), []).append(found)

    for record in args.more or []:
        for row in json.loads(record.read_text())["rows"]:
            bench.row(**row)
            results.setdefault((row["form"], row["keep"]), []).append(row)
    for seed in seeds:
        model = train.load(seed)
        note("dense", 1.0, accuracy(model, questions, seed, recipe="none"), seed)
        note(
            "dense, direct questions",
            1.0,
            accuracy(model, questions, seed, data.DIRECT, recipe="none"),
            seed,
        )
        for keep in (0.5, 0.25, 0.1):
            for policy in POLICIES:
                note(policy, keep, accuracy(model, questions, seed, **pruning(policy, keep)), seed)
            for share in SPREAD:
                mixed = pruning("transprune", keep, reserve=share)
                note(f"transprune, {share:.0%} spread", keep, accuracy(model, questions, seed, **mixed), seed)
            for by in ("keys", "attention"):
                mixed = pruning("transprune", keep, reserve=0.5, reserve_by=by)
                found = accuracy(model, questions, seed, **mixed)
                note(f"transprune, 50% by {by}", keep, found, seed)
            code = pruning("transprune", keep, mode="official_code")
            note("transprune, official_code", keep, accuracy(model, questions, seed, **code), seed)
        exact = dict(PROBES, tau=0.975, counts="exact")
        for form, keep, options in (
            ("zipvl, protected", 0.75, dict(PROBES, keep=0.75)),
            ("zipvl, paper", 0.75, dict(PROBES, keep=0.75, mode="paper")),
            ("zipvl, keys and values at 4/2 bits", 0.5, dict(PROBES, keep=0.5, kv="quantize")),
            ("zipvl, counted to hold tau .975, protected", 1.0, exact),
            ("zipvl, counted to hold tau .975, paper", 1.0, dict(exact, mode="paper")),
        ):
            held = KVPolicy(important=keep, recent=8, spread=8) if "kv" in options else None
            note(form, keep, accuracy(model, questions, seed, zipvl=options, held=held), seed)
        calibrated = dict(PROBES, tau=0.975)
        with shares(model, calibrated, seed) as stats:
            note(CALIBRATED, 1.0, accuracy(model, questions, seed, zipvl=calibrated, stats=stats), seed)
    claims(bench, results, len(results["dense", 1.0]))


def claims(bench: Any, results: dict[tuple[str, float], list[dict[str, float]]], seeds: int) -> None:
    def mean(name: str, keep: float, turn: str) -> float:
        found = results[name, keep]
        return sum(f[turn] for f in found) / len(found)

    def points(name: str, keep: float, turn: str = "t1") -> float:
        """How far below dense."""
        return 100 * (mean("dense", 1.0, turn) - mean(name, keep, turn))

    said = f", points ({seeds} seed{'s' * (seeds > 1)})"
    bench.claim(f"chain accuracy, dense ({seeds} seeds)", mean("dense", 1.0, "t1"), ">= 0.88")
    bench.claim("transprune below dense, 25 % kept" + said, points("transprune", 0.25), "<= 1")
    above = points("random", 0.25) - points("transprune", 0.25)
    bench.claim("transprune above random, 25 % kept" + said, above, ">= 10")
    bench.claim("transprune below dense, 10 % kept" + said, points("transprune", 0.1), "<= 2")
    below = "second question below dense, 50 % kept, "
    bench.claim(
        below + "all keys and values at 4/2 bits" + said,
        points("zipvl, keys and values at 4/2 bits", 0.5, "t2"),
        "<= 5",
    )
    reserved = [f"transprune, {share:.0%} spread" for share in SPREAD]
    reserved += ["transprune, 50% by keys", "transprune, 50% by attention"]
    best = min((n for n in reserved if (n, 0.5) in results), key=lambda n: points(n, 0.5, "t2"))
    bench.claim(below + best + said, points(best, 0.5, "t2"), "<= 5")
    bench.claim("anti-oracle below dense, 25 % kept" + said, points("anti-oracle", 0.25), ">= 50")
    bench.claim(
        "ZipVL, 75 % kept, text protected, below dense" + said, points("zipvl, protected", 0.75), "<= 1"
    )
    bench.claim(
        "ZipVL, shares calibrated to tau .975, text protected, below dense" + said,
        points(CALIBRATED, 1.0),
        "<= 1",
    )
