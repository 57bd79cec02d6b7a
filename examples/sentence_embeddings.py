"""Embed every paragraph of Python's language reference with MiniLM, padded and packed, and compare.

    python examples/sentence_embeddings.py [--rows 32] [--threads 1] [--limit N]

The paragraphs stay in reading order, as a service receives them: a batch holds short and long ones. The
padded model and ours embed the same batches in turns; both are compiled. Printed are the time ratio and the
smallest cosine between the two embeddings of any paragraph. About 5 minutes on one core, most of it for the
padded model.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, normalize

from thresher.progress import progress
from thresher.tools import models


def embed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Unit-length sentence embeddings [rows, width]: the mean over real tokens."""
    hidden = model(**batch).last_hidden_state
    weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32, help="paragraphs in a batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=0, help="only this many paragraphs; 0 for all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    _, tokenizer = models.minilm()
    texts = list(models.texts())[: args.limit or None]
    batches = [
        dict(
            tokenizer(
                texts[i : i + args.rows], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
        )
        for i in range(0, len(texts), args.rows)
    ]
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    positions = sum(b["attention_mask"].numel() for b in batches)
    print(
        f"{len(texts)} paragraphs, {tokens} tokens, {1 - tokens / positions:.0%} of the padded batches is padding"
    )

    clock = time.thread_time if args.threads == 1 else time.process_time
    forms = {"padded": "inductor", "packed": "thresher"}
    spent, found = dict.fromkeys(forms, 0.0), {name: [] for name in forms}  # type: ignore[var-annotated]
    with torch.no_grad():
        compiled = {}
        for name, backend in forms.items():  # one forward per backend, each with a model object of its own
            own = models.minilm()[0]
            compiled[name] = torch.compile(own, backend=backend, dynamic=True)
            for batch in batches[:2] + batches[-1:]:  # what is left to compile is compiled here
                embed(compiled[name], batch)
        for batch in progress(batches, "embedding", total=len(batches)):
            for name in forms:
                started = clock()
                found[name].append(embed(compiled[name], batch))
                spent[name] += clock() - started
    padded, packed = (torch.cat(found[name]) for name in forms)
    cosine = cosine_similarity(padded, packed)
    print(f"padded torch.compile {spent['padded']:.1f} s, packed {spent['packed']:.1f} s of CPU: "
          f"{spent['padded'] / spent['packed']:.2f} times as fast")  # fmt: skip
    print(f"smallest cosine between the two {float(cosine.min()):.8f}, largest difference "
          f"{float((padded - packed).abs().max()):.1e}")  # fmt: skip
    if float(cosine.min()) < 1 - 1e-5:
        raise SystemExit("the embeddings differ")


if __name__ == "__main__":
    main()
