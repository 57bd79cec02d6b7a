"""Sparse MLPs: what the kernels reach, what a decode step gains, and what the density loss buys.

    kernel    C++ kernel against the byte-ideal, batch 1, fp32, bf16 and int8, alone and with its call from Python
    dispatch  the operator against the dense product at every density and batch 1 to 64
    exact     bit equality with its own all-active run; error against fp64
    decode    a whole step of a toy decoder against Inductor's dense one
    detect    sites found and false rewrites over architectures
    train     digits: exact density with the loss, without, and thresholded (see deft_digits.py)

The byte-ideal of a kernel is the union density times the best dense time, the kernel's own with every neuron
on included: it reads exactly the share of the bytes that it must. Rows that lie apart cannot be read as fast as a
whole weight, so beside it stands what reading the same rows costs by itself (`_row_reads.py`). Weights rotate through
more memory than the last-level cache holds, and each call has other active neurons. `--only kernel decode` runs
those parts.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _harness import Benchmark, arguments, interleave
from _row_reads import read
from deft_digits import train_digits
from torch import nn
from torch.nn import functional as F

import thresher
from thresher.kernels import catalog
from thresher.kernels.sparse import cpp as sparse_native
from thresher.kernels.sparse import down as sparse_down

PARTS = ("kernel", "dispatch", "exact", "decode", "detect", "train")
DENSITIES = (0.05, 0.1, 0.2, 0.3)
COLD = 1 << 27  # bytes of weights to rotate through; a last-level cache of 32 MB keeps none of them


def weights(neurons: int, features: int, dtype: torch.dtype) -> list[torch.Tensor]:
    columns = features // 2 if dtype == torch.uint8 else features  # 4-bit codes, two a byte
    made = []
    for _ in range(max(2, min(8, COLD // (neurons * columns * dtype.itemsize)))):
        w = torch.empty(neurons, columns, dtype=dtype)
        sparse_native.large_pages(w)
        if dtype.is_floating_point:
            w.uniform_(-1, 1)
        else:
            w.random_(*((-127, 128) if dtype == torch.int8 else (0, 256)))
        made.append(w)
    return made


def activations(
    tokens: int, neurons: int, density: float, dtype: torch.dtype, count: int
) -> list[torch.Tensor]:
    """Whole neurons on or off, so that the union over tokens is the density."""
    made = []
    for _ in range(count):
        on = torch.rand(neurons) < density
        made.append((torch.randn(tokens, neurons) * on).to(dtype))
    return made


def least(forms: dict[str, Callable[[], int]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Least and median thread CPU seconds of one call of each form; a form returns how many calls it made."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    spent: dict[str, list[float]] = {name: [] for name in forms}
    names = list(forms)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = clock()
            calls = forms[name]()
            if turn:
                spent[name].append((clock() - started) / calls)
    return {n: min(s) for n, s in spent.items()}, {n: statistics.median(s) for n, s in spent.items()}


def kernel(bench: Benchmark, quick: bool) -> None:
    shapes = [(8192, 2048)] if quick else [(11008, 4096), (8192, 2048)]
    kinds = (("fp32", torch.float32, torch.float32), ("bf16", torch.bfloat16, torch.bfloat16),
             ("int8", torch.float32, torch.int8), ("int4", torch.float32, torch.uint8))  # fmt: skip
    lowest: dict[str, float] = {}
    of_reading: dict[str, float] = {}
    with_call: dict[str, float] = {}
    four = int8_dense = float("nan")
    for neurons, features in shapes:
        for kind, dtype, held in kinds:
            ws = weights(neurons, features, held)
            scale = None if held.is_floating_point else torch.full((neurons, 1), 0.01)
            if held == torch.uint8:
                scale = torch.full((neurons, features // 64), 0.01)
            pools = {p: activations(1, neurons, p, dtype, 12 if p < 1 else 2) for p in (*DENSITIES, 1.0)}

            def ours(p: float, ws=ws, scale=scale, pools=pools, neurons=neurons) -> int:
                for i, a in enumerate(pools[p]):
                    sparse_native.down(a, ws[i % len(ws)], scale, None, None, neurons)
                return len(pools[p])

            out = torch.empty(1, features, dtype=dtype)
            prepared = {
                p: [
                    sparse_native.down_arguments(a, ws[i % len(ws)], scale, None, None, neurons, out)
                    for i, a in enumerate(pool)
                ]
                for p, pool in pools.items()
            }

            def alone(p: float, prepared=prepared) -> int:
                run = sparse_native.down_kernel()
                for given in prepared[p]:
                    run(*given)
                return len(prepared[p])

            listed = {p: [(a[0] != 0).nonzero().flatten().int() for a in pools[p]] for p in DENSITIES}

            def reading(p: float, ws=ws, listed=listed) -> int:
                for i, rows in enumerate(listed[p]):
                    read(ws[i % len(ws)], rows)
                return len(listed[p])

            forms: dict[str, Callable[[], int]] = {
                f"{p:.2f}": (lambda p=p, alone=alone: alone(p)) for p in (*DENSITIES, 1.0)
            }
            forms |= {f"call {p:.2f}": (lambda p=p, ours=ours: ours(p)) for p in DENSITIES}
            forms |= {f"read {p:.2f}": (lambda p=p, reading=reading: reading(p)) for p in DENSITIES}
            if scale is None:
                rows = [w.t().contiguous() for w in ws]

                def linear(rows=rows, x=pools[1.0][0]) -> int:
                    for w in rows:
                        F.linear(x, w)
                    return len(rows)

                forms["F.linear"] = linear
            best, middle = least(forms, 9 if quick else 25)
            dense = min(best[n] for n in ("1.00", "F.linear") if n in best)
            if kind == "int4":  # unpacking bounds its own dense run, not bytes: half of int8's is the ideal
                dense = min(dense, int8_dense / 2)
            int8_dense = dense
            dense_middle = min(middle[n] for n in ("1.00", "F.linear") if n in middle)
            for p in DENSITIES:
                u = statistics.fmean(float((a != 0).any(0).float().mean()) for a in pools[p])
                name = f"{p:.2f}"
                ideal = u * dense / best[name]
                reads = best[f"read {name}"]
                lowest[kind] = min(lowest.get(kind, 9.9), ideal)
                with_call[kind] = min(with_call.get(kind, 9.9), u * dense / best[f"call {name}"])
                of_reading[kind] = min(of_reading.get(kind, 9.9), reads / best[name])
                four = ideal if kind == "int4" and p == 0.1 else four
                bench.row(part="kernel", shape=f"{neurons}x{features}", type=kind, density=p,
                          sparse_ms=round(best[name] * 1e3, 4), call_ms=round(best[f"call {name}"] * 1e3, 4),
                          read_ms=round(reads * 1e3, 4),
                          own_dense_ms=round(best["1.00"] * 1e3, 4),
                          linear_ms=round(best.get("F.linear", float("nan")) * 1e3, 4),
                          of_ideal=round(ideal, 3), of_ideal_median=round(u * dense_middle / middle[name], 3),
                          against_linear=round(best.get("F.linear", float("nan")) / best[name], 2))  # fmt: skip
    for kind, target in (("fp32", ">= 0.85"), ("bf16", ">= 0.75"), ("int8", ">= 0.75")):
        bench.claim(
            f"CPU kernel, batch 1 {kind}, 5 to 30 %: least fraction of byte-ideal", lowest[kind], target
        )
        bench.claim(f"the same, with the Python call around it, {kind}", with_call[kind], target)
    for kind in ("bf16", "int8"):
        bench.claim(
            f"CPU kernel, batch 1 {kind}, 5 to 30 %: least fraction of reading the same rows and nothing else",
            of_reading[kind],
            ">= 0.80",
        )


def dispatch(bench: Benchmark, quick: bool) -> None:
    """tau=-1: the operator decides by its own measured break-even, as a compiled model does."""
    neurons, features = 8192, 2048
    batches = (1, 4, 16, 64) if quick else (1, 2, 4, 8, 16, 32, 64)
    shares = (
        (0.0, 0.05, 0.2, 0.5, 0.8, 1.0)
        if quick
        else (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    )
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        ws = weights(neurons, features, dtype)[:3]
        rows = [w.t().contiguous() for w in ws]
        for tokens in batches:
            for p in shares:
                pool = activations(tokens, neurons, p, dtype, 3)

                def ours(pool=pool, ws=ws) -> int:
                    for a, w in zip(pool, ws):
                        sparse_down.sparse_down(a, w, None, None, None, -1.0, 64, "")
                    return 3

                def dense(pool=pool, rows=rows) -> int:
                    for a, w in zip(pool, rows):
                        F.linear(a, w)
                    return 3

                best, _ = least({"ours": ours, "dense": dense}, 3 if quick else 5)
                ratio = best["ours"] / best["dense"]
                if ratio > 1.02:  # noise or real? look again, longer
                    best, _ = least({"ours": ours, "dense": dense}, 9)
                    ratio = best["ours"] / best["dense"]
                worst = max(worst, ratio)
                bench.row(part="dispatch", type=str(dtype)[6:], batch=tokens, density=p,
                          sparse_ms=round(best["ours"] * 1e3, 4), linear_ms=round(best["dense"] * 1e3, 4),
                          time_over_dense=round(ratio, 3))  # fmt: skip
    bench.claim("any density, batch 1 to 64: greatest time over dense F.linear", worst, "<= 1.03")


def exact(bench: Benchmark) -> None:
    equal, worse = True, 0.0
    everything = torch.tensor(-1.0)  # below any |a|: keeps every neuron
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 3, 4, 16):
            w = (torch.randn(4096, 1024) / 64).to(dtype)
            for p in (0.0, 0.05, 0.3, 1.0):
                (a,) = activations(tokens, 4096, p, dtype, 1)
                ours, _ = sparse_native.down(a, w, None, None, None, 4096)
                whole, _ = sparse_native.down(a, w, None, None, everything, 4096)
                equal &= torch.equal(ours, whole)  # type: ignore[arg-type]
                true = a.double() @ w.double()
                dense = (F.linear(a, w.t().contiguous()).double() - true).norm()
                if dense > 0:
                    worse = max(worse, float((ours.double() - true).norm() / dense))  # type: ignore[union-attr]
                    bench.row(part="exact", type=str(dtype)[6:], batch=tokens, density=p,
                              error_over_dense=round(float((ours.double() - true).norm() / dense), 3))  # fmt: skip
    bench.claim("exact mode: bitwise equal to its own all-active run (1 is yes)", float(equal), "== 1")
    bench.claim("exact mode: error against fp64 over dense F.linear's, greatest", worse, "<= 2")


class Decoder(nn.Module):
    """Layers of a [d, d] linear (in attention's place) and an MLP whose neurons are on with probability p."""

    def __init__(self, layers: int, width: int, neurons: int, density: float, gated: bool):
        super().__init__()
        make = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
        self.mix = nn.ModuleList(make(width, width) for _ in range(layers))
        self.gate = nn.ModuleList(nn.Linear(width, neurons) for _ in range(layers))
        self.up = nn.ModuleList(make(width, neurons) for _ in range(layers if gated else 0))
        self.down = nn.ModuleList(make(neurons, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.gated = gated
        point = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - density)))
        for g in self.gate:
            nn.init.normal_(g.weight, std=width**-0.5)  # of a normalised x: a standard normal each
            nn.init.constant_(g.bias, -point)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, mix in enumerate(self.mix):
            x = x + mix(self.norm(x))
            n = self.norm(x)
            h = F.relu(self.gate[i](n))
            x = x + self.down[i](h * self.up[i](n) if self.gated else h)
        return x


def _all(form: Callable[[torch.Tensor], Any], steps: list[torch.Tensor]) -> None:
    for x in steps:
        form(x)


def decode(bench: Benchmark, quick: bool) -> None:
    """The best dense step is Inductor's, or ours without the sparse MLPs: its linears stream faster than PyTorch's."""
    layers, width, neurons = 3, 2048, 8192
    for gated in (False, True):
        for density in (0.05,) if quick else (0.05, 0.2):
            torch.manual_seed(0)
            model = Decoder(layers, width, neurons, density, gated).eval()
            steps = [torch.randn(1, 1, width) for _ in range(4)]
            with torch.no_grad():
                dense = torch.compile(model, dynamic=False)
                torch._dynamo.reset()
                ours = thresher.compile(model, (steps[0],), deft=True, dynamic=False)
                own = thresher.compile(model, (steps[0],), thresher.Recipe(()), dynamic=False)
                dense(steps[0])
                torch.testing.assert_close(ours(steps[0]), dense(steps[0]), rtol=1e-3, atol=1e-4)
                forms = {
                    name: functools.partial(_all, form, steps)
                    for name, form in (("dense", dense), ("own dense", own), ("ours", ours))
                }
                best = interleave(forms, rounds=7 if quick else 11)
            found = [a["union_density"] for a in ours.report["deft"].activity.values()]
            p = statistics.fmean(found)
            rest, mlp = width * width, width * neurons
            whole = rest + (3 if gated else 2) * mlp
            part = rest + (1 + (2 if gated else 1) * p) * mlp
            ms = {name: timing.cpu_min / len(steps) for name, timing in best.items()}
            ceiling, gain = whole / part, ms["dense"] / ms["ours"]
            over_best = min(ms["dense"], ms["own dense"]) / ms["ours"]
            bench.row(part="decode", form="ReGLU" if gated else "ReLU", density=round(p, 4),
                      sparse_ms=round(ms["ours"], 3), linear_ms=round(ms["dense"], 3),
                      own_dense_ms=round(ms["own dense"], 3), gain=round(gain, 3), over_best=round(over_best, 3),
                      ceiling=round(ceiling, 3), of_ideal=round(over_best / ceiling, 3))  # fmt: skip
            if density == 0.05:
                name = "gated (ReGLU, up rows skipped)" if gated else "non-gated"
                if not gated:
                    bench.claim(f"decode step at 5 %, {name}: dense Inductor / ours", gain, ">= 1.55")
                bench.claim(
                    f"decode step at 5 %, {name}: gain over the best dense step, of the byte ceiling {ceiling:.2f}",
                    over_best / ceiling,
                    ">= 0.90",
                )
            torch._dynamo.reset()


def detect(bench: Benchmark) -> None:
    """Dry runs over tiny models: every MLP with a flat zero must be rewritten, and no other."""
    import transformers as hf

    w = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2, vocab_size=96)
    t5 = dict(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_heads=4,
        num_layers=2,
        decoder_start_token_id=0,
        use_cache=False,
    )
    gpt = dict(n_embd=32, n_inner=48, n_head=4, n_layer=2, n_positions=64, vocab_size=96)
    llama = dict(**w, num_key_value_heads=2)
    ids = {"input_ids": torch.arange(12)[None], "attention_mask": torch.ones(1, 12, dtype=torch.int64)}
    phi = dict(**llama, pad_token_id=0)
    both = {**ids, "decoder_input_ids": ids["input_ids"][:, :5]}
    yes: dict[str, Any] = {
        "BERT": (lambda: hf.BertModel(hf.BertConfig(**w, hidden_act="relu")), ids, 2),
        "RoBERTa": (lambda: hf.RobertaModel(hf.RobertaConfig(**w, hidden_act="relu")), ids, 2),
        "GPT-2 (Conv1D)": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt, activation_function="relu")), ids, 2),
        "OPT": (lambda: hf.OPTForCausalLM(hf.OPTConfig(vocab_size=96, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
                num_attention_heads=4, num_hidden_layers=2)), ids, 2),
        "T5 (ReLU)": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5)), both, 4),
        "T5 (gated)": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5, feed_forward_proj="gated-relu")), both, 4),
        "Llama (ReGLU)": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**llama, hidden_act="relu")), ids, 2),
        "Arcee (squared ReLU)": (lambda: hf.ArceeForCausalLM(hf.ArceeConfig(**llama, head_dim=8)), ids, 2),
        "Phi-3 (fused gate_up)": (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**phi, hidden_act="relu")), ids, 2),
        "ALBERT (tied)": (lambda: hf.AlbertModel(hf.AlbertConfig(**w, embedding_size=32, hidden_act="relu")), ids, 2),
    }  # fmt: skip
    no: dict[str, Any] = {
        "BERT (GELU)": (lambda: hf.BertModel(hf.BertConfig(**w)), ids, 0),
        "GPT-2 (tanh GELU)": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt)), ids, 0),
        "Llama (SiLU)": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**llama)), ids, 0),
        "Phi-3 (SiLU, fused)": (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**phi)), ids, 0),
    }
    found = wanted = false = 0
    for name, (make, batch, sites) in {**yes, **no}.items():
        torch._dynamo.reset()
        account = thresher.explain(make().eval(), batch, deft={"min_bytes": 0}).report["deft"]
        bench.row(part="detect", form=name, sites=sites, rewritten=len(account.rewritten))
        found, wanted = found + min(sites, len(account.rewritten)), wanted + sites
        false += max(0, len(account.rewritten) - sites)
    bench.claim("detection: share of sites found", found / wanted, "== 1")
    bench.claim("detection: false rewrites", false, "== 0")


def main() -> None:
    args = arguments(
        __doc__, lambda p: p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    )
    bench = Benchmark("deft", args)
    catalog.load()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    runs: dict[str, Callable[[], None]] = {
        "kernel": lambda: kernel(bench, args.quick),
        "dispatch": lambda: dispatch(bench, args.quick),
        "exact": lambda: exact(bench),
        "decode": lambda: decode(bench, args.quick),
        "detect": lambda: detect(bench),
        "train": lambda: train_digits(bench, seeds=2 if args.quick else 5),
    }
    for part in args.only:
        runs[part]()
    bench.not_measured(
        "GPU kernels, bf16, batch 1 to 8: fraction of ideal at 50 % and 90 %", "This machine has no GPU."
    )
    bench.finish()


if __name__ == "__main__":
    main()
