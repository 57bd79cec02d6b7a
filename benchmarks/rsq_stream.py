"""Peak memory of quantizing a model from its files: a random Llama of 1.5 billion parameters, in bf16 shards.

The weights are written first, a shard a layer, by one process; another one quantizes the directory and is watched.
Two peaks are told apart: all that the process held, and what it held above Python, torch and the imports. Random
weights say nothing about quality; few calibration tokens are enough to pass through every step.

    python benchmarks/rsq_stream.py --json benchmarks/results/rsq_stream.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _harness import Benchmark, arguments

from thresher.tensor_files import write

SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
         "vocab_size": 128256, "max_position_embeddings": 2048, "tie_word_embeddings": False}  # fmt: skip
LAYERS, QUICK_LAYERS = 22, 1

CHILD = """
import json, sys, time, torch
def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))
import thresher
from thresher.passes.rsq.quantizer import driver
source, folder, rows, length, place, threads = sys.argv[1:7]
torch.set_num_threads(int(threads))
import transformers, transformers.models.llama.modeling_llama, torch._dynamo, torch._inductor.compile_fx
imports = kilobytes("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the most ever held is counted from here
said = []
estimate = driver.Driver.estimate
def kept(self):
    said.append(estimate(self))
    return said[-1]
driver.Driver.estimate = kept
ids = torch.randint(0, 32000, (int(rows), int(length)), generator=torch.Generator().manual_seed(0))
wall, cpu = time.perf_counter(), time.process_time()
recipe = thresher.RSQ(bits=4, group_size=64, clip_search=False)  # which saves a third of the time and no memory
low = thresher.quantize(source, ids, recipe, folder=folder, batch_size=1, activations=place)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
low.save(folder + "/whole.safetensors")
print(json.dumps(dict(imports_mb=imports / 1000, peak_mb=kilobytes("VmHWM") / 1000, said_mb=said[0].peak / 1e6,
    said_s=said[0].seconds, said_written_mb=said[0].written / 1e6, written_mb=low.report.bytes_after / 1e6,
    model_mb=low.report.model_bytes / 1e6, linears=len(low.report.linears), exact_fp64=low.report.exact,
    wall_s=wall, cpu_s=cpu, widest=said[0].at)))
"""


def shards(layers: int) -> dict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]]:
    """Names and shapes of the weights, by file."""
    d, f, vocabulary = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    kv = d // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]
    linears = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
               "self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d),
               "mlp.down_proj": (d, f)}  # fmt: skip
    table = (vocabulary, d)
    ends: dict[str, tuple[int, ...]] = {"model.embed_tokens": table, "model.norm": (d,), "lm_head": table}
    found = {"model-ends.safetensors": [(f"{n}.weight", torch.bfloat16, s) for n, s in ends.items()]}
    norms = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    for i in range(layers):
        named: dict[str, tuple[int, ...]] = {**linears, **norms}
        found[f"model-{i:02}.safetensors"] = [
            (f"model.layers.{i}.{n}.weight", torch.bfloat16, s) for n, s in named.items()
        ]
    return found


def build(folder: Path, layers: int) -> int:
    """Write the model, a tensor in memory at a time; returns its number of parameters."""
    make = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    total = 0
    for file, tensors in shards(layers).items():
        shapes = {n: s for n, _, s in tensors}

        def values(name: str, shapes: dict[str, tuple[int, ...]] = shapes) -> torch.Tensor:
            shape = shapes[name]
            if len(shape) == 1:
                return torch.ones(shape, dtype=torch.bfloat16)
            return torch.randn(shape, generator=make).mul_(0.02).bfloat16()

        write(folder / file, tensors, values, {"format": "pt"})
        where |= dict.fromkeys(shapes, file)
        total += sum(torch.Size(s).numel() for s in shapes.values())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config: dict[str, Any] = {**SHAPE, "num_hidden_layers": layers, "architectures": ["LlamaForCausalLM"],
                              "model_type": "llama", "dtype": "bfloat16", "rms_norm_eps": 1e-5}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return total


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--layers", type=int, default=LAYERS)
        parser.add_argument("--sequences", type=int, default=8)
        parser.add_argument("--length", type=int, default=128)
        parser.add_argument("--activations", choices=("memory", "disk"), default="memory")

    args = arguments(__doc__, add)
    bench = Benchmark("rsq_stream", args)
    layers = QUICK_LAYERS if args.quick else args.layers
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "model").mkdir()
        parameters = build(folder / "model", layers)
        started = time.perf_counter()
        command = [sys.executable, "-c", CHILD, folder / "model", folder / "kept", args.sequences, args.length,
                   args.activations, torch.get_num_threads()]  # fmt: skip
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"After {time.perf_counter() - started:.0f} s: {done.stderr[-3000:]}")
    raw = json.loads(done.stdout.splitlines()[-1])
    found = {k: round(v, 2) if isinstance(v, float) and v > 1e-3 else v for k, v in raw.items()}
    bench.row(part="stream", layers=layers, parameters=parameters, tokens=args.sequences * args.length,
              activations=args.activations, threads=torch.get_num_threads(), **found)  # fmt: skip
    print(bench.rows[-1], flush=True)
    own = found["peak_mb"] - found["imports_mb"]
    what = f"random Llama of {parameters / 1e9:.2f}B parameters in bf16"
    claims: list[tuple[str, float, str]] = [
        (f"peak above Python and its imports over the model, {what}", own / found["model_mb"], "<= 0.4"),
        (f"peak of the process over the model, {what}", found["peak_mb"] / found["model_mb"], "<= 0.4"),
        (f"peak of the process in GiB, {what}", found["peak_mb"] * 1e6 / 2**30, "<= 6"),
        (f"peak over what was said before it started, {what}", found["peak_mb"] / found["said_mb"], "<= 1.1"),
    ]
    for name, value, target in claims:
        if args.quick and "over the model" in name:
            bench.not_measured(name, f"--quick has {layers} layers, whose embeddings outweigh them.")
        else:
            bench.claim(name, value, target)
    bench.finish()


if __name__ == "__main__":
    main()
