"""Prepacking: time, error, memory and compilations against padding and against the other ways around it.

S* is the bound that FLOPs set: the padded batch's over those of its real tokens. E = speed-up over padded
torch.compile / S*. Every form runs on the same batch in the same process, in turns, on one thread. The
decoder is Llama-shaped with random weights (hidden 384, 6 query and 2 key heads, vocabulary 2048): lengths
decide, not the weights.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from _harness import Benchmark, arguments, interleave
from _prepacking_costs import boundary, memory
from _prepacking_model import HIDDEN, LONGEST, ROWS, batch_of, decoder

import thresher
from thresher.runtime.packing.binpack import pack_dataset
from thresher.tools import lengths as length_sets

SETS = ("long-tail", "one-long", "uniform", "mmlu-like", "alpaca-like", "samsum-like")
FORMS = (
    "padded eager",
    "padded compile",
    "length-ordered",
    "bin-packed",
    "rows by cost",
    "flattening",
    "ours",
)
GROUPS = 4  # of length-ordered batching, each padded to its own longest row


def bound(lengths: list[int], model: torch.nn.Module, layers: int) -> float:
    """S*, with causal attention computed densely by the padded model (it has an explicit mask)."""
    linear = 2 * sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in n
    )
    pair, longest = 4 * layers * HIDDEN, max(lengths)
    padded = len(lengths) * longest * (linear + pair * longest)
    return padded / (sum(lengths) * linear + pair / 2 * sum(n * n for n in lengths))


def quiet() -> None:
    import warnings

    warnings.filterwarnings("ignore")
    hf.logging.set_verbosity_error()


def forms_of(
    model: torch.nn.Module, batches: dict[str, dict[str, torch.Tensor]]
) -> dict[str, Callable[[dict], Any]]:
    """name -> function of a batch. Each is compiled once, at symbolic sizes."""
    first = next(iter(batches.values()))
    ours = thresher.compile(model, first, dynamic=True)
    published = thresher.compile(model, first, dynamic=True, prepack={"form": "rows", "capacity": 1})
    by_cost = thresher.compile(model, first, dynamic=True, prepack={"form": "rows"})
    padded = torch.compile(model, backend="inductor", dynamic=True)

    def ordered(batch: dict[str, torch.Tensor]) -> list[Any]:
        lengths = batch["attention_mask"].sum(1)
        results = []
        for rows in lengths.argsort().chunk(GROUPS):
            longest = int(lengths[rows].max())
            results.append(padded(**{k: v[rows, :longest].contiguous() for k, v in batch.items()}))
        return results

    def flattening(batch: dict[str, torch.Tensor]) -> Any:
        """transformers' own way: one row, positions that restart, no attention mask, no cache."""
        real = batch["attention_mask"].bool()
        positions = (batch["attention_mask"].cumsum(1) - 1)[real][None]
        return model(input_ids=batch["input_ids"][real][None], position_ids=positions, use_cache=False)

    return {
        "padded eager": lambda b: model(**b),
        "padded compile": lambda b: padded(**b),
        "length-ordered": ordered,
        "bin-packed": lambda b: published(**b),
        "rows by cost": lambda b: by_cost(**b),
        "flattening": flattening,
        "ours": lambda b: ours(**b),
    }  # fmt: skip


def speed(bench: Benchmark, quick: bool, rounds: int) -> None:
    """Times of every form over the length sets, and the claims on them."""
    layers = 2 if quick else 4
    model = decoder(layers)
    names = [*(SETS[:2] if quick else SETS), "all-same"]
    drawn = {name: length_sets.draw(name, ROWS, LONGEST) for name in names}
    batches = {name: batch_of(drawn[name]) for name in names}
    forms = forms_of(model, batches)
    reached: dict[str, float] = {}
    for name, batch in batches.items():
        if name == "all-same":
            chosen = ["padded compile", "ours"]
        else:
            chosen = [f for f in FORMS if not (quick and f in ("padded eager", "flattening"))]
        calls = {f: functools.partial(forms[f], batch) for f in chosen}
        times = interleave(calls, rounds=rounds, warmup=1)
        padding = 1 - sum(drawn[name]) / (ROWS * max(drawn[name]))
        best = bound(drawn[name], model, layers)
        with torch.no_grad():
            real = batch["attention_mask"].bool()
            expected = model(**batch).logits[real]
            error = float((forms["ours"](batch).logits[real] - expected).abs().max())
        for form in chosen:
            gained = times["padded compile"].cpu_min / times[form].cpu_min
            bench.row(lengths=name, tokens=sum(drawn[name]), padding=round(padding, 3), bound=round(best, 2), form=form,
                      speedup=round(gained, 3), E=round(gained / best, 3), max_error=error if form == "ours" else None,
                      **times[form].fields())  # fmt: skip
        ours = times["ours"].cpu_min
        gained = times["padded compile"].cpu_min / ours
        if name == "all-same":
            bench.claim("no padding: time over padded compile", 1 / gained, "<= 1.01")
            continue
        reached[name] = gained / best
        bench.claim(f"E on {name}", gained / best, ">= 0.85")
        bench.claim(
            f"{name}: over bin-packed prepacking, same backend", times["bin-packed"].cpu_min / ours, ">= 1.15"
        )
        bench.claim(f"{name}: over rows of the best capacity", times["rows by cost"].cpu_min / ours, ">= 1.0")
        bench.claim(f"{name}: over length-ordered batching", times["length-ordered"].cpu_min / ours, ">= 1.2")
        bench.claim(f"{name}: largest difference at real tokens, fp32", error, "<= 1e-5")
        if padding >= 0.8:
            bench.claim(f"over padded compile at {padding:.0%} padding ({name})", gained, ">= 4.5")
    overall = math.exp(sum(map(math.log, reached.values())) / len(reached))
    bench.claim("E, geometric mean over the length sets", overall, ">= 0.95")


def compiles(bench: Benchmark, quick: bool) -> None:
    """Compilations over random batches of random shapes, after none and after a warm-up."""
    torch._dynamo.reset()
    config = hf.LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                            num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(0)
    call = torch.compile(model, backend="thresher")
    number = 100 if quick else 1000
    with torch.no_grad(), thresher.sessions.collect() as made:
        halfway = 0
        for i in range(number):
            rows, longest = (
                int(torch.randint(low, high, (), generator=draw)) for low, high in ((2, 17), (4, 129))
            )
            lengths = torch.randint(1, longest + 1, (rows,), generator=draw).tolist()
            call(**batch_of([*lengths[1:], longest], vocabulary=256))
            if i == number // 10:
                halfway = sum(s.counters.lowered for s in made)
    total = sum(s.counters.lowered for s in made)
    bench.row(form=f"compilations over {number} random shapes", compiles=total, graphs=len(made))
    bench.claim(f"programs compiled over {number} random shapes", total, "<= 12")
    bench.claim("of these after the first tenth", total - halfway, "== 0")


def packing_itself(bench: Benchmark) -> None:
    for number, target in ((10_000, 50.0), (1_000_000, 1000.0)):
        many = [
            max(1, int(n))
            for n in torch.empty(number)
            .log_normal_(4.5, 0.8, generator=torch.Generator().manual_seed(0))
            .clamp(max=2048)
        ]
        sizes = torch.tensor(many)
        spent = min(_milliseconds(functools.partial(pack_dataset, sizes, 2048)) for _ in range(3))
        bench.row(
            form=f"pack_dataset, {number} lengths",
            cpu_min_ms=round(spent, 2),
            fill=round(pack_dataset(sizes, 2048).fill, 4),
        )
        bench.claim(f"packing {number} lengths, ms", spent, f"< {target:g}")


def _milliseconds(call: Callable[[], Any]) -> float:
    started = time.thread_time()
    call()
    return (time.thread_time() - started) * 1e3


def leaks(bench: Benchmark) -> None:
    """Change one row's tokens: what do the other rows' logits do? And what a KV cache holds afterwards."""
    model = decoder(2)
    batch = batch_of([40, 7, 23, 64])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, :40] = batch["input_ids"][3, :40]
    ours = thresher.compile(model, batch, dynamic=True)
    changed = float((ours(**batch).logits[1:] - ours(**other).logits[1:]).abs().max())
    bench.claim("largest change of other rows when one is replaced", changed, "== 0")
    real = batch["attention_mask"].bool()
    positions = (batch["attention_mask"].cumsum(1) - 1)[real][None]
    with torch.no_grad():
        alone = [
            model(input_ids=batch["input_ids"][r : r + 1, :n]).logits[0]
            for r, n in enumerate((40, 7, 23, 64))
        ]
        for cache in (False, True):
            flat = model(
                input_ids=batch["input_ids"][real][None], position_ids=positions, use_cache=cache
            ).logits[0]
            bench.row(
                form=f"flattening, use_cache={cache}", max_error=float((flat - torch.cat(alone)).abs().max())
            )
        mine = ours(**batch).logits[real]
    bench.row(form="ours, KV cache returned", max_error=float((mine - torch.cat(alone)).abs().max()))


def nested(bench: Benchmark, rounds: int) -> None:
    """PyTorch's own: nn.TransformerEncoder turns a padded batch into a nested tensor. Only that class has it."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(HIDDEN, 6, 1536, batch_first=True, activation="gelu")
    model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=True).eval()
    lengths = length_sets.draw("long-tail", ROWS, LONGEST)
    pads = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    x = torch.randn(ROWS, max(lengths), HIDDEN)
    model(x, src_key_padding_mask=pads)

    def padded() -> Any:
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return model(x, src_key_padding_mask=pads)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    with torch.no_grad():
        try:
            times = interleave(
                {"padded": padded, "nested": lambda: model(x, src_key_padding_mask=pads)},
                rounds=rounds,
                warmup=1,
            )
        except RuntimeError as reason:
            bench.not_measured(
                "nn.TransformerEncoder nested", f"It fails here: {str(reason).splitlines()[0]}"
            )
            return
    bench.row(lengths="long-tail", form="nn.TransformerEncoder nested (over its padded self)",
              speedup=round(times["padded"].cpu_min / times["nested"].cpu_min, 3), **times["nested"].fields())  # fmt: skip


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--parts", default="", help="comma-separated; default all")

    args = arguments(__doc__, more)
    quiet()
    bench = Benchmark("prepacking", args)
    rounds = 2 if args.quick else 3
    parts: dict[str, Callable[[], None]] = {
        "packing": lambda: packing_itself(bench),
        "leaks": lambda: leaks(bench),
        "memory": lambda: memory(bench, args.quick),
        "compiles": lambda: compiles(bench, args.quick),
        "boundary": lambda: boundary(bench, args.quick, rounds),
        "nested": lambda: nested(bench, rounds),
        "speed": lambda: speed(bench, args.quick, rounds),
    }
    with torch.no_grad():
        for name, run in parts.items():
            if not args.parts or name in args.parts.split(","):
                run()
    for claim in (
        "E, geometric mean, on a GPU",
        "variable-length attention in Triton and varlen_attn against FlexAttention",
    ):
        bench.not_measured(claim, "This machine has no GPU.")
    bench.not_measured("one host sync a call", "On a CPU nothing waits; a test counts the reads of the mask.")
    bench.finish()


if __name__ == "__main__":
    main()
