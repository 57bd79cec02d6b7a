"""The `torch.compile` backend: `torch.compile(model, backend="thresher", options={...})`.

It captures Dynamo's graph, runs the recipe's passes, lowers through Inductor, and hands Dynamo a
Session. A graph it cannot take runs as plain Inductor compiles it, and that is said in one warning.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from thresher.kernels import catalog as operators
from thresher.lowering import catalog as targets
from thresher.lowering.providers import provider_notes
from thresher.lowering.reference import Reference
from thresher.lowering.target import Target
from thresher.passes import catalog as passes
from thresher.passes.calibrate import Statistics
from thresher.passes.contain import Containment
from thresher.passes.cost.model import CostModel
from thresher.passes.device import device_for
from thresher.passes.pipeline import Pipeline
from thresher.runtime.artifact.fakes import materialise
from thresher.runtime.artifact.loaded import OnFakes
from thresher.runtime.call_session import CallSession
from thresher.runtime.judge import Judge
from thresher.runtime.session import Session

from . import sessions, side_graphs
from .alike import depth
from .alike.further import Further
from .alike.proof import proven_on_few
from .cache.rewrite_cache import Entry, Kept, later_masks
from .compat import without_fake_mode
from .entry import as_function, real_inputs
from .errors import ThresherError
from .graph import autocast, capture, sharded
from .graph.deepen import Unlike
from .graph.nodes import value
from .graph.program import Program
from .graph.tracing import compiling
from .graph.whole_model import PARTS_SHARE
from .left_alone import as_fault, cannot_rewrite, leave_alone
from .machine import memory
from .notices import disabled, logger, name_of, warn
from .op_checks import watch
from .phases import CAPTURE, PASSES, phase, recorded
from .recipe import Recipe
from .records.certificate import certify
from .report import Report
from .undone import rewrote_nothing

operators.load()
passes.load()


def thresher_backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile a graph from Dynamo.

    options: a recipe (see `Recipe.of`): None, a preset's name under "recipe", or pass options by name.
        "target": "inductor" (default), "reference", "tensorrt" or another in `lowering.catalog`; its own options stand
        beside it. "strict": raise where a graph would be left to plain Inductor, as TensorRT always does.
    mode: torch.compile's mode, handed to Inductor.
    """
    given = dict(options) if isinstance(options, dict) else {} if options is None else {"recipe": options}
    how = {"target": given.pop("target", "inductor"), "strict": given.pop("strict", False)}
    mode = given.pop("mode", None) or mode
    own = targets.split_options(how["target"], given, "options['target']")
    recipe = given.pop("recipe") if isinstance(given.get("recipe"), Recipe) else None
    recipe = Recipe.of(recipe, **given) if recipe is not None else Recipe.of(given or None)
    return compile_graph(gm, example_inputs, recipe, mode=mode, **how, **own)


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    recipe: Recipe,
    *,
    target: str = "inductor",
    mode: str | None = None,
    strict: bool = False,
    **own: Any,
) -> Callable[..., Any]:
    """Compile a graph from Dynamo for a recipe; target, its own options, mode and strict as in `thresher_backend`."""
    if disabled():
        logger.info("THRESHER_DISABLE is set: %s runs as it was written.", name_of(gm))
        return gm.forward
    runtime = targets.runtime(target, "options['target']", lowers=True)
    assert runtime.lower is not None
    if not any(isinstance(example, torch.Tensor) for example in example_inputs):
        return gm.forward  # arithmetic on sizes, between two graph breaks
    lowering = runtime.lower({**dict(recipe.inductor), **own}, mode)
    raises = strict or runtime.alone
    try:
        refuse = cannot_rewrite(gm)
        if refuse is not None:
            raise ThresherError(refuse)
        session, roles, further = build(gm, example_inputs, recipe, lowering, contain=not strict)
    except ThresherError as reason:
        if raises:
            raise
        return leave_alone(gm, example_inputs, target, str(reason))
    except torch._dynamo.exc.TorchDynamoException:
        raise  # Dynamo's own, such as one that has it begin anew
    except Exception as fault:
        said = as_fault(fault)
        if raises:
            raise ThresherError(said) from fault
        return leave_alone(gm, example_inputs, target, said)
    if not strict:
        _say_what_is_undone(gm, session.report)
    return as_function(session, roles, gm, further)


def _say_what_is_undone(gm: fx.GraphModule, report: Report) -> None:
    reason = None if report.rewritten else rewrote_nothing([report])
    said = f"thresher rewrote nothing, and the model runs as plain Inductor compiles it: {reason}"
    say = functools.partial(warn, said, gm) if reason is not None else None
    told = said if side_graphs.tell(gm, bool(report.rewritten), say) else ""
    for dropped in (p.dropped for p in report.passes if p.dropped and p.dropped not in told):
        warn(f"thresher left out a pass. {dropped}", gm)
    for said in dict.fromkeys(n for p in report.passes for n in p.notes if n.startswith("keep=")):
        warn(f"thresher: {said}", gm)


def build(
    gm: fx.GraphModule, example_inputs: Sequence[Any], recipe: Recipe, target: Target, contain: bool = False
) -> tuple[Session, list[str], Further | None]:
    """Capture, rewrite and lower one Dynamo graph; `contain` as in `run_pipeline`. Gives what runs it, what each of the
    graph's arguments is, and what the layers bring that a short model lacks."""
    seconds: dict[str, float] = {}
    with recorded(seconds):
        session, roles, further = _built(gm, example_inputs, recipe, target, contain, seconds)
    report = session.report
    _keep_memory(session.program, report)
    report.emit_trace()
    sessions.remember(session)
    logger.info("%s: %s", name_of(gm), report.summary())
    logger.debug("%s", report)
    return session, roles, further


def _built(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    recipe: Recipe,
    target: Target,
    contain: bool,
    seconds: dict[str, float],
) -> tuple[Session, list[str], Further | None]:
    places = narrow = capture.places_of(gm, example_inputs)
    inputs = few = real_inputs(gm, places.roles)
    call = depth.current()
    further = Further(gm, places, call) if call is not None else None
    if further is not None:
        places = further.widened(places)
        inputs = [*few, *further.inputs()] if few is not None else None
    with without_fake_mode(), torch.no_grad():
        apart = any(map(sharded.is_sharded, places.fakes))  # ranks must check together, or none of them
        entry = None if apart else Entry.of(gm, places, inputs, recipe, target.name)
        kept = entry.find() if entry is not None else None
    if kept is not None:
        kept.report.phases = seconds
        with autocast.suspended():
            session = _session_of(kept, recipe, target, inputs)
    else:
        given = list(narrow.roles)
        with phase(CAPTURE):
            program = short = capture.from_places(gm, narrow)
        if narrow.roles != given:  # a buffer that the model writes to came to be an input
            entry, inputs = None, real_inputs(gm, narrow.roles)
        if further is not None:
            if narrow.roles != given:
                raise Unlike("The model writes to a buffer of its own.")
            program = further.program(short)
        if inputs is not None and program.updates and not apart:
            capture.refuse_shared_writes(program, inputs)
        with without_fake_mode(), torch.no_grad(), autocast.suspended():
            rewritten, report = proven_on_few(
                functools.partial(run_pipeline, contain=contain), short, few, program, inputs, recipe
            )
            report.target, report.phases = target.name, seconds
            report.notes += provider_notes(rewritten)
            if program.part is not None:
                report.notes.append(f"{program.part.where}. {PARTS_SHARE}")
            session = _session(rewritten, program, recipe, target, report)
            session.certificate = certify(program, rewritten, recipe, report)
            session.captured = program
            if entry is not None and not any(p.dropped for p in report.passes):
                entry.keep(program, rewritten, report, session.certificate)
    return session, narrow.roles, further


def _session(rewritten: Program, program: Program, recipe: Recipe, target: Target, report: Report) -> Session:
    """What runs a rewritten program; where a pass decided by the call, calls of another kind get their own."""
    if rewritten.calls is None:
        return Session(rewritten, target, Reference(), report, recipe.freshness)

    def rebuild(choices: Mapping[str, tuple[int, ...] | None], inputs: Sequence[Any]) -> Session:
        passes = [p for p in recipe.passes if choices.get(p.name, ()) is not None]
        for i, config in enumerate(passes):
            if config.name in choices:  # such a config has the option `choice`
                passes[i] = dataclasses.replace(config, choice=choices[config.name])  # type: ignore[call-arg]
        other = dataclasses.replace(recipe, passes=tuple(passes), require=(), verify=False)
        with without_fake_mode(), torch.no_grad(), autocast.suspended():
            again, account = run_pipeline(program, other, inputs, contain=True)
        account.target = target.name
        return _session(again, program, other, target, account)

    return CallSession(rewritten, target, Reference(), report, recipe.freshness, rebuild=rebuild)


def _session_of(kept: Kept, recipe: Recipe, target: Target, inputs: Sequence[Any] | None) -> Session:
    """What runs a program from the cache."""
    other = dataclasses.replace(recipe, require=(), verify=False)
    kept.captured.mask_name = recipe.mask_name
    lengths = real_lengths(kept.captured, inputs)
    layout = kept.program.packing
    if layout.reclassify is not None:

        def again(program: Program) -> Program:
            with without_fake_mode(), torch.no_grad(), autocast.suspended():
                return run_pipeline(materialise(program), other, None, lengths, contain=True)[0]

        layout.reclassify = later_masks(kept.captured, again)
    plain = Reference()
    lowering = OnFakes.around(target)
    session = Session(kept.program, lowering, plain, kept.report, recipe.freshness)
    session.certificate, session.captured = kept.certificate, kept.captured
    return session


def _keep_memory(program: Program, report: Report) -> None:
    """Where a program hands back a cache that the next call continues, keep freed memory for it."""
    handed_back = not program.updates  # else the cache is written in place
    if handed_back and any(p.name == "decode_attention" and p.rewritten for p in report.passes):
        said = memory.keep()
        if said is not None and said not in report.notes:
            report.notes.append(said)


def run_pipeline(
    program: Program,
    recipe: Recipe,
    inputs: Sequence[Any] | None,
    lengths: Sequence[int] | None = None,
    contain: bool = False,
) -> tuple[Program, Report]:
    """Run a recipe over a Program; with real example inputs each pass is verified.

    lengths: real tokens of each row, for the cost model; from the inputs' mask when there are inputs.
    contain: leave out a pass that raises, said in its report, instead of raising ContractError.
    """
    program.mask_name = recipe.mask_name
    known = [value(p) for p in program.placeholders]
    device = next((v.device for v in known if isinstance(v, torch.Tensor)), torch.device("cpu"))
    pipeline = Pipeline(
        recipe,
        inputs=inputs,
        judge=judge_of(program, recipe, inputs) if inputs is not None and recipe.verify else None,
        device=device,
        stats=_statistics(recipe, program),
        cost=CostModel(device_for(device, recipe, program), lengths or real_lengths(program, inputs)),
        faults=Containment(contain),
    )
    with compiling(), watch() as checks, phase(PASSES):
        rewritten, report = pipeline.run(program)
    report.operators = checks
    return rewritten, report


def real_lengths(program: Program, inputs: Sequence[Any] | None) -> list[int] | None:
    """Real tokens of each row, where the inputs have a mask that says so."""
    real = None if inputs is None else program.real_tokens(inputs)
    return None if real is None else [int(n) for n in real.sum(1)]


def judge_of(program: Program, recipe: Recipe, inputs: Sequence[Any]) -> Judge:
    """What judges the passes of a recipe on a captured program, alike on every rank."""
    return Judge(
        program, inputs, Reference(), lambda error: sharded.agreed(error, program), recipe.fixed_budgets
    )


def _statistics(recipe: Recipe, program: Program) -> Mapping[str, Any]:
    """The recipe's saved statistics, refused when they are another model's."""
    if recipe.stats is None:
        return {}
    found = Statistics.load(recipe.stats)
    found.check(program)
    return found
