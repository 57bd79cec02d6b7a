"""The training half of the sparse-MLP benchmark: scikit-learn's digits, a residual model of three MLPs.

A model is trained densely, then fine-tuned three ways with the same steps: without the loss (the control), with
the density loss, and the control thresholded afterwards, layer by layer, to the density that the loss reached.
Images are split 60/40 into training and test by the seed. Exact density, unions over 4 and 16 unrelated
images, and accuracy are all of the test images.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Iterator

import torch
from _harness import Benchmark
from torch import nn
from torch.nn import functional as F

import thresher
from thresher.training.mlp_sites import mlps

WIDTH, NEURONS, LAYERS = 64, 256, 3
WEIGHTS = (0.3, 0.5, 1.0)
CHOSEN = 0.5  # fixed beforehand; the others show the trade


class Digits(nn.Module):
    def __init__(self, gated: bool):
        super().__init__()
        self.embed, self.head = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.gate = nn.ModuleList(nn.Linear(WIDTH, NEURONS) for _ in range(LAYERS))
        self.up = nn.ModuleList(nn.Linear(WIDTH, NEURONS) for _ in range(LAYERS if gated else 0))
        self.down = nn.ModuleList(nn.Linear(NEURONS, WIDTH) for _ in range(LAYERS))
        self.gated = gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for i, norm in enumerate(self.norms):
            n = norm(x)
            h = F.relu(self.gate[i](n))
            x = x + self.down[i](h * self.up[i](n) if self.gated else h)
        return self.head(x)


def fit(
    model: Digits, x: torch.Tensor, y: torch.Tensor, epochs: int, rate: float, weight: float, seed: int
) -> None:
    density = thresher.density_loss(model, {"x": x[:2]}, weight=weight) if weight else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    order = torch.Generator().manual_seed(seed)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        if density is not None:
            density.weight = weight * min(1.0, 2 * (epoch + 1) / epochs)
        for chosen in torch.randperm(len(x), generator=order).split(64):
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            if density is not None:
                loss = loss + density()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        falling.step()
    if density is not None:
        density.remove()


@contextlib.contextmanager
def thresholded(model: Digits, x: torch.Tensor, shares: dict[str, float]) -> Iterator[None]:
    """Within it each MLP drops its smallest activations; limits are such that `x` keeps these shares."""
    handles = []
    for site in mlps(model, {"x": x[:2]}):
        down, seen = model.get_submodule(site.down), []
        probe = down.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(x)
        probe.remove()
        values = seen[0].abs().flatten().sort(descending=True).values
        limit = values[min(len(values) - 1, int(shares[site.fqn] * len(values)))]
        handles.append(
            down.register_forward_pre_hook(
                lambda _, args, limit=limit: (torch.where(args[0].abs() <= limit, 0.0, args[0]),)
            )
        )
    yield
    for handle in handles:
        handle.remove()


def measure(model: Digits, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    found = list(thresher.activation_density(model, [{"x": x}], example_inputs={"x": x[:2]}).values())
    return {
        "accuracy": float((model(x).argmax(1) == y).float().mean()),
        "density": statistics.fmean(d.exact for d in found),
        "union4": statistics.fmean(d.union[4] for d in found),
        "union16": statistics.fmean(d.union[16] for d in found),
    }


def train_digits(bench: Benchmark, seeds: int, epochs: int = 60) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    for gated in (False, True):
        form = "ReGLU" if gated else "ReLU"
        runs: dict[str, list[dict[str, float]]] = {}
        for seed in range(seeds):
            torch.manual_seed(seed)
            order = torch.randperm(len(images))
            cut = int(0.6 * len(images))
            x, y, test_x, test_y = (t[i] for i in (order[:cut], order[cut:]) for t in (images, labels))
            start = Digits(gated)
            with torch.enable_grad():
                fit(start, x, y, 40, 2e-3, 0.0, seed)
                control = copy.deepcopy(start)
                fit(control, x, y, epochs, 1e-3, 0.0, seed)
            runs.setdefault("control", []).append(measure(control, test_x, test_y))
            for weight in WEIGHTS:
                sparse = copy.deepcopy(start)
                with torch.enable_grad():
                    fit(sparse, x, y, epochs, 1e-3, weight, seed)
                runs.setdefault(f"loss x {weight:g}", []).append(measure(sparse, test_x, test_y))
                shares = thresher.activation_density(sparse, [{"x": x}], example_inputs={"x": x[:2]})
                with thresholded(control, x, {k: d.exact for k, d in shares.items()}):
                    # metrics hook the down projection after the thresholds, and so see them
                    runs.setdefault(f"control thresholded as {weight:g}", []).append(
                        measure(control, test_x, test_y)
                    )
        mean = {
            name: {k: statistics.fmean(r[k] for r in found) for k in found[0]} for name, found in runs.items()
        }
        for name, found in mean.items():
            bench.row(
                part="train", form=form, run=name, seeds=seeds, **{k: round(v, 4) for k, v in found.items()}
            )
        ours, base = mean[f"loss x {CHOSEN:g}"], mean["control"]
        bench.claim(f"{form}: exact density with the loss over the control's, mean of {seeds} seeds",
                    ours["density"] / base["density"], "<= 0.3333")  # fmt: skip
        bench.claim(f"{form}: accuracy with the loss less the control's, points, mean of {seeds} seeds",
                    100 * (ours["accuracy"] - base["accuracy"]), ">= -0.5")  # fmt: skip
