"""What was attacked, and what came of it: fuzzing, damaged files, long runs, threads, sanitizers; what checking costs.

Each row runs alone: `python benchmarks/trust.py --only files,soak`. `--more PATH` names a record whose other rows are
taken over, so that one record grows row by row. The rows run what `tests/` holds; nothing is written twice.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _harness import Benchmark, arguments
from _trust_cost import overhead

ROOT = Path(__file__).resolve().parents[1]
SUPPORT = ROOT / "tests" / "support"
# The tests that hold the cases of the first attack, one line each: weights' identity, files that act, threads, stale
# weights, caches, resuming, operators' memory, equal sizes, passes, damaged files, full disks.
CASES = (
    "tests/core/graph/test_weight_identity.py", "tests/runtime/artifact/test_only_computes.py",
    "tests/core/test_threads.py", "tests/runtime/test_freshness.py", "tests/core/test_files.py",
    "tests/passes/rsq/quantizer/test_layer_files.py", "tests/kernels/test_bad_calls.py",
    "tests/passes/prepack/test_square.py", "tests/passes/test_contain.py", "tests/fuzz/test_files.py",
    "tests/fuzz/test_surroundings.py",
)  # fmt: skip


def tested(*arguments: str) -> dict[str, int]:
    """Run tests in a process of their own; how many passed, failed and had errors."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--show-capture=no",
        "--tb=short",
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    line = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
    found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", line)}
    if done.returncode not in (0, 1) or not found:
        raise SystemExit(f"{' '.join(arguments)}: {line}\n{done.stdout[-2000:]}")
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
    return {"passed": 0, "failed": 0, "error": 0, **found}


def cases(bench: Benchmark) -> None:
    found = tested(*CASES)
    bench.row(what="cases", files=len(CASES), **found)
    bench.claim("cases of the first attack: tests that fail", found["failed"] + found["error"], "== 0")


def fuzz(bench: Benchmark) -> None:
    """Chunks of 200 examples (120 of programs, 80 of models); recipes and `generate` beside them."""
    chunks = 1 if bench.args.quick else bench.args.chunks
    names = [f"tests/fuzz/{file}[{n}]" for n in range(chunks) for file in (
        "test_programs.py::test_as_near_to_the_truth_as_eager_or_refused",
        "test_models.py::test_calls_give_what_the_model_gives",
        "test_recipes.py::test_any_options_make_a_recipe_or_an_argument_error",
        "test_generate.py::test_generate_gives_what_the_model_gives",
    )]  # fmt: skip
    found = tested("--thorough", *names)
    violations = found["failed"] + found["error"]
    bench.row(
        what="fuzz", examples=200 * chunks, recipes=400 * chunks, generate=24 * chunks, violations=violations
    )
    bench.claim("fuzz: violations", violations, "== 0")
    bench.claim("fuzz: examples", 200 * chunks, ">= 200" if chunks == 1 else ">= 20000")


def files(bench: Benchmark) -> None:
    count = 300 if bench.args.quick else 10_000
    found = tested(
        "--thorough", f"tests/fuzz/test_files.py::test_a_damaged_file_is_refused_or_read_as_it_was[{count}]"
    )
    bench.row(what="files", mutations=count, escapes=found["failed"] + found["error"])
    bench.claim(f"{count} damaged files: tests with an escape", found["failed"] + found["error"], "== 0")


def long_run(bench: Benchmark) -> None:
    """What was found is written after every 2,000 calls, and `--minutes` ends a target's run early, with its count."""
    for target in bench.args.targets.split(","):
        _soak(bench, target, {"reference": 20_000, "inductor": 2000}[target])


def _soak(bench: Benchmark, target: str, wanted: int) -> None:
    import soak

    wanted //= 20 if bench.args.quick else 1
    calls = bench.args.calls or wanted
    # the C library's allocator takes some 10,000 calls of four threads to have met their largest moments
    warm, rows, claims = max(200, calls // 2), list(bench.rows), list(bench.claims)

    def note(found: Any) -> None:
        bench.rows, bench.claims = list(rows), list(claims)
        bench.row(what="soak", target=target, calls=found.calls, warm_up=warm, edits=found.edits, wrong=len(found.wrong),
                  growth=round(found.growth, 5), programs=max(found.programs))  # fmt: skip
        bench.claim(f"soak on {target}: calls", found.calls, f">= {wanted}")
        bench.claim(f"soak on {target}: wrong numbers", len(found.wrong), "== 0")
        bench.claim(f"soak on {target}: growth of memory", max(0.0, found.growth), "<= 0.01")
        bench.save()
        print(
            f"{target}: {found.calls} calls, {found.growth:.2%} grown",
            *found.wrong[:5],
            sep="\n",
            file=sys.stderr,
        )

    note(soak.run(soak.pairs(target), calls, warm=warm, seconds=60 * bench.args.minutes, note=note))


def threads(bench: Benchmark) -> None:
    """8 threads, 200 calls each, every call of a shape not seen before."""
    for target in bench.args.targets.split(","):
        runs = 1 if bench.args.quick else bench.args.runs
        for kept in ("cold", "warm"):
            calls, faults, warm = 0, 0, 0
            with tempfile.TemporaryDirectory() as folder:
                for run in range(runs + (kept == "warm")):
                    where = folder if kept == "warm" else tempfile.mkdtemp(dir=folder)
                    count = "20" if kept == "warm" and run == 0 else "200"  # the first fills the cache
                    env = {**os.environ, "THRESHER_CACHE_DIR": where, "THRESHER_REWRITE_CACHE": "1",
                           "TORCHINDUCTOR_CACHE_DIR": f"{where}/inductor", "HF_HUB_OFFLINE": "1"}  # fmt: skip
                    done = subprocess.run([sys.executable, str(SUPPORT / "crowd.py"), "--target", target, "--calls", count,
                                           "--seed", str(run)], env=env, capture_output=True, text=True)  # fmt: skip
                    if done.returncode:
                        raise SystemExit(done.stderr[-3000:])
                    found = json.loads(done.stdout.splitlines()[-1])
                    if count == "200":
                        calls, faults, warm = (
                            calls + found["calls"],
                            faults + found["faults"],
                            warm + found["warm"],
                        )
                    if found["faults"]:
                        print(found, file=sys.stderr)
            bench.row(
                what="threads",
                target=target,
                cache=kept,
                runs=runs,
                from_cache=warm,
                calls=calls,
                faults=faults,
            )
            bench.claim(
                f"8 threads x 200 calls, {target}, {kept} cache, {runs} runs: errors and wrong",
                faults,
                "== 0",
            )


def sanitizers(bench: Benchmark) -> None:
    names = [
        f"tests/kernels/test_bad_calls.py::test_sanitizers_find_nothing_in_{what}"
        for what in ("the_kernels", "steps")
    ]
    found = tested("--thorough", *names)
    bench.row(what="sanitizers", runs=found["passed"], reports=found["failed"] + found["error"])
    if not found["passed"] + found["failed"]:
        bench.not_measured("sanitizers: reports", "The compiler brings no address sanitizer.")
        return
    bench.claim("address and undefined-behaviour sanitizers over all operators' samples and steps: reports",
                found["failed"] + found["error"], "== 0")  # fmt: skip


ROWS: dict[str, Callable[[Benchmark], None]] = {
    "cases": cases, "fuzz": fuzz, "files": files, "soak": long_run, "threads": threads, "sanitizers": sanitizers,
    "overhead": overhead,
}  # fmt: skip


def options(parser: Any) -> None:
    parser.add_argument("--only", default=",".join(ROWS), help="rows to run, by name, with commas between")
    parser.add_argument(
        "--more", type=Path, action="append", default=[], help="a record whose other rows are taken over"
    )
    parser.add_argument(
        "--chunks", type=int, default=100, help="chunks of 200 fuzz examples; the whole is 100"
    )
    parser.add_argument("--targets", default="reference,inductor", help="of soak and threads")
    parser.add_argument(
        "--calls", type=int, default=0, help="of soak; by default 20,000, and 2,000 on Inductor"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="after which a target's soak ends, with the calls it made",
    )
    parser.add_argument("--runs", type=int, default=5, help="of threads, for each target and cache")


def main() -> None:
    args = arguments(__doc__, options)
    sys.path.insert(0, str(SUPPORT))
    bench, chosen = Benchmark("trust", args), filter(None, args.only.split(","))
    for name in chosen:
        ROWS[name](bench)
    for path in filter(Path.exists, args.more):
        take_over(bench, json.loads(path.read_text()))
    for name in set(ROWS) - {row["what"] for row in bench.rows}:
        bench.not_measured(name, f"It was not run: python benchmarks/trust.py --only {name}.")
    bench.row(what="memory", peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
    bench.finish()


def take_over(bench: Benchmark, record: dict[str, Any]) -> None:
    """The rows and claims of an earlier record that were not made again now."""

    def what(row: dict[str, Any]) -> list[Any]:
        return [row.get(k) for k in ("what", "target", "cache", "model")]

    made, claimed = [what(r) for r in bench.rows], [c["claim"] for c in bench.claims]
    bench.rows = [r for r in record["rows"] if r["what"] in ROWS and what(r) not in made] + bench.rows
    bench.claims = [c for c in record["claims"] if c["claim"] not in claimed] + bench.claims


if __name__ == "__main__":
    main()
