"""Training with NVFP4 matrix products (arXiv 2509.25149, section 4), emulated on any device.

    swapped = thresher.nvfp4_training(model)            # nn.Linear -> NVFP4Linear, in place
    ...train as before; the optimizer keeps its full-precision weights...
    restore(model)                                      # plain nn.Linear again, with the trained weights

Each linear's three products run on values rounded to NVFP4, accumulated in fp32:

    forward   Q(x) Q(W)^T             x in blocks of 16 along in_features
    dgrad     Q(dy) Q(W)              dy in blocks along out_features, stochastically rounded
    wgrad     Q(H dy)^T Q(H x)        in blocks along the tokens, both rotated by a random Hadamard H

Weights have one scale for each 16 x 16 tile, so that forward and dgrad see the same rounded weight.
Stochastic rounding is for gradients only, the Hadamard transform for wgrad only, as in the paper: the
one makes forward worse, the other would have to be undone. A few linears stay in high precision.

The emulation says what FP4 does to a loss; it is slower than the products it imitates. Values are rounded
as `thresher.kernels.nvfp4.quantize.quantize` rounds them, mode "thresher".
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from thresher.kernels.nvfp4 import cpu as nvfp4_cpu
from thresher.kernels.nvfp4.hadamard import random_hadamard
from thresher.kernels.nvfp4.quantize import MODES

from ..errors import ArgumentError
from ..formats.nvfp4 import BLOCK, E2M1_MAX, E4M3_MAX, pad_blocks

HEADS = ("lm_head", "head", "classifier", "score", "output_projection")


@dataclass(frozen=True)
class TrainingRecipe:
    """Which products run in FP4 and how.

    forward, dgrad, wgrad: round that product's factors. hadamard: rotate wgrad's factors.
    stochastic: round gradients stochastically. tiled: one weight scale for each 16 x 16 tile, else for each
    16 of a row, which makes forward and dgrad see different weights.
    stochastic_forward: round activations and weights stochastically too; the paper found that to diverge.
    """

    forward: bool = True
    dgrad: bool = True
    wgrad: bool = True
    hadamard: bool = True
    stochastic: bool = True
    tiled: bool = True
    stochastic_forward: bool = False


PAPER = TrainingRecipe()


def fake_quantize(x: torch.Tensor, *, tiled: bool = False, stochastic: bool = False) -> torch.Tensor:
    """`x` [R, K] rounded to NVFP4 and back: fp32 [R, K].

    Equal to `quantize(x, two_dimensional=tiled).dequantize()`, without the detour over codes. stochastic:
    round up with the probability that makes the expected value `x`; draws from torch's generator.
    Blocks that hold NaN or infinity become NaN.
    """
    spec = MODES["thresher"]
    if x.dim() == 2 and x.numel() and nvfp4_cpu.accepts(x):
        largest = nvfp4_cpu.amax(x)
        if largest.isfinite():  # one pass in C++
            g = spec.tensor_scale(largest, E4M3_MAX)
            seed = int(torch.randint(1, 1 << 62, ())) if stochastic else 0
            return nvfp4_cpu.fake_quantize(x, float(g), float(spec.decode(g)), tiled, seed)
    blocks = pad_blocks(x).float().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    if tiled:
        rows = amax.shape[0]
        tall = nn.functional.pad(amax, (0, 0, 0, -rows % BLOCK)).unflatten(0, (-1, BLOCK))
        amax = tall.amax(1).repeat_interleave(BLOCK, 0)[:rows]
    largest = amax.max() if amax.numel() else amax.new_zeros(())
    g = spec.tensor_scale(largest, E4M3_MAX)
    scale = spec.block_scale(amax, g, x.dtype)
    value = (blocks * spec.multiplier(scale, g).unsqueeze(-1)).clamp(-E2M1_MAX, E2M1_MAX)
    size = value.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    steps = value / step  # exact: steps are powers of two; `round` then ties to the even code
    rounded = (steps + torch.rand_like(steps)).floor_() if stochastic else steps.round_()
    back = rounded * step * (scale * spec.decode(g)).unsqueeze(-1)
    return back.flatten(-2)[..., : x.shape[-1]]


def _rotated(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """[R, M] with each run of 16 along M rotated; M is zero-padded, which adds nothing to a product over M."""
    return random_hadamard(pad_blocks(x), signs)


class _Product(torch.autograd.Function):
    """x [M, K] times weight [N, K] transposed."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, recipe: TrainingRecipe, signs: torch.Tensor
    ) -> torch.Tensor:
        noisy = recipe.stochastic_forward
        with torch.autocast(x.device.type, enabled=False):
            if recipe.forward:
                rounded = fake_quantize(weight, tiled=recipe.tiled, stochastic=noisy)
                y = fake_quantize(x, stochastic=noisy) @ rounded.t()
            else:
                rounded, y = weight.float(), x.float() @ weight.float().t()
        # forward and dgrad share the rounded weight where tiles make it the same
        ctx.save_for_backward(x, weight, rounded if recipe.forward and recipe.tiled else None)
        ctx.recipe, ctx.signs = recipe, signs
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, rounded = ctx.saved_tensors
        recipe: TrainingRecipe = ctx.recipe
        dx = dw = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                if recipe.dgrad:
                    if rounded is None:  # blocks along out_features, which this product sums over
                        turned = weight if recipe.tiled else weight.t()
                        rounded = fake_quantize(turned, tiled=recipe.tiled)
                        rounded = rounded if recipe.tiled else rounded.t()
                    dx = fake_quantize(grad, stochastic=recipe.stochastic) @ rounded
                else:
                    dx = grad.float() @ weight.float()
                dx = dx.to(x.dtype)
            if ctx.needs_input_grad[1]:
                left, right = grad.float().t(), x.float().t()
                if recipe.wgrad:
                    if recipe.hadamard:
                        left, right = _rotated(left, ctx.signs), _rotated(right, ctx.signs)
                    left = fake_quantize(left, stochastic=recipe.stochastic)
                    right = fake_quantize(right, stochastic=recipe.stochastic_forward)
                dw = (left @ right.t()).to(weight.dtype)
        return dx, dw, None, None


class NVFP4Linear(nn.Linear):
    """A linear whose products run in emulated NVFP4; parameters and state dict are those of nn.Linear.

    recipe may be exchanged while training. signs: [16] of +-1, the fixed random signs of the transform.
    """

    recipe: TrainingRecipe = PAPER
    signs: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.reshape(-1, input.shape[-1])
        y = _Product.apply(rows, self.weight, self.recipe, self.signs)
        y = y.view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@dataclass(frozen=True)
class Swapped:
    """What `nvfp4_training` did. swapped: names. kept: name -> why that linear stays in high precision.
    share: of the linears' weights, how much runs in FP4."""

    swapped: tuple[str, ...]
    kept: dict[str, str]
    share: float


def nvfp4_training(
    model: nn.Module,
    recipe: TrainingRecipe = PAPER,
    *,
    keep: Sequence[str] = ("head", "last"),
    seed: int = 0,
) -> Swapped:
    """Make a model's linears train in NVFP4, in place; weights and their names stay as they are.

    keep: which stay in high precision: "head", "first" or "first:2" and "last" or "last:8" for so many blocks
        at either end (the paper keeps about 15 % of the linears, mostly the last), or globs on module names.
    seed: of the transform's signs, which are the same for every layer.
    Raises ArgumentError for a `keep` entry that names no linear, "head" and the two ends excepted.
    """
    if isinstance(keep, str):
        raise ArgumentError("keep", repr(keep), "a list of words or globs", f"Write keep=[{keep!r}].")
    linears = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, NVFP4Linear)}
    kept = _kept(model, linears, keep)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (BLOCK,), generator=generator).float() * 2 - 1
    swapped = []
    for name, module in linears.items():
        if name in kept:
            continue
        module.__class__ = NVFP4Linear  # hooks, parameters and references to the module all survive
        module.recipe = recipe  # type: ignore[assignment]
        module.signs = signs.to(module.weight.device)
        swapped.append(name)
    total = sum(m.weight.numel() for m in linears.values())
    share = sum(linears[n].weight.numel() for n in swapped) / max(1, total)
    return Swapped(tuple(swapped), kept, share)


def use_recipe(model: nn.Module, recipe: TrainingRecipe) -> None:
    """Change the recipe of every NVFP4Linear, e.g. to a high-precision forward for the end of training."""
    for module in model.modules():
        if isinstance(module, NVFP4Linear):
            module.recipe = recipe


def restore(model: nn.Module) -> None:
    """Turn every NVFP4Linear back into nn.Linear, weights kept."""
    for module in model.modules():
        if isinstance(module, NVFP4Linear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
            for name in ("recipe", "signs"):
                module.__dict__.pop(name, None)


def _kept(model: nn.Module, linears: dict[str, Any], keep: Sequence[str]) -> dict[str, str]:
    blocks = max(
        ((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)),
        key=lambda item: len(item[1]),
        default=("", nn.ModuleList()),
    )
    kept: dict[str, str] = {}
    for word in keep:
        kind, _, count = word.partition(":")
        if kind == "head":
            chosen = _head(model, linears)
        elif kind in ("first", "last") and (not count or count.isdigit()):
            number = int(count or 1)
            order = range(len(blocks[1]))
            ends = order[:number] if kind == "first" else order[max(0, len(order) - number) :]
            chosen = [n for n in linears if any(n.startswith(f"{blocks[0]}.{i}.") for i in ends)]
        else:
            chosen = [n for n in linears if fnmatch.fnmatchcase(n, word)]
            if not chosen:
                raise ArgumentError(
                    "keep", repr(word), "head, first, first:N, last, last:N or a glob that names a linear",
                    f"This model's linears are called like {next(iter(linears), 'nothing')}.",
                )  # fmt: skip
        for name in chosen:
            kept.setdefault(name, f"It is kept in high precision by keep={word!r}.")
    return kept


def _head(model: nn.Module, linears: dict[str, Any]) -> list[str]:
    ask: Any = getattr(model, "get_output_embeddings", None)
    found = None if ask is None else ask()
    if found is not None:
        return [n for n, m in linears.items() if m is found]
    return [n for n in linears if n.rsplit(".", 1)[-1] in HEADS]
