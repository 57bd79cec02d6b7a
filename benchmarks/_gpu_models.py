"""The rows of the GPU benchmark that run whole models, each beside what a user would run otherwise."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from _gpu_card import Card

Found = Iterator[dict[str, Any]]


def llama(card: Card, layers: int, hidden: int = 2048, **more: Any) -> Any:
    import transformers as hf

    tiny = dict(
        hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, vocab_size=97
    )
    real = dict(hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=hidden // 64,
                num_key_value_heads=hidden // 256, vocab_size=32000)  # fmt: skip
    config = hf.LlamaConfig(**(tiny if card.dry else real), num_hidden_layers=card.size(layers, 2),
                            max_position_embeddings=card.size(65536, 256), **more)  # fmt: skip
    torch.manual_seed(0)
    with torch.device(card.device):
        return hf.LlamaForCausalLM(config).to(torch.float32 if card.dry else card.dtype).eval()


def _target(card: Card) -> str:
    return "reference" if card.dry else "inductor"


def prepacking(card: Card) -> Found:
    """E: the speed-up over the padded model under Inductor, over what the FLOPs allow, on six sets of lengths."""
    import thresher
    from thresher.tools import lengths

    model = llama(card, 4, use_cache=False)
    plain = torch.compile(model, dynamic=True) if not card.dry else model
    fast = None
    for name in lengths.DISTRIBUTIONS:
        if name == "all-same":
            continue
        drawn = lengths.draw(name, card.size(32, 3), card.size(1024, 12))
        mask = (torch.arange(max(drawn)) < torch.tensor(drawn)[:, None]).long()
        ids = torch.randint(3, 97, mask.shape) * mask
        batch = {"input_ids": ids.to(card.device), "attention_mask": mask.to(card.device)}
        with torch.no_grad():
            if fast is None:
                fast = thresher.compile(
                    model, batch, "exact", target=_target(card), dynamic=True, verify=False
                )
            padded = card.time(lambda b=batch: plain(**b))
            ours = card.time(functools.partial(fast, **batch))
        share = mask.numel() / sum(drawn)
        yield {"set": name, "padded_ms": padded * 1e3, "ours_ms": ours * 1e3, "speedup": padded / ours,
               "E": padded / ours / share}  # fmt: skip


def pruned(card: Card) -> Found:
    """Prefill of long prompts with ZipVL and with TransPrune, beside the same model with dense flash attention."""
    import thresher

    model = llama(card, 4, use_cache=False)
    options = {
        "zipvl": {"zipvl": dict(keep=0.3, recent=64, spread=64, bucket=64, min_saving=0.0, budget=9.0)},
        "transprune": {"transprune": dict(stages=((1, 0.5),), image_token_id=96, min_image_tokens=2, bucket=64,
                                          min_saving=0.0, budget=9.0)},
    }  # fmt: skip
    if card.dry:
        options["zipvl"]["zipvl"].update(recent=2, spread=2, bucket=1)
        options["transprune"]["transprune"].update(bucket=1)
    for tokens in (24,) if card.dry else (1024, 8192, 32768):
        ids = torch.full((1, tokens), 96, device=card.device)
        ids[:, : tokens // 8] = ids[:, -tokens // 8 :] = 5
        plain = torch.compile(model) if not card.dry else model
        with torch.no_grad():
            dense = card.time(lambda plain=plain, ids=ids: plain(input_ids=ids))
            for method, recipe in options.items():
                fast = thresher.compile(
                    model, {"input_ids": ids}, {**recipe, "verify": False}, target=_target(card)
                )
                ours = card.time(functools.partial(fast, input_ids=ids))
                left = fast.report[method].flops_left
                found = {"method": method, "tokens": tokens, "dense_ms": dense * 1e3, "ours_ms": ours * 1e3,
                         "over_dense": dense / ours}  # fmt: skip
                if left:
                    found["of_attainable"] = dense / ours * left
                yield found


def generate(card: Card) -> Found:
    """New tokens a second of a 1B-shaped model: 4-bit by Thresher, beside Inductor with a static cache."""
    import thresher

    new = card.size(128, 4)
    model = llama(card, 16)
    ids = torch.full((1, card.size(128, 6)), 5, device=card.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    ours = thresher.compile(
        model, batch, {"nvfp4": {"min_weights": 0, "budget": 9.0}, "verify": False}, target=_target(card)
    )
    with torch.no_grad():
        ours.generate(**batch, **settings)  # compiles
        taken = card.time(lambda: ours.generate(**batch, **settings), most=2)
        yield {"form": "thresher nvfp4", "tokens_s": new / taken}
        if card.dry:
            plain = card.time(lambda: model.generate(**batch, **settings), most=2)
        else:
            model.generation_config.cache_implementation = "static"
            model.forward = torch.compile(model.forward, mode="max-autotune", fullgraph=True)
            model.generate(**batch, **settings)
            plain = card.time(lambda: model.generate(**batch, **settings), most=2)
        yield {
            "form": "Inductor max-autotune, static cache",
            "tokens_s": new / plain,
            "over_inductor": plain / taken,
        }


def tensorrt(card: Card) -> Found:
    """A packed batch through engines with our kernels between them, beside Inductor."""
    import thresher
    from thresher.errors import ThresherError

    model = llama(card, 4, use_cache=False)
    mask = (torch.arange(card.size(512, 8)) < torch.tensor([[card.size(512, 8)], [card.size(100, 3)]])).long()
    batch = {"input_ids": (mask * 5).to(card.device), "attention_mask": mask.to(card.device)}
    with torch.no_grad():
        plain = thresher.compile(model, batch, "exact", target=_target(card), verify=False)
        other = card.time(lambda: plain(**batch))
        try:
            fast = thresher.compile(model, batch, "exact", target="tensorrt", verify=False)
        except ThresherError as reason:
            yield {"inductor_ms": other * 1e3, "note": str(reason)[:200]}
            return
        ours = card.time(lambda: fast(**batch))
    yield {"inductor_ms": other * 1e3, "tensorrt_ms": ours * 1e3, "over_inductor": other / ours,
           "engines": len(fast.report.engines)}  # fmt: skip
