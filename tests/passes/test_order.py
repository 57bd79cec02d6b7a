"""The order in which passes run: one tuple for ours, `before` and `after` for others'."""

import pytest

from thresher.errors import ArgumentError
from thresher.passes import base, catalog
from thresher.passes.order import all_passes, ordered
from thresher.recipe import CONFIGS, PassConfig, Recipe

catalog.load()


@pytest.fixture
def add():
    """Registers passes that run behind and in front of others, by name."""
    added = []

    def register(name, after=(), before=()):
        config = type(f"{name}Config", (PassConfig,), {"name": name})
        body = {
            "name": name, "config_type": config, "after": after, "before": before,
            "match": lambda *_: [], "rewrite": lambda *_: None,
        }  # fmt: skip
        base.register_pass(type(name, (base.Pass,), body))
        added.append(name)

    yield register
    for name in added:
        base.PASSES.pop(name), CONFIGS.pop(name)


def test_ours_run_as_the_catalog_has_them():
    assert tuple(n for n in all_passes() if n in catalog.PASS_MODULES) == catalog.PASS_MODULES
    assert all(base.PASSES[n].after == base.PASSES[n].before == () for n in catalog.PASS_MODULES)


def test_a_recipe_in_any_order_runs_in_the_same():
    given = ("nvfp4", "prepack", "deft", "rsq")
    assert [c.name for c in ordered(Recipe.of({n: True for n in given}))] == [
        "prepack",
        "deft",
        "rsq",
        "nvfp4",
    ]


def test_a_pass_that_asks_for_nothing_runs_last(add):
    add("zz"), add("aa")
    assert all_passes()[-2:] == ["aa", "zz"]


def test_in_front_of_one_of_ours(add):
    add("early", before=("causal_mask",))
    order = all_passes()
    assert order.index("early") == order.index("causal_mask") - 1


def test_between_two_of_ours(add):
    add("middle", after=("transprune",), before=("deft",))
    order = all_passes()
    assert order.index("transprune") < order.index("middle") < order.index("deft")


def test_others_may_name_each_other_from_either_side(add):
    add("first", before=("second",))
    add("second", after=("first",), before=("prepack",))
    assert all_passes()[:3] == ["first", "second", "prepack"]


def test_a_pass_that_is_not_installed_is_no_hindrance(add):
    add("mine", after=("nobody",), before=("prepack", "somebody"))
    assert all_passes()[0] == "mine"


def test_what_cannot_be_had_together_is_refused(add):
    add("odd", after=("deft",), before=("prepack",))
    with pytest.raises(ArgumentError, match=r"deft.*comes behind.*odd|odd.*comes behind.*deft") as raised:
        ordered(Recipe.of(odd=True))
    assert "PASS_MODULES in thresher.passes.catalog" in str(raised.value)


def test_a_number_is_refused():
    config = type("C", (PassConfig,), {"name": "numbered"})
    kind = type("Numbered", (base.Pass,), {"name": "numbered", "order": 35, "config_type": config})
    with pytest.raises(ArgumentError, match=r"Numbered\.order: got 35.*`after` and `before`"):
        base.register_pass(kind)
    assert "numbered" not in CONFIGS


def test_the_class_of_the_options_is_the_one_the_pass_is_generic_over():
    class Config(PassConfig):
        name = "typed"

    class Other(PassConfig):
        name = "other"

    class Typed(base.Pass[Config]):
        name = "typed"

    assert Typed.config_type is Config
    assert type("Below", (Typed,), {}).config_type is Config
    assert type("Chosen", (Typed,), {"config_type": Other}).config_type is Other


def test_a_pass_without_a_class_for_its_options_is_refused():
    with pytest.raises(ArgumentError, match=r"Bare\.config_type: got nothing.*Pass\[ItsConfig\]"):
        base.register_pass(type("Bare", (base.Pass,), {"name": "bare"}))
    assert "bare" not in base.PASSES
