"""Puts a quantization into the model itself: codes in the place of linears, and its rotations in the weights.

A rotation can be fused where it stands between two weights: of the residual stream behind RMS norms (R1), and of
values within a head (R2). It cannot before a down projection, whose input is an activation function's (R4, which the
graph computes online), nor around layer norms, which subtract a mean that a rotated stream does not have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from thresher.graph.program import Program
from thresher.passes.rsq.config import RSQConfig
from thresher.passes.rsq.edits import RotationPlan
from thresher.passes.rsq.plan import make_plan
from thresher.passes.rsq.rotation import rotate_reader
from thresher.passes.structure.recover import NormSite, recover

from ..errors import ArgumentError, ThresherError
from .linear import from_codes

R4 = (
    "a model that other tools load cannot compute the rotations of what linears read, which run online. They are left "
    "out (rotate_down=False, rotate_inputs=False)."
)
_LAYER_NORM = (
    "{} is normed by layer norms, and a plain one subtracts a mean that a rotated stream does not have: the residual "
    "stream is not rotated (rotate=False)."
)
_ZEROS = (
    "transformers' loader of compressed-tensors does not read packed zero points: the middle code stands for zero "
    "(symmetric=True)."
)
_EXPERTS = (
    "{} products by a mixture's experts stay as they are, {} among them: a saved model holds codes of nn.Linear modules "
    "alone. Compiled with codes by .save they are quantized too."
)
_NO_LINEAR = (
    "{} linears stay as they are, {} among them: a saved model holds codes of nn.Linear modules alone, and these are none "
    "(GPT-2's are Conv1D). Compiled with codes by .save they are quantized too."
)
_SCALES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def portable(config: RSQConfig, program: Program, model: nn.Module) -> tuple[RSQConfig, list[str]]:
    """The options without what cannot be fused, and a sentence for each that was left out. Scales are of the model's
    type, which is what transformers loads them in. model: what the program was captured from.

    Raises ArgumentError for a model without a linear that could be quantized and saved.
    """
    said = []
    dtype = next(model.parameters()).dtype
    if config.rotate_down or config.rotate_inputs:
        config, said = dataclasses.replace(config, rotate_down=False, rotate_inputs=False), [R4]
    if not config.symmetric and config.grid == "integer":
        config = dataclasses.replace(config, symmetric=True)
        said.append(_ZEROS)
    plan = make_plan(program, recover(program), config)
    if plan.experts:
        names = [s.fqn for s in plan.experts]
        config = dataclasses.replace(config, keep=(*config.keep, *names))
        said.append(_EXPERTS.format(len(names), names[0]))
    others = [s.fqn for s in plan.quantise if type(_module(model, s.fqn)) is not nn.Linear]
    if others:
        config = dataclasses.replace(config, keep=(*config.keep, *others))
        said.append(_NO_LINEAR.format(len(others), others[0]))
    if len(others) == len(plan.quantise):
        left = " ".join(said) or "; ".join(f"{m.site}: {m.reason}" for m in plan.missed[:3])
        raise ArgumentError(
            "model", f"{type(model).__name__}, of which no linear can be quantized and saved as a model ({left})",
            "a model with nn.Linear modules that the options do not keep",
            "Quantize it in Python without portable=True, and save the codes by .save for thresher.compile.",
        )  # fmt: skip
    centred = _centred(plan)
    if centred is not None:
        config = dataclasses.replace(config, rotate=False)
        said.append(_LAYER_NORM.format(centred))
    if dtype in _SCALES:
        config = dataclasses.replace(config, scale_dtype=_SCALES[dtype])
    return config, said


def _centred(plan: RotationPlan) -> str | None:
    """A layer's name of a stream that is rotated behind layer norms, or None."""
    return next((s.tower.layers[0].fqn for s, _ in plan.streams if s.centred), None)


def fuse(
    model: nn.Module,
    program: Program,
    config: RSQConfig,
    codes: Mapping[str, Mapping[str, torch.Tensor]],
) -> list[str]:
    """Change a model in place to the one that the codes were made for; the names of the linears that now hold them.

    program: of this model, as it was when it was quantized. codes: by linear, see `codes.to_tensors`.
    Raises ArgumentError for options whose rotations cannot be fused, ThresherError for codes of what is no nn.Linear.
    """
    plan = make_plan(program, recover(program), config)
    online = next((e.site.fqn for e in plan.edits.values() if e.online is not None), None)
    if online is not None:
        raise ArgumentError(
            "rsq options rotate_down, rotate_inputs", f"True ({online} is rotated online)",
            "False for a model that is saved for transformers",
            "Quantize with rotate_down=False and rotate_inputs=False (portable=True does), or save the codes by .save.",
        )  # fmt: skip
    centred = _centred(plan)
    if centred is not None:
        raise ArgumentError(
            "rsq option rotate", f"True ({_LAYER_NORM.format(centred)})", "False for this model",
            "Quantize with rotate=False, or save the codes by .save.",
        )  # fmt: skip
    with torch.no_grad():
        done = _linears(model, program, plan, codes)
        _streams(model, program, plan)
    left = sorted(set(codes) - done)
    if left:
        raise ThresherError(
            f"{', '.join(left[:3])}{f' and {len(left) - 3} more' if len(left) > 3 else ''} cannot be saved as a model: the "
            "format holds codes of nn.Linear modules. Keep those with keep=[...] (portable=True keeps "
            "experts), or save the codes by .save."
        )
    return sorted(done)


def _linears(
    model: nn.Module, program: Program, plan: RotationPlan, codes: Mapping[str, Mapping[str, torch.Tensor]]
) -> set[str]:
    """Put every linear of the plan's into the model, with codes or rotated; the names of those with codes."""

    def held(name: str | None) -> torch.Tensor | None:
        return None if name is None else program.weights[name].tensor.detach()

    made: dict[str, nn.Module] = {}
    done: set[str] = set()
    for edit in plan.edits.values():
        site, norm = edit.site, edit.norm
        if site.fqn in made:
            continue
        there = _module(model, site.fqn)
        weight, bias = held(site.weight), held(site.bias)
        assert weight is not None
        if edit.changes:
            gain, shift = (held(norm.weight), held(norm.bias)) if norm is not None else (None, None)
            weight, bias = edit.apply(weight, bias, gain, shift)
        elif edit.transposed:
            weight = weight.t()
        if site.fqn in codes and type(there) is nn.Linear:
            made[site.fqn] = from_codes(codes[site.fqn], bias)
            done.add(site.fqn)
        elif edit.changes:
            if there is None or not isinstance(getattr(there, "weight", None), torch.Tensor):
                raise ThresherError(
                    f"{site.fqn} is rotated and is no module of {type(model).__name__} that holds its own weight, so that "
                    "it cannot be saved as a model. Quantize with rotate=False and rotate_heads=False."
                )
            made[site.fqn] = there
            there.weight = nn.Parameter(weight.t().contiguous() if edit.transposed else weight, False)
            if bias is not None:
                there.bias = nn.Parameter(bias, False)
    for name in done:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made[name])
    return done


def _streams(model: nn.Module, program: Program, plan: RotationPlan) -> None:
    """Rotate the tables that streams start from, and take from norms what their readers now hold."""
    for stream, r in plan.streams:
        for norm in stream.norms:
            _take_gain(model, program, norm)
        for embedding in stream.tower.embeddings:
            assert embedding.weight is not None
            held = program.weights[embedding.weight]
            owner = _module(model, embedding.fqn)  # not by the table's name, which may be the head's
            if not isinstance(getattr(owner, "weight", None), torch.Tensor):
                owner = _owner(model, held.fqn)
            owner.weight = nn.Parameter(rotate_reader(held.tensor.detach(), r), False)
    for norm, _ in plan.latents:
        _take_gain(model, program, norm)
    if plan.streams and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        _untie(model)


def _take_gain(model: nn.Module, program: Program, norm: NormSite) -> None:
    if norm.weight is not None:
        owner = _owner(model, program.weights[norm.weight].fqn)
        gain = program.weights[norm.weight].tensor
        owner.weight = nn.Parameter(torch.full_like(gain, 1.0 - float(norm.offset)), False)


def _untie(model: Any) -> None:
    """The head has a table of its own from now on."""
    model.config.tie_word_embeddings = False
    if hasattr(model.config, "get_text_config"):
        model.config.get_text_config().tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def _owner(model: nn.Module, parameter: str) -> Any:
    return model.get_submodule(parameter.rpartition(".")[0])


def _module(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
