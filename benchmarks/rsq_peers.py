"""RSQ beside other tools at equal bits and groups: llm-compressor (GPTQ, AWQ), AutoRound, GPTQModel, HQQ, torchao.

SmolLM2-135M-Instruct, all linears but the head, the same calibration tokens for every tool, judged as in rsq.py: perplexity,
KL to fp32 and top-1 agreement on two texts. Every tool runs in an environment of its own, whose Python is named by
$THRESHER_PEER_<NAME>, such as $THRESHER_PEER_AUTO_ROUND (`pip install auto-round`); a tool without one is left out and said.

    python benchmarks/rsq_peers.py --json benchmarks/results/rsq_peers.json
    python benchmarks/rsq_peers.py --peers hqq,rsq --bits 4,3

Rows are kept under $THRESHER_CACHE_DIR as they come, so that a run goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import rsq
import torch
from _harness import Benchmark, arguments
from safetensors.torch import load_file

from thresher.files import cache_dir
from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.quantizer.driver import quantise_program
from thresher.passes.rsq.quantizer.pieces import Batch
from thresher.passes.rsq.quantizer.sweep import Sweep
from thresher.quantization import _capture
from thresher.tools import models

TOOLS = {"llm-compressor-gptq": "LLM_COMPRESSOR", "llm-compressor-awq": "LLM_COMPRESSOR", "auto-round": "AUTO_ROUND",
         "gptqmodel": "GPTQMODEL", "hqq": "HQQ", "torchao": "TORCHAO"}  # fmt: skip
ASYMMETRIC = ("llm-compressor-awq", "hqq")
OURS: dict[str, dict[str, Any]] = {
    "rsq": {},
    "rsq-asym": {"symmetric": False},
    "rsq-portable": {"rotate_down": False},
}
FOLDER_BITS = 16  # of a scale, in the files of all of these tools


def bits_of(bits: int, group: int, width: float, asymmetric: bool) -> float:
    """Bits a weight with its scales, and zero points where there are some; width: of a row, where group is -1."""
    return bits + (FOLDER_BITS + (bits if asymmetric else 0)) / (width if group < 0 else group)


def of_peer(
    name: str, bits: int, group: int, tokens: Path, kept: Path, judge: rsq.Judge, threads: int
) -> Any:
    """A row, or a sentence about why there is none."""
    variable = f"THRESHER_PEER_{TOOLS[name]}"
    python = os.environ.get(variable)
    if python is None:
        return f"${variable}, the Python of an environment with it, is not set."
    script = Path(__file__).with_name("_rsq_peer.py")
    words = [python, script, name, models.smollm2_directory(), tokens, kept, bits, group, threads]
    around = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(w) for w in words], capture_output=True, text=True, env={**os.environ, **around}
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        return f"It failed on this machine: {said[:300].rstrip('.')}."
    told = json.loads(done.stdout.strip().splitlines()[-1])
    model, _ = models.smollm2()
    model.config.use_cache = False
    model.load_state_dict(load_file(kept), strict=False)
    with torch.no_grad():
        return told | judge(lambda window: model(window).logits)


def of_ours(options: dict[str, Any], program: Any, tokens: torch.Tensor, judge: rsq.Judge) -> dict[str, Any]:
    """A row of ours."""
    batches = [Batch({"input_ids": rows}, None, rows) for rows in tokens.split(4)]
    found: dict[str, Any] = {}
    wall, cpu = time.perf_counter(), time.process_time()

    def finish(sweep: Sweep) -> None:
        found["wall_s"] = round(time.perf_counter() - wall, 1)
        found["cpu_s"] = round(time.process_time() - cpu, 1)
        found.update(judge(lambda window: rsq.run(sweep, window)))

    quantise_program(program, batches, RSQConfig(**options, scale_dtype="bfloat16"), None, finish)
    return found


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--peers", default="", help="comma-separated; default all, and ours")
        parser.add_argument("--bits", default="4,3,2")
        parser.add_argument("--groups", default="64,-1")
        parser.add_argument("--sequences", type=int, default=32)

    args = arguments(__doc__, add)
    bench = Benchmark("rsq_peers", args)
    sequences = 4 if args.quick else args.sequences
    folder = cache_dir() / "benchmarks" / f"rsq_peers-{sequences}x{rsq.LENGTH}"
    folder.mkdir(parents=True, exist_ok=True)
    names = args.peers.split(",") if args.peers else ["hqq", "rsq"] if args.quick else [*OURS, *TOOLS]
    model, tokenizer = models.smollm2()
    model.config.use_cache = False
    texts, said = rsq.held_out(tokenizer)
    with torch.no_grad():
        judge = rsq.Judge(texts, lambda window: model(window).logits)
        plain = judge(lambda window: model(window).logits)
    linears = [
        m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")
    ]
    width = sum(m.weight.numel() for m in linears) / sum(len(m.weight) for m in linears)
    tokens = rsq.calibration_tokens(tokenizer, sequences, rsq.LENGTH, 0)
    torch.save(tokens, folder / "tokens.pt")
    bench.row(row="fp32", bits=32.0, **plain)
    program = None
    chosen_bits = "4" if args.quick else args.bits
    for bits, group in ((int(b), int(g)) for b in chosen_bits.split(",") for g in args.groups.split(",")):
        for name in names:
            path = folder / f"{name}-{bits}-{group}.json"
            if path.exists():
                continue
            if name in OURS:
                if program is None:
                    program = _capture(model, [Batch({"input_ids": tokens[:2]})])
                found: Any = of_ours(
                    {"bits": bits, "group_size": group, **OURS[name]}, program, tokens, judge
                )
            else:
                found = of_peer(name, bits, group, folder / "tokens.pt", path.with_suffix(".safetensors"),
                                judge, torch.get_num_threads())  # fmt: skip
            if isinstance(found, str):
                bench.not_measured(f"{name} at {bits} bits, groups of {group}", found)
                print(name, bits, group, found, flush=True)
                continue
            asymmetric = name in ASYMMETRIC or not OURS.get(name, {}).get("symmetric", True)
            size = round(bits_of(bits, group, width, asymmetric), 3)
            path.write_text(json.dumps({"row": name, "width": bits, "group": group, "bits": size, **found}))
            print(path.read_text(), flush=True)
    rows = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    for row in rows:
        bench.row(**row)
    bench.row(row="texts", note=f"{tokens.numel()} calibration tokens of pydoc_data.topics; {said}.")
    for bits, group in sorted({(r["width"], r["group"]) for r in rows}, reverse=True):
        same = [r for r in rows if (r["width"], r["group"]) == (bits, group)]
        ours = [r["kl"] for r in same if r["row"] in OURS]
        theirs = {r["row"]: r["kl"] for r in same if r["row"] in TOOLS}
        if ours and theirs:
            best = min(theirs, key=theirs.__getitem__)
            what = f"groups of {group}" if group > 0 else "a scale a row"
            bench.claim(f"{bits} bits, {what}: KL over that of the best other tool ({best})", min(ours) / theirs[best],
                        "<= 0.85")  # fmt: skip
    bench.finish()


if __name__ == "__main__":
    main()
