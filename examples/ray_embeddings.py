"""Embed every paragraph of a directory's text files to Parquet with Ray Data, packed, on several workers.

    pip install 'thresher[demo,ray]'
    python examples/ray_embeddings.py TEXTS OUT [--workers 2] [--resume FOLDER]

MiniLM is compiled, proven and saved once, in OUT/embedder; each worker loads that file. A worker that dies is
started again by Ray and its batch repeated. With --resume, finished paragraphs are noted in FOLDER and a second run
leaves them out. Prints paragraphs a second, without the time in which workers start: compare --workers 1 and 2.
On a cluster, TEXTS, OUT and FOLDER lie where every machine reads them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from thresher.integrations.ray import Embedder, prepare
from thresher.tools import models


class Timed(Embedder):
    """An Embedder that notes when it began and ended each batch."""

    def __call__(self, batch: Any) -> Any:
        begin = time.time()
        result = super().__call__(batch)
        rows = len(result[self.into])
        return {**result, "begin": np.full(rows, begin), "end": np.full(rows, time.time())}


def paragraphs(row: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The paragraphs of one file, each with an id that it keeps from run to run."""
    for number, text in enumerate(row["bytes"].decode(errors="replace").split("\n\n")):
        if text.strip():
            yield {"id": f"{row['path']}#{number}", "text": " ".join(text.split())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, help="directory with .txt files")
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=0.5, help="of each worker; reading needs some too")
    parser.add_argument("--resume", type=Path, help="folder in which Ray notes what is finished")
    args = parser.parse_args()

    import ray

    folder = args.out / "embedder"
    if not (folder / "embedder.json").exists():
        model, tokenizer = models.minilm()
        prepare(model, folder, "embed", tokenizer=tokenizer, compiled=True)
    ray.init(include_dashboard=False)
    if args.resume:
        from ray.data.checkpoint import CheckpointConfig

        ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
            "id", str(args.resume.resolve()), delete_checkpoint_on_success=False
        )
    rows = ray.data.read_binary_files(str(args.texts), include_paths=True, file_extensions=["txt"])
    settings = {"folder": str(folder.resolve()), "target": "compiled", "allow_compiled": True}
    done = (
        rows.flat_map(paragraphs)
        .repartition(8 * args.workers)
        .map_batches(
            Timed,
            fn_constructor_kwargs=settings,
            batch_size=256,
            compute=ray.data.ActorPoolStrategy(size=args.workers),
            num_cpus=args.cpus,
        )
    )
    done.write_parquet(str(args.out / "embedded"))
    ray.data.DataContext.get_current().checkpoint_config = None
    times = ray.data.read_parquet(str(args.out / "embedded")).select_columns(["begin", "end"]).to_pandas()
    seconds = times["end"].max() - times["begin"].min()
    print(f"{len(times)} paragraphs, {args.workers} workers: {len(times) / seconds:.0f} a second")
    ray.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
