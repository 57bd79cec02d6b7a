"""How long a user waits for the first result of a decoder of SmolLM2's shape, and what compiling layers once costs a call.

Each form runs in a process of its own, pinned to one core, with all caches off but that of the C++ kernels (`warm`: with
them on, the second time). Seconds are CPU seconds of the process and of the compilers it starts, from the model in
memory to the first result, since other work may share the machine.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time

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


def child(form: str, layers: int, rounds: int) -> dict[str, float]:
    """Compile one form, and time it. Runs in a process of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).eval()
    mask = (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).long()
    batch = {"input_ids": torch.randint(1, 49152, mask.shape) * mask, "attention_mask": mask}

    import thresher
    from thresher.lowering.inductor import inductor

    if form == "thresher, one program":
        plain = inductor.Inductor.lower
        inductor.Inductor.lower = lambda self, program: (
            setattr(self, "layered", False),
            plain(self, program),
        )[1]
    started, wall = spent(), time.perf_counter()
    with torch.no_grad():
        if form == "torch.compile":
            call = torch.compile(model, dynamic=True)
        else:
            call = thresher.compile(model, batch, "exact", dynamic=True)
        logits = call(**batch).logits
        first, first_wall = spent() - started, time.perf_counter() - wall
        times = []
        for _ in range(rounds):
            begun = time.thread_time()
            call(**batch)
            times.append(time.thread_time() - begun)
        expected = model(**batch).logits
    real = mask.bool()
    error = ((logits - expected)[real].abs().max() / expected[real].abs().max()).item()
    return {"first_cpu_s": first, "first_wall_s": first_wall, "call_cpu_s": min(times), "error": error}


def run(form: str, layers: int, rounds: int, caches: str | None = None) -> dict[str, float]:
    """`child` in a process of its own. caches: a folder where compiled code is kept; None for none."""
    env = dict(os.environ, HF_HUB_OFFLINE="1")
    if caches is None:
        env |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "THRESHER_REWRITE_CACHE": "0"}
    else:
        env |= {
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "XDG_CACHE_HOME": caches,
            "THRESHER_REWRITE_CACHE": "1",
        }
    command = [sys.executable, __file__, "--child", form, str(layers), str(rounds)]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True, preexec_fn=_one_core)
    return json.loads(done.stdout.splitlines()[-1])


def _one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def main() -> None:
    args = arguments(__doc__)
    bench = Benchmark("cold_start", args)
    rounds = 3 if args.quick else 10
    forms = [("thresher", 30), ("thresher", 60), ("thresher, one program", 30), ("torch.compile", 30)]
    found = {}
    for form, layers in forms[:3] if args.quick else forms:
        found[form, layers] = run(form, layers, rounds)
        bench.row(form=form, layers=layers, **{k: round(v, 6) for k, v in found[form, layers].items()})
    with tempfile.TemporaryDirectory() as folder:
        run("thresher", 30, 1, folder)
        found["warm", 30] = run("thresher", 30, rounds, folder)
        bench.row(
            form="thresher, second process",
            layers=30,
            **{k: round(v, 6) for k, v in found["warm", 30].items()},
        )
    ours, deep, whole = (found[key] for key in forms[:3])
    bench.claim("30 layers: compile to first result, CPU seconds", ours["first_cpu_s"], "<= 25")
    bench.claim("60 layers over 30", deep["first_cpu_s"] / ours["first_cpu_s"], "<= 1.25")
    bench.claim(
        "one program over layers once: compile to first result",
        whole["first_cpu_s"] / ours["first_cpu_s"],
        ">= 2",
    )
    bench.claim(
        "layers once over one program: time of a call", ours["call_cpu_s"] / whole["call_cpu_s"], "<= 1.05"
    )
    bench.claim("second process: to first result, CPU seconds", found["warm", 30]["first_cpu_s"], "<= 4")
    if args.quick:
        bench.not_measured("torch.compile: compile to first result", "It takes minutes; run without --quick.")
    else:
        plain = found["torch.compile", 30]["first_cpu_s"]
        bench.claim(
            "torch.compile over thresher: compile to first result", plain / ours["first_cpu_s"], ">= 3"
        )
    bench.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
