"""Trains the tiny model and keeps its weights: ten to twenty minutes on one CPU core.

Three stages: the encoder learns to name what each cell shows; the decoder learns to look up one colour; last comes
a mixture in which chain questions prevail, at a constant rate until most are answered and a falling one behind. No
loss sees anything but answers. A run is repeated by its seed.

Two things about the start make look-ups quick to learn:

- The words for digits and colours are the encoder's own classes, so text and image speak of them in one language, as
  they do in a model whose vision tower was aligned with its text.
- The first two layers' attention looks for what is alike and copies it (queries start as keys, outputs as values
  transposed, akin to mimetic initialisation, arXiv 2305.09828); the other layers start as they come. So a chain's two
  look-ups come to lie in layers one and two, and a cut between them takes evidence away before it was read. Started
  like this in all six layers, one seed in two spread its look-ups over the depth and learned them late.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

from thresher.files import cache_dir

from . import data
from .model import TinyVLM

RECIPE = 5  # raise it with any change to data, model or training, so that old weights are not taken
TURNS, BATCH, EVERY = 8, 8, 100
ENCODER_STEPS, LOOK_UP_STEPS, CHAIN_STEPS = 800, 500, 1500
LEARNED, PATIENCE = 0.6, 6000  # chains: constant rate up to this accuracy, for at most so many steps
LOOK_UP = {data.DIRECT: 1.0}  # shares of each kind of question
CHAIN = {data.CHAIN: 0.6, data.DIRECT: 0.4}
RATE = 2.5e-3
WEIGHT_DECAY, CLIP, WARM_UP = 0.02, 1.0, 100
LOOK_UPS = 2  # of a chain question: so many layers start by looking, and the others as they come
LOGIT_SCALE = 0.1  # of the decoder's answers at the start: it knows nothing yet


def checkpoint(seed: int) -> Path:
    """Where the weights of this recipe and seed are kept."""
    return cache_dir() / "tiny_vlm" / f"recipe{RECIPE}-seed{seed}.safetensors"


def _optimise(
    name: str,
    parameters: Iterable[nn.Parameter],
    steps: int,
    loss_of: Callable[[], tuple[torch.Tensor, float]],
    log: Callable[[str], None],
    learned: float = 0.0,
) -> None:
    """AdamW with warm-up, a cosine to zero and clipped gradients. `loss_of` gives a loss and an accuracy.

    learned: hold the rate until this accuracy is reached; the cosine's `steps` begin there.
    """
    weights = list(parameters)
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=WEIGHT_DECAY)
    begin, mean, step, held = time.process_time(), 0.0, 0, 0 if learned else WARM_UP
    while step < (held or PATIENCE) + steps:
        falling = math.cos(math.pi * max(0, step - held) / steps) if held else 1.0
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / WARM_UP) * (1 + falling) / 2
        loss, accuracy = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        mean += accuracy / EVERY
        if step % EVERY == 0:
            spent = time.process_time() - begin
            log(f"{name} {step}: loss {loss.item():.3f}, accuracy {mean:.3f}, {spent:.0f} CPU-s")
            if not held and (mean > learned or step >= PATIENCE):
                held = step
            mean = 0.0


class _Heads(nn.Module):
    """Names what image tokens [..., d] show: logits of ten digits and none, of eight colours and none."""

    def __init__(self, width: int):
        super().__init__()
        self.words = nn.Parameter(torch.randn(data.DIGITS + data.COLOURS, width) / width**0.5)
        self.none = nn.Linear(width, 2)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        digit, colour = (tokens @ self.words.t()).split([data.DIGITS, data.COLOURS], dim=-1)
        no_digit, no_colour = self.none(tokens).split(1, dim=-1)
        return torch.cat([digit, no_digit], dim=-1), torch.cat([colour, no_colour], dim=-1)


def _encoder_loss(model: TinyVLM, heads: _Heads, make: torch.Generator) -> tuple[torch.Tensor, float]:
    """Each image token names its cell's digit and colour."""
    scene = data.draw(BATCH * 2, "train", make)
    tokens = data.patches_of_cell(torch.arange(data.GRID**2))
    digit, colour = heads(model.encoder(scene.images)[:, tokens])  # [B, 25, 4, 11] and [B, 25, 4, 9]
    digit_in, colour_in = (
        t[..., None].expand(-1, -1, tokens.shape[1]) for t in (scene.digit_in, scene.colour_in)
    )
    loss = cross_entropy(digit.flatten(0, 2), digit_in.flatten())
    loss = loss + cross_entropy(colour.flatten(0, 2), colour_in.flatten())
    right = (digit.argmax(-1) == digit_in) & (colour.argmax(-1) == colour_in)
    return loss, right.float().mean().item()


@torch.no_grad()
def _align(model: TinyVLM, heads: _Heads, make: torch.Generator) -> None:
    """Words start as the encoder knows them; the first layers' attention looks for what is alike."""
    decoder, config = model.decoder, model.decoder.config
    size = model.encoder(data.draw(BATCH, "train", make).images).square().mean().sqrt()
    words = heads.words / heads.words.square().mean().sqrt()
    decoder.get_input_embeddings().weight[: len(words)] = words * size
    decoder.lm_head.weight[: data.DIGITS] = words[: data.DIGITS] * LOGIT_SCALE
    shared = config.num_attention_heads // config.num_key_value_heads
    for layer in decoder.model.layers[:LOOK_UPS]:
        attention = layer.self_attn
        for wide, narrow in ((attention.q_proj, attention.k_proj), (attention.o_proj, attention.v_proj)):
            narrow.weight.normal_(0, config.hidden_size**-0.5)
            heads_of = narrow.weight.unflatten(0, (config.num_key_value_heads, -1))
            alike = heads_of.repeat_interleave(shared, dim=0).flatten(0, 1)
            wide.weight.copy_(alike if wide is attention.q_proj else alike.t())


def _decoder_loss(
    model: TinyVLM, shares: dict[int, float], make: torch.Generator
) -> tuple[torch.Tensor, float]:
    """Eight turns on one image; only the answers count. The accuracy is that of the most frequent kind."""
    scene = data.draw(BATCH, "train", make)
    draw = torch.multinomial(torch.tensor(list(shares.values())), BATCH * TURNS, True, generator=make)
    mode = torch.tensor(list(shares))[draw].view(BATCH, TURNS)
    subject = torch.rand(BATCH, data.COLOURS, generator=make).argsort(1)[:, :TURNS]
    digits, _ = data.answer(scene, mode, subject)
    text = torch.cat([data.question(mode, subject), digits[..., None]], dim=-1).flatten(1)
    hidden = model.decoder.model(inputs_embeds=model.embed(scene.images, text)[0], use_cache=False)[0]
    asked = data.PATCHES + torch.arange(TURNS) * data.TURN + data.QUESTION - 1
    logits = model.decoder.lm_head(hidden[:, asked])
    right = (logits.argmax(-1) == digits)[mode == max(shares, key=lambda kind: shares[kind])]
    return cross_entropy(logits.flatten(0, 1), digits.flatten()), right.float().mean().item()


def train(seed: int = 0, log: Callable[[str], None] = print) -> TinyVLM:
    """A freshly trained model. Deterministic for a machine, a thread count and a seed."""
    torch.manual_seed(seed)
    make = torch.Generator().manual_seed(seed + 1)
    model = TinyVLM()
    heads = _Heads(model.decoder.config.hidden_size)
    both = [*model.encoder.parameters(), *heads.parameters()]
    _optimise("encoder", both, ENCODER_STEPS, lambda: _encoder_loss(model, heads, make), log)
    _align(model, heads, make)
    decoder = list(model.parameters())
    _optimise("look-up", decoder, LOOK_UP_STEPS, lambda: _decoder_loss(model, LOOK_UP, make), log)
    _optimise("chain", decoder, CHAIN_STEPS, lambda: _decoder_loss(model, CHAIN, make), log, LEARNED)
    return model.eval()


def load(seed: int = 0, log: Callable[[str], None] = print) -> TinyVLM:
    """The trained model: from the user's cache, else as it is kept beside this file in fp16, else trained now."""
    path = checkpoint(seed)
    kept = Path(__file__).with_name(path.name)
    if not path.exists() and kept.exists():
        path = kept
    elif not path.exists():
        log(f"Training the tiny model once (seed {seed}); its weights go to {path}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(train(seed, log).state_dict(), str(partial))
        partial.replace(path)
    model = TinyVLM()
    model.load_state_dict(load_file(str(path)))
    return model.eval()
