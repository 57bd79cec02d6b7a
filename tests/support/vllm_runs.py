"""vLLM in a process of its own, on a directory."""

import json
import os
import subprocess
import sys

import torch

IDS = (torch.arange(8 * 32).reshape(8, 32) * 7) % 480 + 3
RUN = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, prompts, more = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(model=folder, dtype="float32", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True, **more)
    asked = SamplingParams(temperature=0, max_tokens=6, logprobs=1, detokenize=False)
    done = llm.generate([{"prompt_token_ids": p} for p in prompts], asked)
    print("DONE", json.dumps([[list(d.outputs[0].token_ids), next(iter(d.outputs[0].logprobs[0].values())).logprob]
                              for d in done]))
"""


def run(folder, prompts, tmp_path, more_code="", **more):
    """[[tokens, log-probability of the first], ...] that vLLM generates for each prompt; `more_code` runs behind it."""
    script = tmp_path / "run.py"
    script.write_text(RUN + more_code)
    env = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    command = [sys.executable, str(script), str(folder), json.dumps(prompts), json.dumps(more)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    line = next((line for line in done.stdout.splitlines() if line.startswith("DONE")), None)
    assert line, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(line[5:])
