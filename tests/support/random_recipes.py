"""Hypothesis strategies of recipes: sensible options of each pass, any options of each pass, and their mixtures."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

from thresher import backend  # noqa: F401  registers the passes
from thresher.recipe import CONFIGS

_some = st.sampled_from
KEEP = _some([(), ("head",), ("first:1",), ("last:1", "head"), ("*down*",)])
BUDGET = st.just(2.0)

# Values under which a pass finds something to do in a model of a few thousand weights. An option that is not named
# here keeps its default; `ODD` below covers every option.
FITTING = {
    "prepack": {
        "min_share": st.just(0.0), "min_gain": _some([0.0, 1.0]), "form": _some(["flat", "flat", "rows"]),
        "capacity": _some([0, 1, 6, 32]), "buckets": _some([0, 0, 2]),
    },
    "deft": {
        "min_bytes": st.just(0), "bmax": _some([1, 8, 64]), "tau": _some([-1.0, 0.0, 0.5, 1.0]),
        "skip_up": st.booleans(), "bits": _some([16, 16, 8, 4]), "approximate": _some([False, False, True]),
        "budget": st.just(0.99),
    },
    "nvfp4": {
        "min_weights": st.just(0), "budget": BUDGET, "keep": KEEP, "sensitive": _some([0.0, 0.0, 0.3]),
        "activations": _some(["exact", "int16", "int8", "nvfp4"]), "search": _some(["none", "mse", "four_over_six"]),
        "mode": _some(["thresher", "te", "torchao", "modelopt", "compressed_tensors"]),
    },
    "bf16": {"min_weights": st.just(0), "emulate": st.just(True), "keep": KEEP, "budget": BUDGET},
    "causal_mask": {},
    "decode_attention": {},
    "rsq": {"bits": _some([2, 4]), "rotate": st.booleans(), "grid": _some(["integer", "nvfp4"])},
}  # fmt: skip


@st.composite
def options(draw, name: str):
    """A pass's options: some of FITTING's, or True where there are none."""
    chosen = {k: draw(v) for k, v in FITTING[name].items()}
    if name == "prepack" and chosen["form"] == "rows":
        chosen["buckets"] = 0
    return chosen or True


@st.composite
def recipes(
    draw, often=("prepack", "deft"), seldom=("nvfp4", "bf16", "causal_mask", "decode_attention", "rsq")
):
    """A recipe as a dict, with options for the whole; each of `often` is in two of three."""
    names = [n for n in often if draw(st.integers(0, 2))] + [n for n in seldom if not draw(st.integers(0, 2))]
    whole = {"fuel": draw(_some([-1, -1, -1, 1, 3])), "min_gain": draw(_some([0.0, 0.0, 0.9]))}
    return {"recipe": "none", **whole, **{n: draw(options(n)) for n in names}}


# Values of every kind, right and wrong ones, for every option there is.
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 200), st.floats(allow_nan=True), st.text(max_size=4),
    _some(["", "head", "exact", "flat", "rows", "int8", "keep", "paper", "given", "none", "auto", "nvfp4", "first"]),
    st.lists(st.one_of(st.integers(-2, 9), st.text(max_size=3), st.floats(0, 1)), max_size=3),
    st.lists(st.tuples(st.integers(-1, 5), st.floats(0, 1.5)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


WHOLE = ("prepak", "fuel", "require", "min_gain", "freshness", "verify", "stats", "inductor")


@st.composite
def any_recipe(draw):
    """Names of passes and options that exist, a few that do not, and values of any kind."""
    found = {}
    for name in draw(st.lists(_some([*CONFIGS, *WHOLE]), unique=True, max_size=4)):
        if name not in CONFIGS:
            found[name] = draw(ODD)
            continue
        fields = [f.name for f in dataclasses.fields(CONFIGS[name])]
        chosen = draw(st.lists(_some([*fields, "min_wieghts"]), unique=True, max_size=3))
        found[name] = (
            {k: draw(ODD) for k in chosen} if chosen else draw(_some([True, False, None, {}, "yes", 3]))
        )
    return found
