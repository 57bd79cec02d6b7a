"""Trains a small language model in bf16 and in emulated NVFP4, and compares the losses.

A decoder of bytes (4 layers, width 96) learns Python's language reference; every run starts from the same
weights and sees the same batches. The loss is that of text kept apart, averaged over the last eighth of
training. Ablations leave out one part of the recipe each (arXiv 2509.25149, appendix E).

"then a bf16 forward" is the paper's remedy for the gap that a falling learning rate opens: the last 18 % of
the steps run the forward product in high precision.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from dataclasses import replace

import torch
from _harness import Benchmark, arguments
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import thresher
from thresher.tools import models
from thresher.training.nvfp4 import PAPER, TrainingRecipe, use_recipe

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 96, 4, 4, 64, 8
RATE, WARM_UP = 2e-3, 50
KEEP = ("head", "last")
LATE, SWITCH = "nvfp4, then a bf16 forward", 0.82  # the paper's share of training before the switch
RUNS: dict[str, tuple[TrainingRecipe | None, tuple[str, ...]]] = {
    "bf16": (None, ()),
    "nvfp4": (PAPER, KEEP),
    "nvfp4, then a bf16 forward": (PAPER, KEEP),
    "nvfp4, stochastic forward": (TrainingRecipe(stochastic_forward=True), KEEP),
    "nvfp4, all layers": (PAPER, ("head",)),
    "nvfp4, gradients to nearest": (TrainingRecipe(stochastic=False), KEEP),
    "nvfp4, no Hadamard transform": (TrainingRecipe(hadamard=False), KEEP),
    "nvfp4, weight scales of 1 x 16": (TrainingRecipe(tiled=False), KEEP),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(torch.relu(self.up(self.norm2(x))).square())


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.lm_head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on, and every tenth paragraph to judge by."""
    parts: tuple[list[str], list[str]] = ([], [])
    for i, text in enumerate(models.texts()):
        parts[i % 10 == 9].append(text)
    train, held = (torch.tensor(list("\n".join(p).encode()), dtype=torch.uint8) for p in parts)
    return train, held


def windows(data: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(data) - CONTEXT - 1, (count,), generator=generator)
    return torch.stack([data[s : s + CONTEXT + 1] for s in starts]).long()


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch[:, :-1])
    return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def train(name: str, steps: int, seed: int, log: list[dict[str, float]]) -> float:
    """Loss on held-out text, the mean of eight readings over the last eighth of training."""
    recipe, keep = RUNS[name]
    torch.manual_seed(seed)
    model = Decoder()
    if recipe is not None:
        thresher.nvfp4_training(model, recipe, keep=keep)
    data, held = corpus()
    batches = torch.Generator().manual_seed(seed + 1)
    judged = windows(held, 64, torch.Generator().manual_seed(99))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    read = {steps - 1 - i * (steps // 64) for i in range(8)}
    readings = []
    for step in range(steps):
        if name == LATE and step == int(SWITCH * steps):
            use_recipe(model, replace(PAPER, forward=False))
        left = 1 - step / steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARM_UP, 0.05 + 0.95 * left)
        loss = loss_of(model, windows(data, BATCH, batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in read:
            with torch.no_grad():
                readings.append(float(loss_of(model, judged)))
            log.append({"step": step + 1, "loss": readings[-1]})
    return sum(readings) / len(readings)


def main() -> None:
    def add(parser: ArgumentParser) -> None:
        parser.add_argument("--steps", type=int, help="default 600, with --quick 100")
        parser.add_argument("--seeds", type=int, help="default 1")
        parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="bf16 is always run")

    args = arguments(__doc__, add)
    steps = args.steps or (100 if args.quick else 600)
    seeds = range(args.seeds or 1)
    bench = Benchmark("nvfp4_training", args)
    losses: dict[str, list[float]] = {}
    for seed in seeds:
        for name in [n for n in RUNS if n == "bf16" or n in args.runs]:
            log: list[dict[str, float]] = []
            start = time.thread_time()
            loss = train(name, steps, seed, log)
            losses.setdefault(name, []).append(loss)
            gap = 100 * (loss / losses["bf16"][-1] - 1)
            bench.row(run=name, seed=seed, steps=steps, loss=round(loss, 4), gap_percent=round(gap, 2),
                      cpu_s=round(time.thread_time() - start, 1))  # fmt: skip
            print(bench.rows[-1], flush=True)
            bench.finish(Console(quiet=True))  # what there is so far
    mean = {name: sum(found) / len(found) for name, found in losses.items()}
    gap = {name: 100 * (mean[name] / mean["bf16"] - 1) for name in mean}
    noise = 100 * max(abs(l / m - 1) for name, m in mean.items() for l in losses[name])
    bench.row(run="spread of one run over the seeds, percent of its mean", gap_percent=round(noise, 2))
    if args.quick:
        bench.not_measured("loss gap of NVFP4 against bf16", "Left out by --quick: 100 steps say nothing.")
    else:
        for name in RUNS:
            if name not in gap or "nvfp4" not in gap:
                bench.not_measured(name, "Left out by --runs.")
            elif name in ("nvfp4", LATE):
                bench.claim(f"{name}: loss gap against bf16, percent", gap[name], "<= 1.5")
            elif name != "bf16":
                above = gap[name] - gap["nvfp4"]
                bench.claim(f"{name}: loss above that of the whole recipe, percent", above, ">= 0")
    bench.finish()


if __name__ == "__main__":
    main()
