"""Threads that call one compiled model at once, each with shapes that no call had before. A process of its own.

    python tests/support/crowd.py --target reference --calls 200 --threads 8    # warm where THRESHER_CACHE_DIR is

Prints one line of JSON: calls, errors, wrong.
"""

from __future__ import annotations

import argparse
import json
import threading

import soak
import torch
import zoo

import thresher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="reference")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model, inputs = zoo.ZOO["bert"].build()
    fast = thresher.compile(model, inputs, "exact", target=asked.target, dynamic=True)
    pair = soak.Pair(model, fast, 1e-5, 90)
    shapes = [(r, c) for r in range(1, 33) for c in range(2, 64)]
    order = torch.randperm(len(shapes), generator=torch.Generator().manual_seed(asked.seed)).tolist()
    errors, wrong, done, start = [], [], [], threading.Barrier(asked.threads)

    def work(number: int) -> None:
        start.wait()
        for at in order[number :: asked.threads][: asked.calls]:
            try:
                off = pair.off(batch(*shapes[at], at))
                done.append(at)
                if not off <= pair.tolerance:
                    wrong.append(f"{shapes[at]}: {off:.2g} off")
            except BaseException as error:
                errors.append(f"{shapes[at]}: {type(error).__name__}: {str(error)[:200]}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(asked.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    warm = any("taken from the cache" in n for n in fast.report.notes)
    print(json.dumps({"calls": len(done), "warm": warm, "errors": errors[:5], "wrong": wrong[:5],
                      "faults": len(errors) + len(wrong)}))  # fmt: skip


def batch(rows: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, columns + 1, (rows,), generator=make)
    lengths[0] = columns
    mask = (torch.arange(columns)[None] < lengths[:, None]).long()
    return {"input_ids": torch.randint(3, 90, (rows, columns), generator=make) * mask, "attention_mask": mask}


if __name__ == "__main__":
    main()
