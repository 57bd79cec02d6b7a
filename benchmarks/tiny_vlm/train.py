"""Trains the tiny model and keeps its weights: about a quarter of an hour on one CPU core.

The encoder first learns to name what each cell shows. Then the decoder learns to look up one colour, at a
constant rate and for as long as it takes, and last a mixture in which chain questions prevail, under a
cosine to zero. A run is repeated by its seed.

Left to itself, a decoder this small spends its steps without finding the second look-up of a chain. Two things
show it where to look. Once it has learned one look-up, two steps in three hide the image from the text in the first
`EARLY` layers, until the later ones have learned it too. While it learns chains, the state behind the early layers
is asked for the second colour, in the embedding's own terms. So the first look-up happens early and the second late,
and what the second one needs must survive a cut in between.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

from thresher.kernels.native import cache_dir

from . import data
from .model import TinyVLM

RECIPE = 3  # raise it with any change to data, model or training, so that old weights are not taken
TURNS, BATCH, EVERY = 8, 8, 50
ENCODER_STEPS, ENCODER_RATE = 600, 3e-3
LOOK_UP = {data.DIRECT: 0.8, data.NAMED: 0.2}  # shares of each kind of question
CHAIN = {data.CHAIN: 0.6, data.DIRECT: 0.25, data.NAMED: 0.15}
LOOK_UP_RATE, LEARNED, PATIENCE = 3e-3, 0.85, 2000  # until this accuracy, at most so many steps
LATE_RATE, CHAIN_RATE, CHAIN_STEPS = 2e-3, 2e-3, 1200  # a higher rate would undo what was learned
EARLY = 2  # layers in which the first look-up of a chain happens
WEIGHT_DECAY, CLIP, WARM_UP = 0.02, 1.0, 100


def checkpoint(seed: int) -> Path:
    """Where the weights of this recipe and seed are kept."""
    return cache_dir() / "tiny_vlm" / f"recipe{RECIPE}-seed{seed}.safetensors"


def _optimise(
    name: str,
    parameters: Iterator[nn.Parameter],
    steps: int,
    rate: float,
    loss_of: Callable[[], tuple[torch.Tensor, float]],
    log: Callable[[str], None],
) -> None:
    """AdamW with warm-up, a cosine to zero and clipped gradients. `loss_of` gives a loss and an accuracy."""
    weights = list(parameters)
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=WEIGHT_DECAY)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - WARM_UP)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [WARM_UP])
    begin, mean = time.process_time(), 0.0
    for step in range(1, steps + 1):
        loss, accuracy = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        schedule.step()
        mean += accuracy / 100
        if step % 100 == 0:
            log(
                f"{name} {step}/{steps}: loss {loss.item():.3f}, accuracy {mean:.3f}, "
                f"{time.process_time() - begin:.0f} CPU-s"
            )
            mean = 0.0


def _encoder_loss(model: TinyVLM, heads: nn.Linear, make: torch.Generator) -> tuple[torch.Tensor, float]:
    """Each image token names its cell's digit and colour."""
    scene = data.draw(BATCH * 2, "train", make)
    tokens = data.patches_of_cell(torch.arange(data.GRID**2))
    logits = heads(model.encoder(scene.images))[:, tokens]  # [B, 25, 4, 11 + 9]
    digit, colour = logits.split([data.DIGITS + 1, data.COLOURS + 1], dim=-1)
    digit_in, colour_in = (
        t[..., None].expand(-1, -1, tokens.shape[1]) for t in (scene.digit_in, scene.colour_in)
    )
    loss = cross_entropy(digit.flatten(0, 2), digit_in.flatten())
    loss = loss + cross_entropy(colour.flatten(0, 2), colour_in.flatten())
    right = (digit.argmax(-1) == digit_in) & (colour.argmax(-1) == colour_in)
    return loss, right.float().mean().item()


_LENGTH = data.PATCHES + TURNS * data.TURN
_CAUSAL = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool).tril()
_BLIND = _CAUSAL.clone()
_BLIND[data.PATCHES :, : data.PATCHES] = False  # the text does not see the image


def _hidden(model: TinyVLM, embeds: torch.Tensor, late: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """States behind the early and behind all layers, normalised. late: the early layers hide the image."""
    inner = model.decoder.model
    rotary = inner.rotary_emb(embeds, torch.arange(_LENGTH)[None])
    hidden = early = embeds
    for index, layer in enumerate(inner.layers):
        mask = _BLIND if late and index < EARLY else _CAUSAL
        hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=rotary)
        if index == EARLY - 1:
            early = hidden
    return inner.norm(early), inner.norm(hidden)


def _decoder_loss(
    model: TinyVLM, shares: dict[int, float], make: torch.Generator, late: bool
) -> tuple[torch.Tensor, float]:
    """Eight turns on one image; the answers count, and the second colour of chains."""
    scene = data.draw(BATCH, "train", make)
    draw = torch.multinomial(torch.tensor(list(shares.values())), BATCH * TURNS, True, generator=make)
    mode = torch.tensor(list(shares))[draw].view(BATCH, TURNS)
    subject = torch.rand(BATCH, data.COLOURS, generator=make).argsort(1)[:, :TURNS]
    number = torch.randint(data.DIGITS, (BATCH, TURNS), generator=make)
    subject = torch.where(mode == data.NAMED, number, subject)
    digits, _ = data.answer(scene, mode, subject)
    text = torch.cat([data.question(mode, subject), digits[..., None]], dim=-1).flatten(1)
    early, hidden = _hidden(model, model.embed(scene.images, text)[0], late)
    asked = data.PATCHES + torch.arange(TURNS) * data.TURN + data.QUESTION - 1
    logits = model.decoder.lm_head(hidden[:, asked])
    loss = cross_entropy(logits.flatten(0, 1), digits.flatten())
    if data.CHAIN in shares:
        first = subject % data.COLOURS
        sought = torch.where(mode == data.CHAIN, scene.digit_of.gather(1, first) % data.COLOURS, first)
        colours = model.decoder.get_input_embeddings().weight[data.COLOUR0 : data.COLOUR0 + data.COLOURS]
        counts = mode != data.DIRECT
        loss = loss + 0.5 * cross_entropy((early[:, asked] @ colours.t())[counts], sought[counts])
    right = (logits.argmax(-1) == digits)[mode == max(shares, key=lambda kind: shares[kind])]
    return loss, right.float().mean().item()


def _train_decoder(model: TinyVLM, make: torch.Generator, log: Callable[[str], None]) -> None:
    """A look-up, then the same in the late layers, each until it is learned; then chains."""
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=LOOK_UP_RATE, weight_decay=WEIGHT_DECAY)
    begin = time.process_time()

    def stage(name: str, shares: dict[int, float], steps: int, rate_at: Callable[[int], float]) -> None:
        found: list[float] = []
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step)
            late = name == "late" and step % 3 != 0
            loss, accuracy = _decoder_loss(model, shares, make, late)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            if late or name != "late":
                found.append(accuracy)
            if step % EVERY == 0:
                mean, found = sum(found) / len(found), []
                log(f"{name} {step}: accuracy {mean:.3f}, {time.process_time() - begin:.0f} CPU-s")
                if name != "chain" and mean > LEARNED:
                    return

    stage("early", LOOK_UP, PATIENCE, lambda step: LOOK_UP_RATE * min(1, step / WARM_UP))
    stage("late", LOOK_UP, PATIENCE, lambda step: LATE_RATE)
    stage(
        "chain",
        CHAIN,
        CHAIN_STEPS,
        lambda step: CHAIN_RATE * (1 + math.cos(math.pi * step / CHAIN_STEPS)) / 2 + 1e-5,
    )


def train(seed: int = 0, log: Callable[[str], None] = print) -> TinyVLM:
    """A freshly trained model. Deterministic for a machine, a thread count and a seed."""
    torch.manual_seed(seed)
    make = torch.Generator().manual_seed(seed + 1)
    model = TinyVLM()
    heads = nn.Linear(model.decoder.config.hidden_size, data.DIGITS + data.COLOURS + 2)
    both = [*model.encoder.parameters(), *heads.parameters()]
    _optimise(
        "encoder", iter(both), ENCODER_STEPS, ENCODER_RATE, lambda: _encoder_loss(model, heads, make), log
    )
    _train_decoder(model, make, log)
    return model.eval()


def load(seed: int = 0, log: Callable[[str], None] = print) -> TinyVLM:
    """The trained model, from the user's cache if it was trained there before."""
    path = checkpoint(seed)
    if not path.exists():
        log(f"Training the tiny model once (seed {seed}); its weights go to {path}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(train(seed, log).state_dict(), str(partial))
        partial.replace(path)
    model = TinyVLM()
    model.load_state_dict(load_file(str(path)))
    return model.eval()
