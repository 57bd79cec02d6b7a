"""What all checks together add to a call: the row `overhead` of trust.py."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from _harness import Benchmark, interleave


@contextlib.contextmanager
def unchecked(sessions: Any) -> Iterator[None]:
    """Within the context no operator checks its arguments, and no call looks whether weights changed."""
    from thresher import op, ops

    known = [(o, o.check) for o in ops.all_ops()]
    fresh = [s._fresh for s in sessions if getattr(s, "_fresh", None) is not None]
    modes = [f.mode for f in fresh]
    for one, _ in known:
        one.check = None
    for f in fresh:
        f.mode = "trust"
    try:
        with mock.patch.object(op, "_check_devices", lambda *_: None):
            yield
    finally:
        for one, check in known:
            one.check = check
        for f, mode in zip(fresh, modes):
            f.mode = mode


def overhead(bench: Benchmark) -> None:
    """One compiled model with all checks and with none of them, in turn: a call, and a step of `generate`."""
    import thresher

    rounds = 10 if bench.args.quick else 40
    for name, make in (
        ("MiniLM, 8 texts", minilm),
        ("step of generate, 4 layers of SmolLM2 in NVFP4", decode_step),
    ):
        model, inputs, recipe, new = make()
        with torch.no_grad():
            fast = thresher.compile(model, inputs, recipe, dynamic=True)

            def call(new: int, fast: Any = fast, inputs: Any = inputs) -> Any:
                return (
                    fast.generate(**inputs, max_new_tokens=new, do_sample=False, wait=True)
                    if new
                    else fast(**inputs)
                )

            def bare(new: int, fast: Any = fast, call: Any = call) -> Any:
                with unchecked(fast.sessions):
                    return call(new)

            def empty(fast: Any = fast) -> None:
                with unchecked(fast.sessions):
                    pass

            call(new)
            forms = {
                "checked": functools.partial(call, new),
                "bare": functools.partial(bare, new),
                "empty": empty,
            }
            if new:  # less the prompt's
                forms |= {
                    "checked prompt": functools.partial(call, 1),
                    "bare prompt": functools.partial(bare, 1),
                }
            found = {k: t.cpu_min for k, t in interleave(forms, rounds=rounds).items()}
        checked, without = found["checked"], found["bare"] - found["empty"]
        if new:
            checked = (checked - found["checked prompt"]) / (new - 1)
            without = (found["bare"] - found["bare prompt"]) / (new - 1)
        share = checked / without - 1
        bench.row(what="overhead", model=name, checked_ms=round(checked, 4), bare_ms=round(without, 4),
                  share=round(share, 5))  # fmt: skip
        bench.claim(f"what the checks add to a call: {name}", max(0.0, share), "<= 0.01")


def minilm() -> tuple[torch.nn.Module, dict[str, Any], Any, int]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=3000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    lengths = torch.tensor([12, 20, 31, 9, 44, 27, 16, 60])
    mask = (torch.arange(60)[None] < lengths[:, None]).long()
    return (
        BertModel(config).eval(),
        {"input_ids": torch.randint(1, 3000, mask.shape) * mask, "attention_mask": mask},
        "exact",
        0,
    )


def decode_step() -> tuple[torch.nn.Module, dict[str, Any], Any, int]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=3000, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, eos_token_id=None, pad_token_id=0)).eval()  # fmt: skip
    ids = torch.randint(1, 3000, (1, 8))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, inputs, {"nvfp4": {"min_weights": 0, "activations": "int16"}}, 49
