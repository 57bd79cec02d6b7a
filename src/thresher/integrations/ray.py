"""Embedding jobs that one machine cannot hold: a class for Ray Data's `Dataset.map_batches`.

from thresher.integrations.ray import Embedder, prepare

prepare(SentenceTransformer("all-MiniLM-L6-v2"), "embedder")  # once: compiled, proven and saved
rows = ray.data.read_text("texts").map_batches(
    Embedder,
    fn_constructor_kwargs={"folder": "embedder"},
    batch_size=512,
    compute=ray.data.ActorPoolStrategy(size=2),
    num_cpus=0.5,  # leave some for reading: workers that hold every CPU wait for it for ever
)
rows.write_parquet("embedded")

Ray itself is not imported here. Every worker loads the saved file, so none captures, proves or searches anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize as unit

from ..errors import ArgumentError
from ..export import load, save
from ..reading import reading
from ..recipe import Recipe
from ..strict import compile_strictly
from .batches import groups, token_counts
from .sentence_transformers import EXAMPLE_TEXTS

_POOLINGS = ("mean", "first")
_PROGRAM, _SETTINGS = "model.thresher", "embedder.json"
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class _Pooled(torch.nn.Module):
    """Embeddings [rows, width] of an encoder's hidden states."""

    def __init__(self, model: torch.nn.Module, pooling: str, normalize: bool):
        super().__init__()
        self.model, self.pooling, self.normalize = model, pooling, normalize

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.model(**inputs)[0]
        if self.pooling == "first":
            result = hidden[:, 0]
        else:
            weight = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            result = (hidden * weight).sum(1) / weight.sum(1)
        return unit(result, dim=-1) if self.normalize else result


class _Sentence(torch.nn.Module):
    """Embeddings [rows, width] of a SentenceTransformer, with the pooling and the layers that it has."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model(dict(inputs))["sentence_embedding"]


def prepare(
    model: torch.nn.Module,
    folder: str | os.PathLike[str],
    recipe: Any = "embed",
    *,
    tokenizer: Any = None,
    pooling: str = "mean",
    normalize: bool = True,
    texts: Sequence[str] | None = None,
    compiled: bool = False,
    target: str = "inductor",
    **options: Any,
) -> Path:
    """Compile an embedding model and write the folder that `Embedder` loads; gives its path.

    model: a SentenceTransformer, whose own pooling is kept; or an encoder of transformers, with its `tokenizer`,
        whose hidden states are pooled: "mean" over the real tokens, or "first" token; unit length with `normalize`.
    recipe, options, target: as for `thresher.compile`, which raises where nothing could be done.
    texts: what it is compiled and verified on, at least two; by default sentences of mixed lengths.
    compiled: also store machine code, for `Embedder(folder, target="compiled", allow_compiled=True)` on
        workers with this machine's kind of processor: a worker then starts in about a second.

    Raises ArgumentError for an unknown pooling, a missing tokenizer, or fewer than two texts.
    """
    if pooling not in _POOLINGS:
        raise ArgumentError("pooling", pooling, " or ".join(map(repr, _POOLINGS)),
                            "A SentenceTransformer brings its own.")  # fmt: skip
    texts = list(EXAMPLE_TEXTS if texts is None else texts)
    if len(texts) < 2:
        raise ArgumentError("texts", texts, "two texts or more", "Leave it out for sentences of ours.")
    whole: torch.nn.Module
    if tokenizer is None and hasattr(model, "encode") and hasattr(model, "tokenizer"):
        tokenizer, whole = model.tokenizer, _Sentence(model)
        longest = getattr(model, "max_seq_length", None)
    elif tokenizer is None:
        raise ArgumentError("tokenizer", None, "the model's tokenizer",
                            "Pass tokenizer=AutoTokenizer.from_pretrained(...).")  # fmt: skip
    else:
        whole = _Pooled(model, pooling, normalize)
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = int(min(longest or 512, tokenizer.model_max_length))
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    device = next(whole.parameters()).device
    example = {name: encoded[name].to(device) for name in _INPUTS if name in encoded}
    fast = compile_strictly(whole.eval(), example, Recipe.of(recipe, **options), dynamic=True, target=target)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save(fast, folder / _PROGRAM, example_inputs=example, compiled=compiled, longest=longest)
    tokenizer.save_pretrained(folder)
    settings = {"inputs": list(example), "longest": longest}
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    return folder


class Embedder:
    """Embeds a column of texts; a class for `Dataset.map_batches(Embedder, fn_constructor_kwargs=...)`.

    folder: what `prepare` wrote; every worker must be able to read it.
    column, into: the column with the texts, and the one that is added: float32 [rows, width].
    tokens_per_batch: texts are embedded in their order in groups of up to so many tokens. Packed, no pad is computed,
        so that nothing needs to be sorted.
    threads: how many threads PyTorch may use in this worker; give as many as Ray reserves (`num_cpus`), since
        otherwise each worker takes the whole machine. None leaves PyTorch's own number.
    target, allow_compiled: as for `thresher.load`.

    A worker holds no state between batches, so Ray may start one again and repeat a batch; finished rows are
    skipped by Ray's own `ray.data.DataContext.checkpoint_config`.

    Raises ArgumentError for a folder that `prepare` has not written, and at the call for a missing column and for a
    value that is no text, by its row.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        column: str = "text",
        into: str = "embedding",
        tokens_per_batch: int = 8192,
        threads: int | None = 1,
        target: str = "inductor",
        allow_compiled: bool = False,
    ):
        from transformers import AutoTokenizer

        folder = Path(folder)
        if not (folder / _SETTINGS).is_file():
            raise ArgumentError("folder", str(folder), "a folder that this machine can read and prepare() wrote",
                                "Write it with thresher.integrations.ray.prepare(model, folder).")  # fmt: skip
        if tokens_per_batch < 1:
            raise ArgumentError("tokens_per_batch", tokens_per_batch, "1 or more", "Try 8192.")
        if threads is not None:
            torch.set_num_threads(threads)
        with reading(
            folder / _SETTINGS, "the settings of an embedder", "Write the folder again with prepare()."
        ):
            settings = json.loads((folder / _SETTINGS).read_text())
            self.inputs, self.longest = [str(name) for name in settings["inputs"]], int(settings["longest"])
        self.column, self.into, self.tokens = column, into, tokens_per_batch
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.program = load(folder / _PROGRAM, target, allow_compiled=allow_compiled)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with the column of embeddings added."""
        if self.column not in batch:
            raise ArgumentError("column", self.column, f"one of {', '.join(batch)}",
                                'Pass fn_constructor_kwargs={"column": ...}.')  # fmt: skip
        texts = list(batch[self.column])
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise ArgumentError(
                    f"{self.column}[{row}]", text, "a text", "Drop or fill such rows before this step."
                )
        if not texts:
            return {**batch, self.into: np.zeros((0,), np.float32)}
        counts = token_counts(self.tokenizer, texts, self.longest)
        parts = [self._embed(texts[group]) for group in groups(counts, self.tokens)]
        return {**batch, self.into: np.concatenate(parts)}

    def _embed(self, texts: list[str]) -> np.ndarray:
        encoded = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.longest,
            padding_side="right",
            return_tensors="pt",
        )
        given = {name: encoded[name] for name in self.inputs}
        if (
            len(texts) == 1
        ):  # a program may need two rows and more: a second one, of a single token, costs that token
            given = {name: torch.cat([t, t]) for name, t in given.items()}
            given["attention_mask"][1, 1:] = 0
        (result,) = self.program(**given).values()
        return result[: len(texts)].float().numpy()
