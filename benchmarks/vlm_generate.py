"""`generate` of a model that sees, behind token pruning and dense, and what the bookkeeping of pruning costs a prompt.

A random LLaVA: 8 layers of width 256 behind a tower of one layer, 1,024 image tokens and 64 of text, 32 new; a quarter of
the image stays behind layer 2. What FLOPs and bytes allow: the dense prompt's time by the layers' FLOPs and the dense steps'
by the bytes of weights and cache that a step reads.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from _harness import Benchmark, alone, arguments, interleave
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from thresher import given_tokens, prompt_tokens
from thresher.compiled import Compiled
from thresher.generation import run
from thresher.generation.last_call import LastCall
from thresher.recipe import Recipe
from thresher.runtime.call_session import CallSession

IMAGE, NEW, SIDE = 96, 32, 256
BOOKS = (
    (CallSession, "wanted"),
    (LastCall, "prompt"),
    (run, "move"),
    (prompt_tokens, "kinds"),
    (given_tokens, "note"),
    (given_tokens, "publish"),
)


def llava() -> Any:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE,
        patch_size=8, projection_dim=64,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    words = torch.randint(1, IMAGE, (1, 64), generator=draw)
    ids = torch.cat([words[:, :16], torch.full((1, (SIDE // 8) ** 2), IMAGE), words[:, 16:]], 1)
    return dict(input_ids=ids, pixel_values=torch.randn(1, 3, SIDE, SIDE, generator=draw))


class Books:
    """CPU seconds spent in what pruning does beside computing, inclusive, and in the calls of the compiled model."""

    def __init__(self) -> None:
        self.spent, self.depth = 0.0, 0

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        before = [(owner, name, getattr(owner, name)) for owner, name in BOOKS]
        for owner, name, function in before:
            setattr(owner, name, self._timed(function))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _timed(self, function: Any) -> Any:
        def timed(*args: Any, **named: Any) -> Any:
            self.depth, began = self.depth + 1, time.thread_time()
            try:
                return function(*args, **named)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.spent += time.thread_time() - began

        return timed


def main() -> None:
    args = arguments(__doc__, lambda parser: parser.add_argument("--lock", default=None))
    bench, model, given = Benchmark("vlm_generate", args), llava(), batch()
    asked = dict(max_new_tokens=NEW, do_sample=False)
    recipes = {"dense": dict(causal_mask=True), "pruned": dict(transprune=dict(stages=((2, 0.25),)))}
    forms = {name: Compiled(model, Recipe.of(None, **recipe)) for name, recipe in recipes.items()}
    calls = {name: (lambda f=form: f.generate(**given, **asked)) for name, form in forms.items()}
    for call in calls.values():
        call()
    rounds = 3 if args.quick else 7
    with alone(args.lock):
        times = interleave(calls, rounds=rounds, warmup=1, least_ms=1)
    done = {name: form.last_call for name, form in forms.items()}
    dense, pruned = done["dense"], done["pruned"]
    weights = sum(p.numel() * p.element_size() for p in model.get_decoder().parameters())
    share = dict(
        flops=pruned.flops / pruned.dense_flops,
        bytes=(weights + pruned.bytes) / (weights + pruned.dense_bytes),
    )
    whole = dense.prefill_seconds + dense.step_seconds
    least = (dense.prefill_seconds * share["flops"] + dense.step_seconds * share["bytes"]) / whole
    for name, call in done.items():
        bench.row(form=name, said=str(call), **times[name].fields())
    gain = times["dense"].cpu_min / times["pruned"].cpu_min
    bench.claim(
        f"generate, 1,024 image tokens and {NEW} new: speed-up over dense of what FLOPs and bytes allow "
        f"({gain:.2f}x of {1 / least:.2f}x)",
        gain * least,
        ">= 0.9",
    )
    prompt, one = forms["pruned"], dict(max_new_tokens=1, do_sample=False)
    shares = []
    for _ in range(rounds):
        books, began = Books(), time.thread_time()
        with books.kept():
            prompt.generate(**given, **one)
        shares.append(books.spent / (time.thread_time() - began))
    bench.row(form="bookkeeping", share=sorted(shares)[len(shares) // 2])
    bench.claim("bookkeeping of pruning, of a prompt's CPU time", sorted(shares)[len(shares) // 2], "<= 0.02")
    bench.finish()


if __name__ == "__main__":
    main()
