"""A Hugging Face model from its directory, with weights that stay in their files until they are read."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import ArgumentError, MissingDependencyError, ThresherError
from .reading import reading, said
from .tensor_files import MappedFile

INDEX = "model.safetensors.index.json"


@dataclass
class MappedModel:
    """model: in eval mode. directory: where its weights lie. files: by the name of each of its weights, the file.
    copied: bytes of weights that lie in memory after all, such as experts that the library stacks."""

    model: torch.nn.Module
    directory: Path
    files: dict[str, Path] = field(default_factory=dict)
    copied: int = 0
    _maps: list[MappedFile] = field(default_factory=list)

    def settle(self) -> None:
        """The model becomes an ordinary one: its weights may be written to, in memory alone."""
        for held in self._maps:
            held.settle()


def open_model(
    directory: str | Path, model: torch.nn.Module | None = None, dtype: torch.dtype | None = None
) -> MappedModel:
    """The model that `save_pretrained` wrote into a directory, as its config names it; or the weights for one on meta.

    model: a module without values, whose state dict has the names in the files. dtype: of the weights, by default what the
    config says; another one than the files' is a copy in memory. Raises ThresherError (naming file and
    tensor) for a shard that is missing or truncated and for weights that are missing or of another shape, and
    ArgumentError for a directory that holds no model.
    """
    directory = Path(directory)
    maps = [MappedFile(path) for path in _shards(directory)]
    tensors = {name: held.tensor(name) for held in maps for name in held.entries}
    files = {name: held.path for held in maps for name in held.entries}
    if model is None or hasattr(type(model), "from_pretrained"):
        found = _from_config(directory, tensors, model, dtype)
    else:
        found = _filled(model, tensors, directory)
    places = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in map(_whole, maps)]
    weights = {p.data_ptr(): p for p in found.parameters()}
    copied = sum(
        p.numel() * p.element_size() for at, p in weights.items() if not any(a <= at < b for a, b in places)
    )
    return MappedModel(found.eval(), directory, files, copied, maps)


def source_of(model: Any, weights: str | Path | None) -> MappedModel | None:
    """The directory behind a model, opened; None for a module with values of its own."""
    if isinstance(model, MappedModel):
        return model
    if isinstance(model, (str, Path)):
        if weights is not None:
            raise ArgumentError("weights", str(weights), "None beside a directory", "Name one directory.")
        return open_model(model)
    on_meta = any(p.is_meta for p in model.parameters()) if isinstance(model, torch.nn.Module) else False
    if on_meta and weights is None:
        raise ArgumentError("model", f"{type(model).__name__} on meta", "weights=directory with it, or values of its own",
                            "Pass weights=, the directory of its safetensors files.")  # fmt: skip
    if weights is not None and not on_meta:
        raise ArgumentError("weights", str(weights), "None beside a model with values",
                            "Leave it out, or build the model under torch.device('meta').")  # fmt: skip
    return open_model(weights, model) if weights is not None else None


def _whole(held: MappedFile) -> torch.Tensor:
    return torch.frombuffer(held._map, dtype=torch.uint8)


def _shards(directory: Path) -> list[Path]:
    """The files of a directory's weights. Raises where one that the index names is missing."""
    index = directory / INDEX
    if index.is_file():
        with reading(index, "an index of shards", "Fetch it again."):
            where: dict[str, str] = json.loads(index.read_text())["weight_map"]
        for name, shard in where.items():
            if not (directory / shard).is_file():
                raise ThresherError(
                    f"{directory / shard} is missing; {index.name} says that it holds {name}. Fetch it again."
                )
        return [directory / shard for shard in sorted(set(where.values()))]
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise ArgumentError(
            "model",
            f"{str(directory)!r}, "
            + ("which is no directory" if not directory.is_dir() else "without *.safetensors"),
            "a module, or a directory with config.json and safetensors files",
            "Save the model with save_pretrained(directory).",
        )
    return found


def _from_config(
    directory: Path,
    tensors: dict[str, torch.Tensor],
    model: torch.nn.Module | None,
    dtype: torch.dtype | None,
) -> torch.nn.Module:
    """Built by the library, which knows older names of weights and makes the buffers that no file holds."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingDependencyError("transformers", "demo", "Quantizing from a directory")
    transformers = importlib.import_module("transformers")
    if model is None:
        config, kind = _config_and_class(transformers, directory)
    else:
        config, kind = model.config, type(model)
    with _quiet(transformers), reading(directory, f"the weights of {kind.__name__}", "Fetch them again."):
        found, said_of = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype or "auto", output_loading_info=True
        )
    missing, wrong = sorted(said_of["missing_keys"]), said_of["mismatched_keys"]
    if wrong:
        raise ThresherError(f"{directory}: {wrong[0][0]} has the shape {list(wrong[0][1])}, and the config asks for "
                            f"{list(wrong[0][2])}. The files belong to another config.")  # fmt: skip
    if missing:
        raise ThresherError(f"{directory} lacks {len(missing)} weights of {kind.__name__}, {missing[0]} among them. "
                            "Fetch the files again.")  # fmt: skip
    return found


def _config_and_class(transformers: Any, directory: Path) -> tuple[Any, Any]:
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as reason:
        raise ArgumentError("model", f"{str(directory)!r} ({said(reason)})", "a directory with config.json",
                            "Save the model with save_pretrained(directory).") from None  # fmt: skip
    kind = next((getattr(transformers, a, None) for a in config.architectures or ()), None)
    if kind is None:
        raise ArgumentError("model", f"{str(directory)!r} of {config.architectures}", "an architecture of transformers",
                            "Build the module on meta and pass it with weights=directory.")  # fmt: skip
    return config, kind


def tokenizer_of(directory: Path) -> Any:
    """The tokenizer that lies beside a model. Raises ArgumentError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as reason:
        raise ArgumentError("tokenizer", f"None, and none in {str(directory)!r} ({said(reason)})", "the model's tokenizer",
                            "Pass it, or token ids as data.") from None  # fmt: skip


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the bar that the library draws for weights that take no time."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _filled(model: torch.nn.Module, tensors: dict[str, torch.Tensor], directory: Path) -> torch.nn.Module:
    """A module on meta with its values from the files; the module itself is filled."""
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    empty = {n: t for n, t in held if t.is_meta}
    lost = sorted(n for n in empty if n not in tensors and n not in _tied(model, tensors))
    if lost:
        raise ThresherError(
            f"{directory} lacks {lost[0]}, which has no values in the model. A buffer that is not saved must be "
            "made outside torch.device('meta')."
        )
    for name, tensor in tensors.items():
        if name in empty and tensor.shape != empty[name].shape:
            raise ThresherError(f"{directory}: {name} has the shape {list(tensor.shape)}, and the model's is "
                                f"{list(empty[name].shape)}.")  # fmt: skip
    tied = {n: tensors[m] for n, m in _tied(model, tensors).items()}
    model.load_state_dict(
        {n: t for n, t in {**tensors, **tied}.items() if n in empty}, strict=False, assign=True
    )
    return model


def _tied(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """By name of a parameter that the files leave out, another name of the same parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = [group for group in names.values() if len(group) > 1]
    return {n: m for group in shared for n in group for m in group if n not in tensors and m in tensors}
