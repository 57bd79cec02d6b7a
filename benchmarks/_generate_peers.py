"""What else generates on a CPU, each in a process of its own Python, which is told when to run: see generate.py.

Read from standard input: one JSON line a run, {"rows": [[token, ...], ...], "new": 64}. Written to standard output: one JSON
line for it, the seconds it took, of the processor (all threads) and of the clock. Needs no Thresher.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], Any]


def vllm(folder: str, dtype: str) -> Generate:
    os.environ |= dict(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
        HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")  # fmt: skip
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder,
        dtype=dtype,
        max_model_len=512,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_num_seqs=8,
    )

    def generate(rows: list[list[int]], new: int) -> Any:
        asked = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        return engine.generate([{"prompt_token_ids": r} for r in rows], asked, use_tqdm=False)

    return generate


def openvino(folder: str, precision: str) -> Generate:
    import torch
    from optimum.intel import OVModelForCausalLM

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": precision}
    model = OVModelForCausalLM.from_pretrained(folder, export=True, ov_config=settings, local_files_only=True)
    model.generation_config.eos_token_id = None

    def generate(rows: list[list[int]], new: int) -> Any:
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        length = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return model.generate(input_ids=ids, attention_mask=mask, **length)

    return generate


def llama_cpp(folder: str, file: str) -> Generate:
    """One row only: the loop of llama.cpp's own example."""
    from cyllama import LLM, GenerationConfig
    from cyllama.llama.llama_cpp import llama_batch_get_one

    engine = LLM(file, verbose=False)
    config = GenerationConfig(max_tokens=256, temperature=0.0, n_gpu_layers=0)
    context = engine._ensure_context(256, config)
    context.set_n_threads(1, 1)
    sampler = engine._ensure_sampler(config)

    def generate(rows: list[list[int]], new: int) -> Any:
        (row,) = rows
        context.kv_cache_clear()
        context.decode(llama_batch_get_one(row, 0))
        for place in range(len(row), len(row) + new - 1):
            context.decode(llama_batch_get_one([sampler.sample(context, -1)], place))
        sampler.sample(context, -1)

    return generate


def main() -> None:
    name, folder, how = sys.argv[1:4]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what engines print goes elsewhere
    generate = {"vllm": vllm, "openvino": openvino, "llama": llama_cpp}[name](folder, how)
    answers.write("ready\n")
    for line in sys.stdin:
        asked = json.loads(line)
        worked, began = time.process_time(), time.perf_counter()
        generate(asked["rows"], asked["new"])
        answers.write(json.dumps([time.process_time() - worked, time.perf_counter() - began]) + "\n")


if __name__ == "__main__":
    main()
