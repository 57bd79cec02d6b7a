"""How long a user waits for the first token of a decoder of SmolLM2's shape.

    compile   `thresher.compile(model, batch)`, which verifies it on the batch
    token     `generate` of the first token of 8 prompts, from the model in memory: compile and this are the wait

Each row is a process of its own, pinned to one core. `cold` has no caches but that of the C++ kernels; `second process` has
those that a first process left; `saved file` loads what another process saved. Seconds are CPU seconds of the process, all
its threads and the compilers it starts, since other work may share the machine; wall seconds stand beside them. Importing
is not counted. `waits` is the same with `wait=True`: no token before Inductor is done.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _harness import Benchmark, arguments

SHAPE = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
             tie_word_embeddings=True, max_position_embeddings=2048, pad_token_id=0)  # fmt: skip
LENGTHS = (5, 9, 14, 23, 31, 40, 64, 81)  # 267 real tokens of 8 x 81


def spent() -> float:
    """CPU seconds of this process and of those that it waited for."""
    return sum(
        u.ru_utime + u.ru_stime
        for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def prepared(layers: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A decoder with random weights, and a batch with padding on the left."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).eval()
    mask = (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).long().flip(1)
    return model, {"input_ids": torch.randint(1, 49152, mask.shape) * mask, "attention_mask": mask}


class Clock:
    """CPU and wall seconds since it was made, or since it was last read."""

    def __init__(self) -> None:
        self.cpu, self.wall = spent(), time.perf_counter()

    def read(self, name: str) -> dict[str, float]:
        cpu, wall = spent(), time.perf_counter()
        found = {f"{name}_cpu_s": cpu - self.cpu, f"{name}_wall_s": wall - self.wall}
        self.cpu, self.wall = cpu, wall
        return found


def child(form: str, layers: int, path: str) -> dict[str, Any]:
    """One row. Runs in a process of its own."""
    model, batch = prepared(layers)
    import thresher
    import thresher.backend
    import thresher.generation
    from thresher.generation.programs import cache_of

    options = {"max_new_tokens": 1, "do_sample": False}
    real = batch["attention_mask"].bool()
    if form == "torch.compile":  # of forward, as its generate is not compiled on a CPU
        with torch.no_grad():
            clock, call = Clock(), torch.compile(model, dynamic=True)
            call(**batch, logits_to_keep=1)
            found = clock.read("token")
        return {"compile_cpu_s": 0.0, "compile_wall_s": 0.0, **found}
    if form in ("save", "load"):
        if form == "save":
            fast = thresher.compile(model, batch, "exact", dynamic=True, target="reference")
            thresher.save(fast, path, example_inputs=batch)
            return {}
        expected = model(**batch).logits.detach()
        clock = Clock()
        loaded = thresher.load(path)
        found = clock.read("compile")
        logits = loaded(**batch)["logits"]
        found |= clock.read("token")
        error = (logits - expected)[real].abs().max() / expected[real].abs().max()
        return {**found, "error": error.item(), "early": sum(one.early for one in loaded.session.later)}
    clock = Clock()
    fast = thresher.compile(model, batch, "exact")
    found = clock.read("compile")
    made = fast.generate(**batch, **options, wait=form == "waits", return_dict_in_generate=True)
    found |= clock.read("token")
    early = fast.last_call.early
    phases = {name: 0.0 for name in ("trace", "capture", "passes", "verification", "lowering")}
    for report in fast.reports:
        for name, seconds in report.phases.items():
            phases[name] += seconds
    two = fast.generate(**batch, **{**options, "max_new_tokens": 3}, wait=form == "waits")
    found |= clock.read("further")
    expected = model.generate(**batch, **{**options, "max_new_tokens": 3})
    assert (
        torch.equal(made.sequences, expected[:, : made.sequences.shape[1]])
        and cache_of(dict(made)) is not None
    )
    from_cache = sum("taken from the cache" in n for r in fast.reports for n in r.notes)
    return {**found, **{f"{n}_wall_s": s for n, s in phases.items()}, "early": early, "from_cache": from_cache,
            "tokens_equal": int(torch.equal(two, expected))}  # fmt: skip


def run(form: str, layers: int, caches: str | None = None, path: str = "") -> dict[str, Any]:
    """`child` in a process of its own. caches: a folder where compiled code is kept; None for none."""
    env = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", THRESHER_WAIT="0")
    if caches is None:
        env |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "THRESHER_REWRITE_CACHE": "0"}
    else:
        env |= {
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "THRESHER_CACHE_DIR": f"{caches}/thresher",
            "THRESHER_REWRITE_CACHE": "1",
        }
    command = [sys.executable, __file__, "--child", form, str(layers), path]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, preexec_fn=_one_core, timeout=1800
    )
    if done.returncode:
        raise SystemExit(f"{form}, {layers} layers:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


_VLLM = """
import sys, time
began = time.perf_counter()
sys.path.insert(0, sys.argv[2])
import _generate_peers
generate = _generate_peers.vllm(sys.argv[1], "float32")
ready = time.perf_counter() - began
generate([list(range(1, 82))] * 8, 1)
print("seconds", ready, time.perf_counter() - began)
"""


def vllm(python: str) -> dict[str, float]:
    """Wall seconds of vLLM's, imports included, from its start to when it takes prompts, and to a first token."""
    with tempfile.TemporaryDirectory() as folder:
        prepared(30)[0].save_pretrained(folder)
        script = Path(folder) / "ready.py"
        script.write_text(_VLLM)
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        command = [python, str(script), folder, str(Path(__file__).parent)]
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=900, preexec_fn=_one_core
        )
        line = next((x for x in done.stdout.splitlines() if x.startswith("seconds ")), None)
        if line is None:
            raise RuntimeError(
                done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else "it said nothing"
            )
        ready, first = map(float, line.split()[1:])
        return {"compile_wall_s": ready, "token_wall_s": first - ready}


def main() -> None:
    args = arguments(
        __doc__, lambda p: p.add_argument("--vllm", help="a Python that has vLLM, to be timed beside")
    )
    bench = Benchmark("cold_start", args)
    found: dict[tuple[str, int], dict[str, Any]] = {}

    def row(name: str, layers: int, measured: dict[str, Any]) -> None:
        found[name, layers] = measured
        shown = {k: round(v, 3) if isinstance(v, float) and k != "error" else v for k, v in measured.items()}
        bench.row(form=name, layers=layers, **shown)
        bench.save()

    for name, layers in [("cold", 30), ("cold", 60)] + ([] if args.quick else [("waits", 30)]):
        row(name, layers, run(name, layers))
    with tempfile.TemporaryDirectory() as folder:
        run("cold", 30, folder)
        row("second process", 30, run("warm", 30, folder))
        path = f"{folder}/model.thresher"
        run("save", 30, None, path)
        row("saved file", 30, run("load", 30, None, path))
    if not args.quick:
        row("torch.compile, forward only", 30, run("torch.compile", 30))

    def wait(name: str, layers: int = 30) -> float:
        return found[name, layers]["compile_cpu_s"] + found[name, layers]["token_cpu_s"]

    bench.claim("cold, 30 layers: compile to first token, CPU seconds", wait("cold"), "<= 25")
    bench.claim("cold: 60 layers over 30", wait("cold", 60) / wait("cold"), "<= 1.25")
    bench.claim("second process: compile to first token, CPU seconds", wait("second process"), "<= 4")
    bench.claim("saved file: load to first token, CPU seconds", wait("saved file"), "<= 2")
    bench.claim(
        "tokens equal to the model's own", min(f.get("tokens_equal", 1) for f in found.values()), "== 1"
    )
    if args.quick:
        bench.not_measured("torch.compile: to first result", "It takes minutes; run without --quick.")
    else:
        plain = wait("torch.compile, forward only") / wait("cold")
        bench.claim(
            "torch.compile of forward alone over thresher with generate: to first result", plain, ">= 2"
        )
    if args.vllm:
        try:
            row("vLLM, imports included", 30, vllm(args.vllm))
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as reason:
            bench.not_measured("vLLM: ready after", f"It did not start: {reason}")
    else:
        bench.not_measured("vLLM: ready after", "Name a Python that has it with --vllm.")
    bench.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2], int(sys.argv[3]), sys.argv[4])), flush=True)
        os._exit(0)  # what is still being compiled in the background is nobody's
    else:
        main()
