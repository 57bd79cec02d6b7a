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
from collections.abc import Callable
from typing import Any

import torch
from _deft_kernels import dispatch, exact, kernel
from _harness import Benchmark, arguments, interleave
from deft_digits import train_digits
from torch import nn
from torch.nn import functional as F

import thresher
from thresher.kernels import catalog

PARTS = ("kernel", "dispatch", "exact", "decode", "detect", "train")


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
