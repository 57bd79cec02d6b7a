"""A Hugging Face model directory of the user's: the model with the head it was saved with, and its tokenizer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import ArgumentError, ThresherError, unknown_key
from ..mapped_model import MappedModel, open_model

TASKS: dict[str, str] = {
    "feature-extraction": "AutoModel",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "multiple-choice": "AutoModelForMultipleChoice",
    "next-sentence-prediction": "AutoModelForNextSentencePrediction",
}
"""Name of a task, as transformers' pipelines call it -> the class that gives a model its head."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FIX = "Save the model and its tokenizer into it."


def load(path: str, task: str | None, dtype: torch.dtype | None, mapped: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) in eval mode; with `mapped` a MappedModel, where the files are safetensors and no task is named.

    dtype: of the weights, None for the one they are stored in.
    task: one of TASKS; None for the class that config.json names under `architectures`. A head that the files do
    not hold is refused, since its weights would be random. Raises ArgumentError for whatever is wrong with the files.
    """
    import transformers as hf

    if task is not None and task not in TASKS:
        raise unknown_key("--task", task, TASKS)
    if not Path(path).is_dir():
        raise ArgumentError(
            "model", repr(path), "minilm, smollm2, or the path of a model directory", "Check the path."
        )
    given: dict[str, Any] = {"local_files_only": True}
    try:
        config = hf.AutoConfig.from_pretrained(path, **given)
        kind = _class(config, task)
        mapped = mapped and task is None and any(Path(path).glob("*.safetensors"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if mapped:
                model, found = open_model(path, dtype=dtype), {}
            else:
                model, found = kind.from_pretrained(
                    path, dtype=dtype or "auto", output_loading_info=True, **given
                )
        tokenizer = hf.AutoTokenizer.from_pretrained(path, **given)
        if len(tokenizer) <= len(
            tokenizer.all_special_tokens
        ):  # what transformers makes of no tokenizer's files
            raise ValueError("its tokenizer knows no words")
    except ThresherError:
        raise
    except (
        OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, SafetensorError,
    ) as reason:  # fmt: skip
        said = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        raise ArgumentError("model", f"{path!r} ({said})",
                            "a directory with config.json, weights and a tokenizer, as save_pretrained writes them",
                            _FIX) from None  # fmt: skip
    missing = sorted(found.get("missing_keys", ()))
    if missing:
        named = f"{type(model).__name__} without weights for {', '.join(missing[:3])}"
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ArgumentError(
            "--task" if task else "model",
            f"{path!r}: {named}{more}",
            "a directory that holds all of the model's weights; those would be random",
            f"Name the task that it was saved for, of {', '.join(TASKS)}.",
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ArgumentError("model", f"{path!r}, whose tokenizer has neither a pad token nor an end token",
                                "a tokenizer that can pad", "Set tokenizer.pad_token and save it again.")  # fmt: skip
        tokenizer.pad_token = tokenizer.eos_token
    return model if isinstance(model, MappedModel) else model.eval(), tokenizer


def _class(config: Any, task: str | None) -> Any:
    """The class to load a model as: the task's, else the first architecture that transformers knows, else AutoModel."""
    import transformers as hf

    if task is not None:
        return getattr(hf, TASKS[task])
    for name in config.architectures or ():
        found = getattr(hf, name, None)
        if found is not None:
            return found
    if config.architectures:
        raise ValueError(f"this transformers has no class {', '.join(config.architectures)}")
    return hf.AutoModel
