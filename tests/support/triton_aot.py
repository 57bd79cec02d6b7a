"""Compiles Triton kernels for GPUs that are not here, and reads out of the binary what they need.

A build cannot prove that a kernel is right or fast; it proves that it compiles, keeps everything in
registers, fits in shared memory and uses the tensor cores. Assert bounds, never exact counts: those
move from one Triton version to the next.

    binary = compile_for(90, kernel, {"x": "*fp16", "n": "i32"}, {"BLOCK": 128}, aligned=("x",), num_warps=4)
    resources(binary).require_fit(90, tensor_cores=True)
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="needs Triton: pip install --no-deps triton==3.7.1")

# Bytes of dynamic shared memory one block may ask for, by compute capability (CUDA programming guide).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# Bytes of shared memory, threads and blocks that a multiprocessor holds; each has 65,536 registers.
SHARED_TOTAL = {80: 167_936, 86: 102_400, 89: 102_400, 90: 233_472, 100: 233_472, 120: 102_400}
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
RESERVED = 1024  # of shared memory, for each block
REGISTERS = 255
# A plain run compiles every kernel for the capability with the least shared memory, and a case of each for the one that
# is rented most.
CAPABILITIES = (80, 90, 100, 120)

_MMA = re.compile(r"\b(?:H|I|Q|O|D)MMA|\b[HQI]GMMA|\bUTC\w*MMA")
_WIDE = re.compile(r"\b(?:LDG|LDGSTS|LD|LDS)\.\S*128\b|\bUBLKCP|\bUTMALDG")
_DIVISION = re.compile(r"\bCALL\.\S*.*(?:div|rem)_[su]64")
_SPILL = re.compile(r"\b(?:STL|LDL)\b")


@dataclass(frozen=True)
class Resources:
    """What one compiled NVIDIA kernel takes, per thread or per block.

    registers, stack: per thread; a stack that is not empty means spilled or indexed locals.
    spills: number of local loads and stores. shared: bytes per block.
    mma: tensor-core instruction name -> how often it occurs. sass: the whole assembly.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    mma: Mapping[str, int]
    sass: str

    def count(self, instruction: str) -> int:
        """How many instructions start with this name (`UTMALDG`, `LDGSTS`, `HMMA`)."""
        return len(re.findall(rf"\b{instruction}", self.sass))

    def wide_loads(self) -> int:
        """How many loads bring 16 bytes a thread, or a tile by the copy engine."""
        return len(_WIDE.findall(self.sass))

    def divisions_in_loops(self) -> int:
        """How many 64-bit divisions, which are calls of a routine of a hundred instructions, stand inside a loop."""
        lines = self.sass.splitlines()
        labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L\w+):", line))}
        jumps = [
            (i, m[1]) for i, line in enumerate(lines) if (m := re.search(r"\bBRA\S*\s.*`\((\.L\w+)\)", line))
        ]
        loops = [(labels[to], at) for at, to in jumps if to in labels and labels[to] <= at]
        calls = [i for i, line in enumerate(lines) if _DIVISION.search(line)]
        return sum(any(first <= i <= last for first, last in loops) for i in calls)

    def blocks(self, capability: int, warps: int) -> int:
        """How many blocks a multiprocessor holds at once."""
        threads = 32 * warps
        held = -(-self.registers // 8) * 8 * threads  # registers are given out in eights
        return min(
            65_536 // max(1, held),
            SHARED_TOTAL[capability] // (self.shared + RESERVED),
            THREADS[capability] // threads,
            BLOCKS[capability],
        )

    def require_fit(self, capability: int, *, tensor_cores: bool = False) -> None:
        """Assert: nothing spilled, the block fits on that GPU and, if asked, tensor cores are used."""
        shown = f"sm_{capability}: {self}"
        assert self.stack == 0 and self.spills == 0, f"spills registers; {shown}"
        assert self.registers <= REGISTERS, f"too many registers; {shown}"
        assert self.shared <= SHARED_MEMORY[capability], f"too much shared memory; {shown}"
        assert self.mma or not tensor_cores, f"no tensor-core instruction; {shown}"

    def __str__(self) -> str:
        return (
            f"{self.registers} registers, stack {self.stack}, {self.spills} local accesses, "
            f"{self.shared} bytes shared, mma {dict(self.mma)}"
        )


def compile_for(
    capability: int,
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    aligned: Iterable[str] = (),
    **options: Any,
) -> Any:
    """Compile a `@triton.jit` function for compute capability `capability` / 10.

    signature: argument name -> Triton type (`*fp16`, `i32`), constants aside.
    constants: values of the constexpr arguments (also None for an absent pointer).
    aligned: arguments promised to be multiples of 16, as the launcher finds them on a real call;
        without the promise no wide or asynchronous load is made.
    options: num_warps, num_stages, ...
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: i for i, name in enumerate(kernel.arg_names)}
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    missing = [n for n, t in types.items() if t == "constexpr" and n not in constants]
    assert not missing, f"neither a type nor a value was given for {missing}"
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(position[name],): value for name, value in constants.items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(binary: Any) -> Resources:
    """Read registers, stack, spills, shared memory and tensor-core use out of the binary itself.

    The fields on Triton's own object stay empty until a driver has loaded it.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    found = _MMA.findall(sass)
    return Resources(
        registers=_field(usage, "REG"),
        stack=_field(usage, "STACK"),
        spills=len(_SPILL.findall(sass)),
        shared=binary.metadata.shared,
        mma={name: found.count(name) for name in sorted(set(found))},
        sass=sass,
    )


def _field(usage: str, name: str) -> int:
    match = re.search(rf"\b{name}:(\d+)", usage)
    assert match, f"cuobjdump printed no {name}: {usage}"
    return int(match.group(1))


def _tool(name: str, *arguments: str) -> str:
    import triton.backends.nvidia as nvidia

    path = Path(nvidia.__file__).parent / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
