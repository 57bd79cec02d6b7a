"""Accuracy of the tiny model under token pruning: first question, and a second one on the pruned cache.

The first question (t1) is asked with the image and prunes it. The second (t2), about the same image, reads
the pruned keys and values. Controls: random and uniform choice; an oracle that keeps the evidence of both
questions' first answer, and an anti-oracle that drops it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import thresher
from thresher import tokens

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
    """The decoder compiled with a recipe; asks both questions. target: see thresher.compile."""

    def __init__(self, model: TinyVLM, target: str = "reference", **recipe: Any):
        self.model, self.recipe, self.target = model, recipe, target
        self.call: Any = None

    def ask(self, case: Case, scores: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each answer is right: bool [B] for t1 and t2."""
        decoder = self.model.decoder
        inputs = dict(inputs_embeds=case.embeds, use_cache=True)
        with tokens.token_types(case.types, scores), torch.no_grad():
            if self.call is None:
                torch._dynamo.reset()
                self.call = thresher.compile(
                    decoder, inputs, target=self.target, dynamic=False, verify=False, **self.recipe
                )
            out = self.call(**inputs)
        past = out.past_key_values
        first = out.logits[:, -1].argmax(-1)
        second = follow_up(decoder, past, case)
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


def flops_share(call: Any, name: str) -> float:
    """Decoder layers' FLOPs of the compiled prefill against dense, as the pass reckons them."""
    return call.report[name].flops_left


def accuracy(
    model: TinyVLM, questions: int, seed: int, mode: int = data.CHAIN, **recipe: Any
) -> dict[str, float]:
    """t1, t2 accuracy and the share of FLOPs under a recipe; `policy` may be an oracle."""
    options = dict(recipe.get("transprune", {}))
    oracle = options.get("policy") if options.get("policy") in ORACLES else None
    if oracle:
        recipe = {**recipe, "transprune": {**options, "policy": "given"}}
    asker = Pruned(model, **recipe)
    right, again, total = 0.0, 0.0, 0
    for number, case in enumerate(cases(model, questions, mode, seed)):
        scores = None
        if oracle:
            noise = torch.rand(case.evidence.shape, generator=torch.Generator().manual_seed(number))
            scores = noise + 10 * (case.evidence if oracle == "oracle" else -case.evidence)
        first, second = asker.ask(case, scores)
        right, again, total = right + first.sum().item(), again + second.sum().item(), total + len(first)
    share = 1.0
    name = "transprune" if options else "zipvl"
    if name in recipe and asker.call.report[name].rewritten:
        share = flops_share(asker.call, name)
    return {"t1": right / total, "t2": again / total, "flops_share": share, "questions": total}


POLICIES = ("random", "uniform", "oracle", "anti-oracle", "fastv", "iga", "ttv", "transprune")
PRUNE = dict(min_image_tokens=1, bucket=1, min_saving=-1.0)


def pruning(policy: str, keep: float, **more: Any) -> dict[str, Any]:
    return dict(transprune={**PRUNE, "policy": policy, "stages": ((1, keep),), **more})


def run(bench: Any, args: argparse.Namespace) -> None:
    """All rows and claims, over the seeds whose weights are at hand (three when they must be trained)."""
    questions = 256 if args.quick else 2048
    seeds = [s for s in range(3) if train.checkpoint(s).exists()]
    if not seeds:
        seeds = [0] if args.quick else [0, 1, 2]
    results: dict[tuple[str, float], list[dict[str, float]]] = {}

    def note(name: str, keep: float, found: dict[str, float], seed: int) -> None:
        bench.row(
            part="tiny_vlm", form=name, keep=keep, seed=seed, **{k: round(v, 4) for k, v in found.items()}
        )
        results.setdefault((name, keep), []).append(found)

    for seed in seeds:
        model = train.load(seed)
        note("dense", 1.0, accuracy(model, questions, seed, causal_mask=True), seed)
        note(
            "dense, direct questions",
            1.0,
            accuracy(model, questions, seed, data.DIRECT, causal_mask=True),
            seed,
        )
        for keep in (0.5, 0.25, 0.1):
            for policy in POLICIES:
                note(policy, keep, accuracy(model, questions, seed, **pruning(policy, keep)), seed)
            mixed = pruning("transprune", keep, reserve=0.3)
            note("transprune, 30% spread", keep, accuracy(model, questions, seed, **mixed), seed)
            code = pruning("transprune", keep, mode="official_code")
            note("transprune, official_code", keep, accuracy(model, questions, seed, **code), seed)
        probes = dict(recent=8, spread=8, bucket=1, min_saving=-1.0, keep=0.75)
        for mode in ("protected", "paper"):
            note(
                f"zipvl, {mode}", 0.75, accuracy(model, questions, seed, zipvl=dict(probes, mode=mode)), seed
            )
    claims(bench, results, len(seeds))


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
    second = min(points(n, 0.5, "t2") for n in ("transprune, 30% spread", "transprune"))
    bench.claim("second question below dense, 50 % kept" + said, second, "<= 5")
    bench.claim("anti-oracle below dense, 25 % kept" + said, points("anti-oracle", 0.25), ">= 50")
    bench.claim("ZipVL, text protected, below dense" + said, points("zipvl, protected", 0.75), "<= 1")
