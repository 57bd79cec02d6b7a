"""Recipes: which passes run, and how each is set up.

A recipe is a frozen value. Two equal recipes are equal Python objects, so `torch.compile` does not
recompile for a recipe it has seen, and a recipe's fingerprint names an artifact. It comes from a
preset's name, keyword options, a dict, or a TOML file; a word it does not know is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from . import option_types, recipe_toml
from .errors import ArgumentError, unknown_key


@dataclasses.dataclass(frozen=True)
class PassConfig:
    """Options of one pass. Subclasses are frozen dataclasses with defaults for every field."""

    name: ClassVar[str] = ""

    def validate(self) -> None:
        """Raise ArgumentError for values that the types alone do not exclude."""

    def one_of(self, **known: Iterable[str]) -> None:
        """For `validate`: each of these options is one of the words beside it."""
        for option, words in known.items():
            if getattr(self, option) not in words:
                raise unknown_key(f"{self.name} {option}", getattr(self, option), words)

    def within(self, low: float, high: float, *options: str) -> None:
        """For `validate`: each of these options is from `low` to `high`; NaN is not, and None is the default."""
        for option in options:
            given = getattr(self, option)
            if given is not None and not low <= given <= high:
                span = f"{low:g} or more" if high == float("inf") else f"{low:g} to {high:g}"
                raise ArgumentError(
                    f"{self.name} option {option}", given, span, "Leave it out for the default."
                )

    def at_least(self, **least: int) -> None:
        """For `validate`: each of these options is no less than the number beside it."""
        for option, number in least.items():
            if getattr(self, option) < number:
                raise ArgumentError(
                    option, getattr(self, option), f"at least {number}", "Leave it out for the default."
                )


CONFIGS: dict[str, type[PassConfig]] = {}


def register(config: type[PassConfig]) -> type[PassConfig]:
    """Make a pass's options known to recipes. A class decorator."""
    CONFIGS[config.name] = config
    return config


FRESHNESS = ("sample", "check", "repack", "trust")
MASK_NAME = "attention_mask"
"""What models call the input that marks real tokens, unless an option says another name."""

# What a preset switches on; docs/recipes.md says for whom each is. `exact` is what a bare `backend="thresher"`
# means: rewrites that need no calibration data and change nothing but rounding. 0.97 allows for the cost
# model's error: a rewrite that is expected to change nothing is not worth a note. `bf16` takes fp32 linears that no
# other pass has, where the machine was measured to multiply them faster so.
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"prepack": True, "decode_attention": True},
    "none": {},
    "embed": {"prepack": True, "deft": True, "bf16": True, "min_gain": 0.97},
    "serve-throughput": {"causal_mask": True, "prepack": True, "decode_attention": True, "deft": True, "bf16": True,
                         "min_gain": 0.97},
    "serve-latency": {"prepack": True, "decode_attention": True, "deft": True, "nvfp4": {"activations": "int16"},
                      "bf16": True, "min_gain": 0.97},
    "serve-bf16": {"prepack": True, "decode_attention": True, "deft": True, "bf16": True, "min_gain": 0.97},
    "edge-cpu": {"prepack": True, "decode_attention": True, "deft": True, "nvfp4": {"activations": "int8"},
                 "bf16": True, "min_gain": 0.97},
    "blackwell": {"prepack": True, "nvfp4": {"activations": "nvfp4"}},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A list of pass options and a few for the whole.

    passes: options of each pass that runs; the pipeline puts them in their declared order.
    freshness: what a call does when a weight changed after compiling. "sample" (default) uses the new values and
        recomputes anything packed from them, said in the counters. Writes through `p.data.mul_(...)` leave no trace
        for it: so it also compares some values of weights in the main memory now and then, in at most 0.5 % of the
        time; a write to a few elements, or on a GPU, may go unseen. "check" and "repack" leave that out; "trust"
        never looks.
    require: least share of candidate sites that a pass must rewrite, by pass name, 0 to 1; else CoverageError.
    verify: judge each pass's program on the example inputs and batches made from them, and roll back a failing one.
    fixed_budgets: judge exact passes by a fixed largest change on the example (1e-4), not by the model's own rounding.
    fuel: rewrite at most this many sites in all; -1 is no limit. For bisection.
    inductor: options for Inductor itself, as `torch.compile(options=...)` takes them.
    min_gain: leave sites whose speed, rewritten, the cost model expects to be below this, 1.0 being the speed they
        have; 0 leaves none, since some rewrites are for memory.
    stats: path of saved calibration statistics, for the passes that need them.
    """

    passes: tuple[PassConfig, ...] = ()
    freshness: str = "sample"
    require: tuple[tuple[str, float], ...] = ()
    verify: bool = True
    fuel: int = -1
    min_gain: float = 0.0
    inductor: tuple[tuple[str, Any], ...] = ()
    stats: str | None = None
    fixed_budgets: bool = False

    def __post_init__(self) -> None:
        option_types.check("option", self)
        # a recipe is a value: in what order it was written is no part of it
        for name, key in (
            ("passes", lambda c: c.name),
            ("require", lambda e: e[0]),
            ("inductor", lambda e: e[0]),
        ):
            object.__setattr__(self, name, tuple(sorted(getattr(self, name), key=key)))
        if self.freshness not in FRESHNESS:
            raise unknown_key("freshness", self.freshness, FRESHNESS)
        for name, share in self.require:
            if name not in CONFIGS:
                raise unknown_key("require", name, CONFIGS)
            if not 0 <= share <= 1:
                raise ArgumentError(
                    f"require[{name!r}]", share, "a share from 0 to 1", "Use 0.9 for nine sites in ten."
                )
        if self.min_gain < 0:
            raise ArgumentError(
                "min_gain", self.min_gain, "0 or more", "1.0 leaves alone what is expected to become slower."
            )
        if self.inductor:
            option_types.check_inductor(dict(self.inductor))
        for config in self.passes:
            option_types.check(f"{config.name} option", config)
            config.validate()

    @property
    def mask_name(self) -> str:
        """What the caller calls the input that marks real tokens, from the pass that has the option `mask`."""
        return next((c.mask for c in self.passes if hasattr(c, "mask")), MASK_NAME)

    def config(self, name: str) -> PassConfig | None:
        """The options of a pass by its name; None where the recipe does not run it."""
        return next((c for c in self.passes if c.name == name), None)

    def fingerprint(self) -> str:
        """Hash of everything in the recipe; equal recipes have equal fingerprints in every process."""
        text = json.dumps(_plain(self.to_dict()), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """The dict that `Recipe.of` turns back into this recipe."""
        result: dict[str, Any] = {c.name: dataclasses.asdict(c) for c in self.passes}
        if not result:
            result["recipe"] = "none"  # a dict that names no pass means "exact"
        for field in dataclasses.fields(self):
            if field.name == "passes":
                continue
            current = getattr(self, field.name)
            if current != field.default:
                result[field.name] = dict(current) if field.name in ("require", "inductor") else current
        return result

    def to_toml(self, folder: str | os.PathLike[str] = ".") -> str:
        """A TOML file in `folder` that `Recipe.of` turns back into this recipe: a path in it is seen from there."""
        given = self.to_dict()
        if self.stats is not None:
            given["stats"] = os.path.relpath(self.stats, folder)
        return recipe_toml.write(given)

    @classmethod
    def of(
        cls, spec: Recipe | str | Path | Mapping[str, Any] | PassConfig | None = None, **options: Any
    ) -> Recipe:
        """Build a recipe.

        spec: a recipe, a preset's name, the path of a `.toml` file, a dict, one pass's options, or None for
            the preset "exact". A dict may name a base preset under "recipe".
        options: single settings on top: `prepack=True`, `nvfp4={"mode": "te"}`, `freshness="trust"`.
        """
        _load_passes()
        if isinstance(spec, Recipe):
            return spec if not options else cls.of({**spec.to_dict(), **options})
        if isinstance(spec, PassConfig):
            return cls.of({spec.name: dataclasses.asdict(spec)}, **options)
        if isinstance(spec, Mapping):
            merged = {**spec, **options}
        elif spec is None:
            merged = dict(options)
        elif str(spec).endswith(".toml"):
            merged = {"recipe": os.fspath(spec), **options}
        else:
            merged = {"recipe": str(spec), **options}
        return _from_dict(merged)


def _from_dict(spec: Mapping[str, Any], files: tuple[str, ...] = ()) -> Recipe:
    """files: those that led here, each named as another's base."""
    spec = dict(spec)
    names_a_pass = any(k in CONFIGS for k in spec)
    base = spec.pop("recipe", None)
    if base is None:
        base = "none" if names_a_pass else "exact"
    if str(base).endswith(".toml"):
        if str(base) in files:
            raise ArgumentError("recipe", f"{base!r}, which is its own base", "a preset or another file",
                                "Change its line `recipe = ...`.")  # fmt: skip
        path = Path(base)
        given = recipe_toml.read(path)
        with recipe_toml.named(path):
            _from_dict(given, (*files, str(base)))  # what is wrong in the file is said of the file
        return _from_dict({**given, **spec}, (*files, str(base)))
    if base not in PRESETS:
        raise _no_preset(str(base))
    spec = {**PRESETS[base], **spec}
    settings = {f.name for f in dataclasses.fields(Recipe)} - {"passes"}
    passes: list[PassConfig] = []
    rest: dict[str, Any] = {}
    for key, given in spec.items():
        if key in CONFIGS:
            config = _config(key, given)
            if config is not None:
                passes.append(config)
        elif key in ("require", "inductor"):
            if not isinstance(given, Mapping):
                raise ArgumentError(
                    key, repr(given), "a dict, in TOML a table", f"Write {key}={{...}} or [{key}]."
                )
            rest[key] = tuple(sorted((k, _tuples(v)) for k, v in given.items()))
        elif key in settings:
            rest[key] = os.fspath(given) if isinstance(given, os.PathLike) else given
        else:
            raise unknown_key("options", key, [*CONFIGS, *settings, "recipe"])
    return Recipe(passes=tuple(passes), **rest)


@functools.cache
def _load_passes() -> None:
    """Make the passes of this package known; what else must load them would be a recipe's first word."""
    importlib.import_module("thresher.passes.catalog").load()


def _config(name: str, given: Any) -> PassConfig | None:
    kind = CONFIGS[name]
    if given is False:
        return None
    if given is True:
        return kind()
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise ArgumentError(
            name, repr(given), "True, False or a dict of options", f"Write {name}={{...}} or {name}=True."
        )
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in given:
        if key not in fields:
            raise unknown_key(f"{name} option", key, fields)
    return kind(**{k: _tuples(v) for k, v in given.items()})


def _plain(value: Any) -> Any:
    """With numbers that are equal written alike: 1.0 as 1."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _no_preset(name: str) -> ArgumentError:
    """The error for a recipe's name that is no preset's; some words name something else."""
    known = "a preset or a TOML file; presets are " + ", ".join(sorted(PRESETS))
    if name in CONFIGS:
        return ArgumentError(
            "recipe", f"{name!r}, a pass", known, f"Write {name}=True, or [{name}] in a TOML file."
        )
    if name == "auto":
        return ArgumentError("recipe", "'auto', which needs a model and data to search on", known,
                             'Use thresher.compile(model, batch, "auto"), or thresher.find_recipe(..., '
                             'output="mine.toml") and that file.')  # fmt: skip
    return unknown_key("recipe", name, PRESETS)
