"""What RSQ keeps of a model at 2, 3 and 4 bits, against rounding, GPTQ, rotate + GPTQ, and llm-compressor's GPTQ.

SmolLM2-135M-Instruct, all linears but the head, the same calibration tokens for every row. Perplexity, KL
divergence to the fp32 model and top-1 agreement on two texts that calibration did not see: later paragraphs of
Python's language reference, and the Debian handbook (`apt-get download debian-handbook`, or a text file named
by $THRESHER_TEXT).

    python benchmarks/rsq.py --json benchmarks/results/rsq.json
    python benchmarks/rsq.py --rows rsq3,quarot3 --seeds 3      # some rows, more seeds
    python benchmarks/rsq.py --merge                            # claims from the rows so far, and the plots

Rows are kept under $THRESHER_CACHE_DIR as they come, so that a run goes on where it was.
"""

from __future__ import annotations

import html
import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _rsq_other
import torch
from _harness import Benchmark, arguments

from thresher.calibration_data import cut_text
from thresher.files import cache_dir
from thresher.graph.program import Program
from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.quantizer.driver import quantise_program
from thresher.passes.rsq.quantizer.gptq import round_to_nearest
from thresher.passes.rsq.quantizer.grid import NVFP4Grid
from thresher.passes.rsq.quantizer.outcome import Outcome
from thresher.passes.rsq.quantizer.pieces import Batch
from thresher.passes.rsq.quantizer.sweep import Sweep, bind
from thresher.quantization import _capture
from thresher.tools import models

PLAIN = dict(rotate=False, rotate_heads=False, rotate_down=False, importance="uniform")
ROWS: dict[str, dict[str, Any]] = {
    "quarot3": dict(bits=3, importance="uniform"),
    "rsq3": dict(bits=3),
    "rtn3": dict(bits=3, method="nearest", **PLAIN),
    "rsq4-g64-asym": dict(bits=4, group_size=64, symmetric=False),
    "nvfp4-rtn": dict(grid="nvfp4", method="nearest", clip_search=False, **PLAIN),
    "nvfp4-rsq": dict(grid="nvfp4"),
    "nvfp4-search": dict(grid="nvfp4", method="nearest", **PLAIN),
    "nvfp4-gptq": dict(grid="nvfp4", **PLAIN),
    "nvfp4-quarot": dict(grid="nvfp4", importance="uniform"),
    "nvfp4-rsq, no search": dict(grid="nvfp4", clip_search=False),
    "gptq3": dict(bits=3, **PLAIN),
    "rsq3-asym": dict(bits=3, symmetric=False),
    "rsq4": dict(bits=4),
    "quarot4": dict(bits=4, importance="uniform"),
    "rtn4": dict(bits=4, method="nearest", **PLAIN),
    "gptq4": dict(bits=4, **PLAIN),
    "rsq4-g64": dict(bits=4, group_size=64),
    "rsq-mixed-2.25": dict(average_bits=2.25, group_size=64, symmetric=False),
    "rsq2-g64": dict(bits=2, group_size=64, symmetric=False),
    "rsq-mixed-2.5": dict(average_bits=2.5, group_size=64, symmetric=False),
    "rsq-mixed-3": dict(average_bits=3.0, group_size=64, symmetric=False),
    "rsq3-follow": dict(bits=3, follow_original=0.5),
    "rsq3-follow-all": dict(bits=3, follow_original=1.0),
    "rsq3-best": dict(bits=3, symmetric=False, activation_order=True, power=0.5, damping=0.1),
    "rotate-rtn3": dict(bits=3, method="nearest", importance="uniform"),
    _rsq_other.NAME: {},  # made by another package
}
QUICK = ("quarot3", "rsq3", "rtn3")
WINDOWS, LENGTH = 4, 512


def calibration_tokens(tokenizer: Any, sequences: int, length: int, seed: int) -> torch.Tensor:
    """Windows of the first seven tenths of the language reference."""
    texts = models.texts()
    return cut_text(texts[: len(texts) * 7 // 10], tokenizer, sequences, length, seed)


def held_out(tokenizer: Any) -> tuple[dict[str, torch.Tensor], str]:
    """Windows int64 [WINDOWS, LENGTH] by text, and a sentence about the second text."""
    texts = models.texts()
    found = {"python": _spread(list(texts[len(texts) * 7 // 10 :]), tokenizer)}
    paragraphs, said = second_text()
    if paragraphs:
        found["debian"] = _spread(paragraphs, tokenizer)
    return found, said


def _spread(paragraphs: list[str], tokenizer: Any) -> torch.Tensor:
    ids = tokenizer("\n\n".join(paragraphs), return_tensors="pt", add_special_tokens=False, verbose=False)
    windows = ids["input_ids"][0]
    windows = windows[: len(windows) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return windows[:: max(1, len(windows) // WINDOWS)][:WINDOWS].clone()


def second_text() -> tuple[list[str], str]:
    """Paragraphs of a text of another kind, and where they come from."""
    named = os.environ.get("THRESHER_TEXT")
    if named:
        return re.split(r"\n\s*\n", Path(named).read_text()), f"the second text is {Path(named).name}"
    kept = cache_dir() / "texts" / "debian-handbook.json"
    if not kept.exists():
        if shutil.which("apt-get") is None:
            return [], "there is no apt-get to fetch the Debian handbook with, and $THRESHER_TEXT is not set"
        with tempfile.TemporaryDirectory() as scratch:
            got = subprocess.run(["apt-get", "download", "debian-handbook"], cwd=scratch, capture_output=True)
            packages = list(Path(scratch).glob("*.deb"))
            if got.returncode or not packages:
                return [], "apt-get could not fetch the Debian handbook, and $THRESHER_TEXT is not set"
            subprocess.run(["dpkg-deb", "-x", str(packages[0]), scratch], check=True)
            pages = sorted(Path(scratch).glob("usr/share/doc/debian-handbook/html/en-US/*.html"))
            paragraphs = [p for page in pages for p in _paragraphs(page.read_text())]
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(paragraphs))
    return json.loads(kept.read_text()), "the second text is the Debian package debian-handbook, en-US"


def _paragraphs(page: str) -> list[str]:
    found = []
    for block in re.findall(r'<(?:p|div class="para")[^>]*>(.*?)</(?:p|div)>', page, re.S):
        line = " ".join(html.unescape(re.sub(r"<[^>]+>", "", block)).split())
        if len(line) > 80:
            found.append(line)
    return found


class Judge:
    """Perplexity, KL to fp32 and agreement of a model given as a function from tokens to logits."""

    def __init__(self, texts: dict[str, torch.Tensor], reference: Callable[[torch.Tensor], torch.Tensor]):
        self.texts = texts
        self.reference = {
            name: torch.cat([reference(w[None]) for w in windows]) for name, windows in texts.items()
        }

    def __call__(self, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, windows in self.texts.items():
            loss = kl = top = 0.0
            for window, expected in zip(windows, self.reference[name]):
                actual = torch.log_softmax(logits_of(window[None])[0], -1)
                wanted = torch.log_softmax(expected, -1)
                loss -= float(actual[:-1].gather(1, window[1:, None]).double().mean())
                kl += float((wanted.exp() * (wanted - actual)).sum(-1).double().mean())
                top += float((actual.argmax(-1) == wanted.argmax(-1)).double().mean())
            count = len(windows)
            found |= {f"ppl_{name}": round(float(torch.tensor(loss / count).exp()), 3),
                      f"kl_{name}": round(kl / count, 5), f"top1_{name}": round(top / count, 4)}  # fmt: skip
        names = list(self.texts)
        found["kl"] = round(sum(found[f"kl_{n}"] for n in names) / len(names), 5)
        return found


def measure(name: str, program: Program, tokens: torch.Tensor, judge: Judge, seed: int) -> dict[str, Any]:
    """Quantise by one row's options and judge the result."""
    config = RSQConfig(**{**ROWS[name], "seed": seed * 10})
    if config.method == "nearest":  # it looks at weights only; a little data serves the report
        tokens = tokens[:1, :64]
    batches = [Batch({"input_ids": rows}, None, rows) for rows in tokens.split(8)]
    found: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    spent: list[float] = []

    def finish(sweep: Sweep) -> None:
        spent.extend((time.perf_counter() - wall, time.process_time() - cpu))
        found.update(judge(lambda window: run(sweep, window)))
        if config.grid == "nvfp4":
            round_inputs(sweep)
            found.update({f"w4a4_{k}": v for k, v in judge(lambda window: run(sweep, window)).items()})

    prove = name in ("rsq3", "gptq3")  # every rotation is proved exact once
    outcome: Outcome = quantise_program(program, batches, config, None, finish, prove)
    weights = sum(8 * r.bytes_after / r.bits for r in outcome.reports.values())
    stored = sum(r.bytes_after for r in outcome.reports.values())
    return {
        "row": name,
        "seed": seed,
        "bits": round(8 * stored / weights, 3),
        **found,
        "error": round(sum(r.quantized for r in outcome.reports.values()) / len(outcome.reports), 5),
        **({"exact_fp64": outcome.exact} if prove else {}),
        "mb": round(stored / 1e6, 1),
        "wall_s": round(spent[0], 1),
        "cpu_s": round(spent[1], 1),
        "tokens": tokens.numel(),
        **({"layer_bits": sorted(outcome.bits.values())} if config.average_bits else {}),
    }


def run(sweep: Sweep, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the rotated and quantised program."""
    output = next(o for o in sweep.program.outputs if o is not None)
    with torch.no_grad():
        logits = sweep.run(sweep.start(bind(sweep.program, {"input_ids": tokens})), {output})[output]
    return logits


def round_inputs(sweep: Sweep) -> None:
    """From here on what quantized linears read is rounded to NVFP4 as well (W4A4, emulated), each call's values with a
    tensor scale of their own: behind the rotations, which spread what one channel would have alone."""
    call, grid = sweep.call, NVFP4Grid(search=False)

    def rounded(node: torch.fx.Node, env: Any) -> Any:
        read = node.args[1] if node.target is torch.ops.aten.linear.default else None
        if isinstance(read, torch.fx.Node) and str(read.target) in sweep.overrides:
            x = env[node.args[0]]
            flat = x.reshape(-1, x.shape[-1]).float()
            env = {**env, node.args[0]: round_to_nearest(flat, grid).values.to(x.dtype).view_as(x)}
        return call(node, env)

    sweep.call = rounded  # type: ignore[method-assign]


def kept_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--rows", default="", help="comma-separated; default all")
        parser.add_argument("--seeds", type=int, default=1)
        parser.add_argument("--sequences", type=int, default=32)
        parser.add_argument("--merge", action="store_true", help="measure nothing new")

    args = arguments(__doc__, add)
    bench = Benchmark("rsq", args)
    folder = cache_dir() / "benchmarks" / f"rsq-{args.sequences}x{LENGTH}"
    folder.mkdir(parents=True, exist_ok=True)
    names = args.rows.split(",") if args.rows else list(QUICK if args.quick else ROWS)
    said = second_text()[1]
    if not args.merge:
        said = _measure_all(args, names, folder)
    rows = kept_rows(folder)
    for row in rows:
        bench.row(**row)
    bench.row(row="texts", note=f"Calibration and one held-out text are parts of pydoc_data.topics; {said}.")
    from _rsq_claims import add_claims_of, claims, plots

    root = Path(__file__).resolve().parents[1]
    claims(bench, rows, said)
    for part in ("rsq_speed", "rsq_memory"):  # measured apart: _rsq_speed.py, _rsq_memory.py
        add_claims_of(bench, root / "benchmarks" / "results" / f"{part}.json")
    plots(rows, root / "docs")
    bench.finish()


def _measure_all(args: Any, names: list[str], folder: Path) -> str:
    model, tokenizer = models.smollm2()
    model.config.use_cache = False
    texts, said = held_out(tokenizer)
    with torch.no_grad():
        judge = Judge(texts, lambda window: model(window).logits)
    fp32 = folder / "fp32.json"
    if not fp32.exists():
        with torch.no_grad():
            fp32.write_text(
                json.dumps({"row": "fp32", "seed": 0, "bits": 32.0, **judge(lambda w: model(w).logits)})
            )
    program = None
    for seed in range(args.seeds):
        tokens = calibration_tokens(tokenizer, args.sequences, LENGTH, seed)
        torch.save(tokens, folder / f"tokens-{seed}.pt")
        for name in names:
            path = folder / f"{name}-{seed}.json"
            if path.exists():
                continue
            if name == _rsq_other.NAME:
                other = _rsq_other.row(
                    folder / f"tokens-{seed}.pt", path.with_suffix(".safetensors"), judge, seed
                )
                if other is None:
                    print(_rsq_other.ABSENT, flush=True)
                else:
                    path.write_text(json.dumps(other))
                    print(json.dumps(other), flush=True)
                continue
            if program is None:
                program = _capture(model, [Batch({"input_ids": tokens[:2]})])
            row = measure(name, program, tokens, judge, seed)
            row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
            path.write_text(json.dumps(row))
            print(json.dumps(row), flush=True)
    return said


if __name__ == "__main__":
    main()
