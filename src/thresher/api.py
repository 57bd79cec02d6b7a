"""The Python ways in: `compile`, `optimize` and `explain`. `torch.compile(backend="thresher")` needs none of them."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from thresher.lowering import catalog as targets
from thresher.passes.calibrate import Calibration, Statistics

from . import backend
from .compat import without_fake_mode
from .compiled import Compiled
from .errors import ArgumentError, ThresherError, unknown_key
from .graph import capture
from .graph.program import Program
from .model_capture import example, shown_to, watching
from .progress import progress
from .recipe import Recipe
from .report import Report
from .strict import check_model, check_plain, compile_strictly

T = TypeVar("T")


def compile(
    model: torch.nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    recipe: Any = None,
    *,
    dynamic: bool | None = None,
    mode: str | None = None,
    target: str = "inductor",
    search: Mapping[str, Any] | None = None,
    **options: Any,
) -> Compiled:
    """Compile a model for inference, verify it on the example, and raise when it cannot be done.

    example_inputs: keyword arguments as a dict, or positional ones as a tuple. A mixed-length batch shows
        padding best. recipe, options: see `Recipe.of`. dynamic, mode: as in torch.compile.
    target: "inductor", "reference" for plain PyTorch, or "tensorrt" for engines with our kernels between them. Options of
        TensorRT's own: build_only="SM120" builds without a GPU, and calls then run the program in PyTorch; profiles, the
        smallest, usual and largest shape of each input, which without it come from the example; builder
        (`lowering.tensorrt.options`).
    search: for recipe="auto", which tries recipes on this example: the arguments of `thresher.find_recipe`, such as
        {"budget": 0.01, "metric": "perplexity", "state": "search.json"}.

    Where `torch.compile(backend="thresher")` would warn and run a graph as it was, this raises.
    """
    check_model(model)
    own = targets.split_options(target, options)
    if recipe == "auto":
        kwargs = example(example_inputs)[1]
        if options or not kwargs:
            raise ArgumentError(
                "recipe",
                "'auto' with options of passes, or with positional example inputs",
                "'auto' alone, with example_inputs as a dict",
                "Pass the search's arguments in search={...}.",
            )
        from .tools import auto

        known = set(inspect.signature(auto.find_recipe).parameters) - {"model", "example_inputs", "target"}
        for key in search or {}:
            if key not in known:
                raise unknown_key("search", key, known)
        recipe = auto.find_recipe(model, kwargs, target=target, **(search or {})).recipe
    return compile_strictly(
        model,
        example_inputs,
        Recipe.of(recipe, **options),
        dynamic=dynamic,
        mode=mode,
        target=target,
        target_options=own,
    )


def optimize(
    recipe: Any = None, *, dynamic: bool | None = None, target: str = "inductor", **options: Any
) -> Callable[[T], T]:
    """A decorator for functions and nn.Module classes: calls are compiled with Thresher.

    target and its own options: as for `compile`.

        @thresher.optimize("exact")
        class Encoder(nn.Module): ...

    A decorated class stays the same class: `isinstance`, `state_dict` and pickling do not change.
    """
    own = targets.split_options(target, options)
    chosen = Recipe.of(recipe, **options)

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(
            function,
            backend=backend.thresher_backend,
            dynamic=dynamic,
            options={"recipe": chosen, "target": target, **own},  # type: ignore[dict-item]
        )

    def decorate(target: T) -> T:
        if isinstance(target, type) and issubclass(target, torch.nn.Module):
            target.forward = functools.wraps(target.forward)(compiled(target.forward))  # type: ignore[method-assign]
            return target
        if isinstance(target, type) or not callable(target):
            raise ArgumentError("@thresher.optimize", repr(target), "a function or a subclass of torch.nn.Module",
                                "Use thresher.compile for a model that exists already.")  # fmt: skip
        return functools.wraps(target)(compiled(target))  # type: ignore[return-value]

    return decorate


@dataclass
class Explanation:
    """What Thresher would do. before, after: the program's text around the passes, for each graph."""

    reports: list[Report] = field(default_factory=list)
    before: list[Program] = field(default_factory=list)
    after: list[Program] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    @property
    def report(self) -> Report:
        return max(self.reports, key=lambda r: r.rewritten)

    def __str__(self) -> str:
        return "\n".join([str(r) for r in self.reports] + [f"not captured: {r}" for r in self.refused])


def explain(
    model: torch.nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    recipe: Any = None,
    **options: Any,
) -> Explanation:
    """A dry run: capture, match, rewrite and report, without building anything.

    Works without a GPU and for a model on the meta device, whose weights do not exist; the passes then
    cannot be verified, and those that read weights say so. The inputs are moved to the model's device.
    """
    check_plain(model)
    args, kwargs = example(example_inputs)
    chosen = Recipe.of(recipe, **options)
    found = Explanation()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    without_values: set[str] = set()
    if device.type == "meta":
        without_values = {n for n, t in _tensors(model) if t.device.type == "meta"}
        model, device = _stand_in(model), torch.device("cpu")

    def look(gm: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        try:
            program, roles = capture.from_dynamo(gm, inputs)
            program.forget_weights(without_values)
            program.mask_name = chosen.mask_name
            with without_fake_mode(), torch.no_grad():
                lengths = backend.real_lengths(program, backend.real_inputs(gm, roles))
                after, report = backend.run_pipeline(program, chosen, None, lengths)
        except ThresherError as reason:
            found.refused.append(str(reason))
        else:
            found.before.append(program)
            found.after.append(after)
            found.reports.append(report)
        return gm.forward

    place = functools.partial(torch.utils._pytree.tree_map_only, torch.Tensor, lambda t: t.to(device))
    shown_to(look, model)(*place(args), **place(kwargs))
    if not found.reports and not found.refused:
        raise ThresherError(
            "Nothing was captured: the model's forward has no tensor operation, or it was compiled before."
        )
    return found


def _tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _stand_in(model: torch.nn.Module) -> torch.nn.Module:
    """A copy on CPU of a model without weights: each tensor is one zero that its strides repeat, so that it
    takes no memory. Dynamo cannot follow every model that makes tensors on the meta device itself."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for named in (module._parameters, module._buffers):
            for name, tensor in named.items():
                if tensor is not None and tensor.device.type == "meta":
                    zero = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    named[name] = torch.nn.Parameter(zero, requires_grad=False) if is_parameter else zero  # type: ignore[assignment]
    return model


def calibrate(
    model: torch.nn.Module, batches: Iterable[Any], recipe: Any = None, *, group: Any = None, **options: Any
) -> Statistics:
    """Run a model over example batches and gather what the recipe's passes need to know.

    batches: each a dict of keyword arguments, or a tuple of positional ones, as the model is called.
    recipe, options: see `Recipe.of`; only passes that need data are asked.
    group: a torch.distributed process group whose ranks hold the same model and each give batches of their own;
        all of them must call, and all get what was gathered together. ThresherError when a pass cannot merge.
    Save the result and name the file where the model is compiled: `compile(..., stats="stats.safetensors")`.
    """
    check_plain(model)
    calibration = Calibration(Recipe.of(recipe, **options))
    watched = shown_to(watching(calibration), model, dynamic=True)
    for batch in progress(batches, "calibrating"):
        args, kwargs = example(batch)
        watched(*args, **kwargs)
    if group is not None:
        calibration.gather(group)
    return calibration.statistics()
