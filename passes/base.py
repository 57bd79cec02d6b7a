"""What a pass is: it matches sites or says why not, and rewrites the matched ones.

A new method is one module with a config class and a Pass:

    @register_pass
    class Mine(Pass[MineConfig]):
        name, after = "mine", ("transprune",)

        def match(self, program, context):            # -> one Match or Miss for each candidate site
        def rewrite(self, program, match, context):   # edits the program's graph

`catalog.py` has the order in which passes run. Only `prepare` and `rewrite` edit; the pipeline holds passes to that.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_args, get_origin

import torch

from thresher.errors import ArgumentError
from thresher.graph.program import Program
from thresher.recipe import PassConfig, Recipe, register
from thresher.report import Miss

if TYPE_CHECKING:
    from .cost.model import CostModel
    from .structure.recover import Structure

__all__ = ["PASSES", "Context", "Declined", "Effect", "Match", "Miss", "Pass", "register_pass"]


@dataclass(frozen=True)
class Effect:
    """What a pass may do to the numbers.

    exact: only rounding changes (another order of summation). It is judged by the rounding of the program itself.
    budget: largest allowed max-norm relative difference of any output on the example inputs; of an exact pass only where
        the recipe says `fixed_budgets`, or where nothing of higher precision can be run.
    """

    exact: bool
    budget: float


EXACT = Effect(exact=True, budget=1e-4)


class Declined(Exception):
    """Raised by `rewrite` where only editing shows that a site cannot be rewritten: why, as a full sentence."""


@dataclass
class Match:
    """A site that can be rewritten.

    site: FQN for the report. data: what `match` found, for `rewrite`. claims: FQNs of the weights whose
    linear this rewrite replaces; a weight can be claimed by one pass only. of_calls: `rewrite` edits nothing, and only sets
    the program's `calls`, so that later calls may get a program of their own; it is no site.
    """

    site: str
    data: Any = None
    claims: tuple[str, ...] = ()
    of_calls: bool = False


C = TypeVar("C", bound=PassConfig)
P = TypeVar("P", bound="Pass[Any]")


@dataclass
class Context(Generic[C]):
    """What the pipeline gives a pass beside the program.

    recipe: the whole recipe. config: this pass's own options.
    structure: the recovered transformer, shared by all passes of one pipeline stage (see passes/structure).
    stats: calibration statistics by pass name, then by site; empty when there are none.
    inputs: example inputs for the program's placeholders as real tensors, or None in a dry run.
    device: where the program will run. notes: sentences to show with the pass's report. What `match` puts there is
        shown in any case; what `rewrite` puts there goes with its edits, and is dropped where these are not kept.
    predicted: time before over time after that the pass expects, by site; the cost model's own replaces it.
    cost: prices nodes and multiplications on the device (see passes/cost); None without a cost model.
    counted: site -> name that its operator counts calls under.
    prepared: what the pass's own `prepare` returned.
    flops: what the layers compute "before" and "after" the pass on the example, for passes that leave tokens out.
    """

    recipe: Recipe
    config: C
    structure: Callable[[], Structure]
    stats: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[Any] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    notes: list[str] = field(default_factory=list)
    predicted: dict[str, float] = field(default_factory=dict)
    counted: dict[str, str] = field(default_factory=dict)
    cost: CostModel | None = None
    prepared: Any = None
    flops: dict[str, float] = field(default_factory=dict)


class Pass(abc.ABC, Generic[C]):
    """One rewrite, of type `Pass[its config class]`. See the module's docstring."""

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()
    """Names of passes behind and in front of which this one runs, where a recipe has them; of `catalog.PASS_MODULES`, and of
    other packages. The passes of Thresher have their places in that tuple and say nothing here."""
    config_type: ClassVar[type[PassConfig]]
    """The class of its options: that of `Pass[...]`, unless a class says another."""
    effect: ClassVar[Effect] = EXACT
    conflicts: ClassVar[Mapping[str, str]] = {}
    """Names of passes that cannot be in the same recipe, each with the reason."""
    extends: ClassVar[frozenset[str]] = frozenset()
    """Names of passes whose claimed linears this one may rewrite again."""
    per_rank: ClassVar[bool] = False
    """Whether each rank of a tensor-parallel model may rewrite its own part: what this pass decides, it decides from
    weights and masks, or alike on every rank."""
    moves_tokens: ClassVar[bool] = False
    """Whether it packs tokens or leaves some out. A program that writes its tokens into tensors of its caller, such as a
    static cache, is then not for it: they have places there."""
    sees_writes: ClassVar[bool] = False
    """Whether such a pass tells by itself which of the program's writes are of tokens it moves, and leaves the rest be."""
    rewrites_weights: ClassVar[bool] = False
    """Whether it is for every matrix of the model: what no site of its stands for is then a Miss too, and its coverage
    counts bytes of weights (see weights.py)."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in cls.__dict__.get("__orig_bases__", ()):
            options = get_args(base)
            if (
                "config_type" not in cls.__dict__
                and get_origin(base) is Pass
                and isinstance(options[0], type)
            ):
                cls.config_type = options[0]

    @abc.abstractmethod
    def match(self, program: Program, context: Context[C]) -> Sequence[Match | Miss]:
        """Look at every candidate site. Must not edit the program: ContractError from the pipeline."""

    @abc.abstractmethod
    def rewrite(self, program: Program, match: Match, context: Context[C]) -> None:
        """Rewrite one matched site in place; dead nodes are removed afterwards."""

    def about(self, done: Sequence[Match], context: Context[C]) -> Sequence[str]:
        """Sentences about these matches, which all were rewritten: what they save together, what they took along."""
        return ()

    def linear_kernels(self, config: C) -> Sequence[str]:
        """Classes of kernels that linears become, as prices name them ("linear.bfloat16", "nvfp4_linear.int8"): where a
        recipe leaves sites that would lose, they are timed once a machine."""
        return ()

    def prepare(self, program: Program, context: Context[C]) -> Any:
        """Edit the program exactly, in place, before any pass of the recipe runs, because a pass that comes earlier
        would take away what this one must see, or because its `match` must see it done. The edits stay also where this
        pass then rewrites nothing. What it returns arrives in `match` as `context.prepared`; None, the default, where
        there is nothing to prepare, and the program is then as it was."""
        return None

    def taps(self, program: Program, context: Context[C]) -> Sequence[Any]:
        """Where this pass needs to see data (`calibrate.Tap`); none for a pass that needs none. Must not edit the
        program, which was prepared."""
        return ()

    def exact(self, context: Context[C]) -> bool:
        """Whether only rounding changes. A pass that gives a budget of its own is judged by that, unless this says else."""
        return self.effect.exact and type(self).budget is Pass.budget

    def budget(self, context: Context[C]) -> float:
        """Largest allowed relative difference; a pass whose budget is an option overrides this."""
        return self.effect.budget


PASSES: dict[str, Pass[Any]] = {}


def register_pass(kind: type[P]) -> type[P]:
    """Make a pass known to recipes by its name. A class decorator."""
    if kind.name in PASSES and type(PASSES[kind.name]).__module__ != kind.__module__:
        raise ArgumentError(
            "name", repr(kind.name), "a pass name not yet taken", "Choose another name for the pass."
        )
    if isinstance(getattr(kind, "order", None), int):
        raise ArgumentError(
            f"{kind.__name__}.order",
            kind.order,  # type: ignore[attr-defined]
            "names of passes in `after` and `before`",
            "Say which passes this one runs behind and in front of.",
        )
    if not hasattr(kind, "config_type"):
        raise ArgumentError(
            f"{kind.__name__}.config_type",
            "nothing",
            "the class of the pass's options, a PassConfig",
            f"Write `class {kind.__name__}(Pass[ItsConfig])`.",
        )
    register(kind.config_type)
    PASSES[kind.name] = kind()
    return kind
