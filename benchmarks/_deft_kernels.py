"""The kernels of sparse MLPs beside PyTorch's dense product: seconds at each density, costs of a call, and their results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from _harness import Benchmark
from _row_reads import read
from torch.nn import functional as F

from thresher.kernels.sparse import cpp as sparse_native
from thresher.kernels.sparse import down as sparse_down

DENSITIES = (0.05, 0.1, 0.2, 0.3)


COLD = 1 << 27  # bytes of weights to rotate through; a last-level cache of 32 MB keeps none of them


def weights(neurons: int, features: int, dtype: torch.dtype) -> list[torch.Tensor]:
    columns = features // 2 if dtype == torch.uint8 else features  # 4-bit codes, two a byte
    made = []
    for _ in range(max(2, min(8, COLD // (neurons * columns * dtype.itemsize)))):
        w = torch.empty(neurons, columns, dtype=dtype)
        sparse_native.large_pages(w)
        if dtype.is_floating_point:
            w.uniform_(-1, 1)
        else:
            w.random_(*((-127, 128) if dtype == torch.int8 else (0, 256)))
        made.append(w)
    return made


def activations(
    tokens: int, neurons: int, density: float, dtype: torch.dtype, count: int
) -> list[torch.Tensor]:
    """Whole neurons on or off, so that the union over tokens is the density."""
    made = []
    for _ in range(count):
        on = torch.rand(neurons) < density
        made.append((torch.randn(tokens, neurons) * on).to(dtype))
    return made


def least(forms: dict[str, Callable[[], int]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Least and median thread CPU seconds of one call of each form; a form returns how many calls it made."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    spent: dict[str, list[float]] = {name: [] for name in forms}
    names = list(forms)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = clock()
            calls = forms[name]()
            if turn:
                spent[name].append((clock() - started) / calls)
    return {n: min(s) for n, s in spent.items()}, {n: statistics.median(s) for n, s in spent.items()}


def kernel(bench: Benchmark, quick: bool) -> None:
    shapes = [(8192, 2048)] if quick else [(11008, 4096), (8192, 2048)]
    kinds = (("fp32", torch.float32, torch.float32), ("bf16", torch.bfloat16, torch.bfloat16),
             ("int8", torch.float32, torch.int8), ("int4", torch.float32, torch.uint8))  # fmt: skip
    lowest: dict[str, float] = {}
    of_reading: dict[str, float] = {}
    with_call: dict[str, float] = {}
    four = int8_dense = float("nan")
    for neurons, features in shapes:
        for kind, dtype, held in kinds:
            ws = weights(neurons, features, held)
            scale = None if held.is_floating_point else torch.full((neurons, 1), 0.01)
            if held == torch.uint8:
                scale = torch.full((neurons, features // 64), 0.01)
            pools = {p: activations(1, neurons, p, dtype, 12 if p < 1 else 2) for p in (*DENSITIES, 1.0)}

            def ours(p: float, ws=ws, scale=scale, pools=pools, neurons=neurons) -> int:
                for i, a in enumerate(pools[p]):
                    sparse_native.down(a, ws[i % len(ws)], scale, None, None, neurons)
                return len(pools[p])

            out = torch.empty(1, features, dtype=dtype)
            prepared = {
                p: [
                    sparse_native.down_arguments(a, ws[i % len(ws)], scale, None, None, neurons, out)
                    for i, a in enumerate(pool)
                ]
                for p, pool in pools.items()
            }

            def alone(p: float, prepared=prepared) -> int:
                run = sparse_native.down_kernel()
                for given in prepared[p]:
                    run(*given)
                return len(prepared[p])

            listed = {p: [(a[0] != 0).nonzero().flatten().int() for a in pools[p]] for p in DENSITIES}

            def reading(p: float, ws=ws, listed=listed) -> int:
                for i, rows in enumerate(listed[p]):
                    read(ws[i % len(ws)], rows)
                return len(listed[p])

            forms: dict[str, Callable[[], int]] = {
                f"{p:.2f}": (lambda p=p, alone=alone: alone(p)) for p in (*DENSITIES, 1.0)
            }
            forms |= {f"call {p:.2f}": (lambda p=p, ours=ours: ours(p)) for p in DENSITIES}
            forms |= {f"read {p:.2f}": (lambda p=p, reading=reading: reading(p)) for p in DENSITIES}
            if scale is None:
                rows = [w.t().contiguous() for w in ws]

                def linear(rows=rows, x=pools[1.0][0]) -> int:
                    for w in rows:
                        F.linear(x, w)
                    return len(rows)

                forms["F.linear"] = linear
            best, middle = least(forms, 9 if quick else 25)
            dense = min(best[n] for n in ("1.00", "F.linear") if n in best)
            if kind == "int4":  # unpacking bounds its own dense run, not bytes: half of int8's is the ideal
                dense = min(dense, int8_dense / 2)
            int8_dense = dense
            dense_middle = min(middle[n] for n in ("1.00", "F.linear") if n in middle)
            for p in DENSITIES:
                u = statistics.fmean(float((a != 0).any(0).float().mean()) for a in pools[p])
                name = f"{p:.2f}"
                ideal = u * dense / best[name]
                reads = best[f"read {name}"]
                lowest[kind] = min(lowest.get(kind, 9.9), ideal)
                with_call[kind] = min(with_call.get(kind, 9.9), u * dense / best[f"call {name}"])
                of_reading[kind] = min(of_reading.get(kind, 9.9), reads / best[name])
                four = ideal if kind == "int4" and p == 0.1 else four
                bench.row(part="kernel", shape=f"{neurons}x{features}", type=kind, density=p,
                          sparse_ms=round(best[name] * 1e3, 4), call_ms=round(best[f"call {name}"] * 1e3, 4),
                          read_ms=round(reads * 1e3, 4),
                          own_dense_ms=round(best["1.00"] * 1e3, 4),
                          linear_ms=round(best.get("F.linear", float("nan")) * 1e3, 4),
                          of_ideal=round(ideal, 3), of_ideal_median=round(u * dense_middle / middle[name], 3),
                          against_linear=round(best.get("F.linear", float("nan")) / best[name], 2))  # fmt: skip
    for kind, target in (("fp32", ">= 0.85"), ("bf16", ">= 0.75"), ("int8", ">= 0.75")):
        bench.claim(
            f"CPU kernel, batch 1 {kind}, 5 to 30 %: least fraction of byte-ideal", lowest[kind], target
        )
        bench.claim(f"the same, with the Python call around it, {kind}", with_call[kind], target)
    for kind in ("bf16", "int8"):
        bench.claim(
            f"CPU kernel, batch 1 {kind}, 5 to 30 %: least fraction of reading the same rows and nothing else",
            of_reading[kind],
            ">= 0.80",
        )


def dispatch(bench: Benchmark, quick: bool) -> None:
    """tau=-1: the operator decides by its own measured break-even, as a compiled model does."""
    neurons, features = 8192, 2048
    batches = (1, 4, 16, 64) if quick else (1, 2, 4, 8, 16, 32, 64)
    shares = (
        (0.0, 0.05, 0.2, 0.5, 0.8, 1.0)
        if quick
        else (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    )
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        ws = weights(neurons, features, dtype)[:3]
        rows = [w.t().contiguous() for w in ws]
        for tokens in batches:
            for p in shares:
                pool = activations(tokens, neurons, p, dtype, 3)

                def ours(pool=pool, ws=ws) -> int:
                    for a, w in zip(pool, ws):
                        sparse_down.sparse_down(a, w, None, None, None, -1.0, 64, "")
                    return 3

                def dense(pool=pool, rows=rows) -> int:
                    for a, w in zip(pool, rows):
                        F.linear(a, w)
                    return 3

                best, _ = least({"ours": ours, "dense": dense}, 3 if quick else 5)
                ratio = best["ours"] / best["dense"]
                if ratio > 1.02:  # noise or real? look again, longer
                    best, _ = least({"ours": ours, "dense": dense}, 9)
                    ratio = best["ours"] / best["dense"]
                worst = max(worst, ratio)
                bench.row(part="dispatch", type=str(dtype)[6:], batch=tokens, density=p,
                          sparse_ms=round(best["ours"] * 1e3, 4), linear_ms=round(best["dense"] * 1e3, 4),
                          time_over_dense=round(ratio, 3))  # fmt: skip
    bench.claim("any density, batch 1 to 64: greatest time over dense F.linear", worst, "<= 1.03")


def exact(bench: Benchmark) -> None:
    equal, worse = True, 0.0
    everything = torch.tensor(-1.0)  # below any |a|: keeps every neuron
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 3, 4, 16):
            w = (torch.randn(4096, 1024) / 64).to(dtype)
            for p in (0.0, 0.05, 0.3, 1.0):
                (a,) = activations(tokens, 4096, p, dtype, 1)
                ours, _ = sparse_native.down(a, w, None, None, None, 4096)
                whole, _ = sparse_native.down(a, w, None, None, everything, 4096)
                equal &= torch.equal(ours, whole)  # type: ignore[arg-type]
                true = a.double() @ w.double()
                dense = (F.linear(a, w.t().contiguous()).double() - true).norm()
                if dense > 0:
                    worse = max(worse, float((ours.double() - true).norm() / dense))  # type: ignore[union-attr]
                    bench.row(part="exact", type=str(dtype)[6:], batch=tokens, density=p,
                              error_over_dense=round(float((ours.double() - true).norm() / dense), 3))  # fmt: skip
    bench.claim("exact mode: bitwise equal to its own all-active run (1 is yes)", float(equal), "== 1")
    bench.claim("exact mode: error against fp64 over dense F.linear's, greatest", worse, "<= 2")
