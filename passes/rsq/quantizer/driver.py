"""RSQ from end to end on a program: rotate, weigh tokens, quantise layer by layer.

The linears are handled in graph order, those that read one input together: q, k, v; o; gate and up; down. For
each group the calibration batches are run up to its input, with everything before it already quantised; the
weighted X^T X is gathered, the group is quantised, and the batches go on from there. One group's statistics
and, per batch, the values that later nodes read are all that is held.

Each layer is written to its own file when it is done, so that an interrupted run goes on where it was and
gives the same codes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from thresher.errors import ThresherError
from thresher.graph.program import Program, weights_fingerprint
from thresher.reading import reading
from thresher.report import progress

from ...structure.recover import LinearSite, Structure, recover
from ...tokens.owners import Owners
from .. import rewrite as rsq_rewrite
from ..config import RSQConfig
from ..plan import make_plan
from . import bits as rsq_bits
from . import codes as rsq_codes
from . import scores as rsq_scores
from .files import LayerFiles, stamp_of
from .gptq import Hessian, HessianError, factor, gptq, round_to_nearest
from .outcome import LinearReport, Outcome, report
from .pieces import Batch, Piece, pieces, seen_from
from .sweep import Sweep, Values, bind, exactness

EXACT = 1e-9
_WIDEST_STATE = 2.5  # values held between groups, in hidden states; wider ones are computed again
_CHECK_TOKENS = 64


def quantise_program(
    program: Program,
    batches: Sequence[Batch],
    config: RSQConfig,
    folder: Path | None = None,
    finish: Callable[[Sweep], None] | None = None,
    prove: bool = True,
) -> Outcome:
    """Quantise a program's linears on calibration batches. See the module's docstring.

    folder: where finished layers are written and looked for; None keeps nothing. finish: given the rotated
        program with all linears quantised, ready to run (for evaluation without compiling). prove: compare the
        rotated program with the original in fp64 first; False where the same rotation was proved before.
    Raises ThresherError when the rotated program differs from the original, HessianError (naming the linear)
    when one cannot be calibrated.
    """
    with torch.no_grad():
        run = _Run(program, batches, config, folder)
        outcome = run.go(prove)
        if finish is not None:
            run.states.clear()
            finish(run.sweep)
        return outcome


class _Run:
    def __init__(self, program: Program, batches: Sequence[Batch], config: RSQConfig, folder: Path | None):
        self.config, self.batches = config, batches
        self.original = program
        self.rotated = program.copy()
        self.structure: Structure = recover(self.rotated)
        plan = make_plan(self.rotated, self.structure, config)
        self.bad_weights = [m for m in plan.missed if "NaN or infinite" in m.reason]
        rsq_rewrite.rotate(self.rotated, plan, lazy=True)
        self.rotated.clean()
        rsq_rewrite.rebind_layers(self.rotated, self.structure)
        self.sweep = Sweep(self.rotated)
        self.outcome = Outcome(weights_fingerprint(program), config, plan, 0.0)
        stamp = stamp_of(program, config.to_json(), [b.inputs for b in batches]) if folder is not None else ""
        self.owners = Owners(self.rotated)
        self.files = LayerFiles(folder, stamp)
        self.pieces = list(pieces(self.structure, plan, self.sweep.order))
        self.counts = rsq_scores.token_counts([b.tokens for b in batches]) if batches else None

    def go(self, prove: bool = True) -> Outcome:
        if self.bad_weights:
            raise ThresherError(" ".join(f"{m.site}: {m.reason}" for m in self.bad_weights))
        if not self.batches:
            raise ThresherError("There was not a single calibration sequence.")
        if prove:
            self.outcome.exact = self._check_rotation()
        self._choose_bits()
        self.states: list[Values] = [self.sweep.start(bind(self.rotated, b.inputs)) for b in self.batches]
        targets = [group[0].x for piece in self.pieces for group in piece.groups]
        done = 0
        for piece in progress(self.pieces, "quantizing", len(self.pieces)):
            found = self._load(piece)
            self.weights: list[torch.Tensor | None] = []
            for group in piece.groups:
                done += 1
                if found is None:
                    self._quantise(piece, group, targets[done:])
                else:
                    self._advance(group[0].x, targets[done:], None)
                    self._accept(group, found)
            if found is None:
                self._save(piece)
        return self.outcome

    def _check_rotation(self) -> float:
        """fp64 error of the rotated program on one short sequence; raises above EXACT."""
        inputs = bind(self.original, self.batches[0].inputs, (1, _CHECK_TOKENS))
        error = exactness(self.original, self.rotated, inputs)
        if not error <= EXACT:
            raise ThresherError(
                f"The rotated model differs from the original by {error:.1e} of its output in fp64, and {EXACT:.0e} is "
                "allowed: the recovered structure must be wrong. Use rotate=False, rotate_heads=False and "
                "rotate_down=False, and please report the model."
            )
        return error

    def _choose_bits(self) -> None:
        names = {s.fqn: piece for piece in self.pieces for g in piece.groups for s in g}
        if not self.config.average_bits:
            self.outcome.bits = {p.name: self.config.bits for p in self.pieces}
            return
        saved = self.files.read("sensitivity")
        if saved is not None:
            sensitivity = {k: float(v) for k, v in saved[0].items()}
        else:
            sensitivity = rsq_bits.sensitivities(self.sweep, self.pieces, self.batches, self.config)
            self.files.write("sensitivity", {k: torch.tensor(v) for k, v in sensitivity.items()}, {})
        sizes = dict.fromkeys((p.name for p in self.pieces), 0)
        for site in self.outcome.plan.quantise:
            sizes[names[site.fqn].name] += site.in_features * site.out_features
        self.outcome.sensitivity = sensitivity
        self.outcome.bits = rsq_bits.allocate(sensitivity, sizes, self.config.average_bits)

    def _quantise(self, piece: Piece, group: Sequence[LinearSite], later: Sequence[fx.Node]) -> None:
        x = group[0].x
        hessian = Hessian.empty(group[0].in_features)
        first, owner = not self.weights, self.owners.of(x)
        scorer = rsq_scores.scorer(self.rotated, piece.layer, self.config) if first else None
        weighed = scorer.targets[0] if scorer is not None and scorer.targets else x
        if first:
            self.owner = self.owners.of(weighed)
        raw: list[torch.Tensor] = []

        def collect(index: int, values: Values) -> None:
            batch = seen_from(self.owners, x, self.batches[index], values[x])
            if first:
                layers = seen_from(self.owners, weighed, self.batches[index], values[weighed])
                scores, weights = rsq_scores.weigh(scorer, values, layers, self.counts, self.config)
                self.weights.append(weights)
                if scores is not None:
                    raw.append(scores)
            same = (
                owner == self.owner
            )  # cross attention reads another tower's tokens, which this layer did not weigh
            hessian.add(*rsq_scores.rows_of(values[x], self.weights[index] if same else None, batch.real))

        self._advance(x, later, collect, scorer.targets if scorer is not None else ())
        if raw:
            self.outcome.importance[piece.name] = torch.cat(raw)
        names = ", ".join(s.fqn for s in group)
        try:
            matrix = hessian.matrix()
            factored = factor(matrix, self.config.damping, self.config.activation_order)
        except HessianError as reason:
            raise HessianError(f"{names}: {reason}") from None
        bits = self.outcome.bits[piece.name]
        grid = rsq_codes.make_grid(self.config, bits)
        stacks = [[s] for s in group] if self.config.grid == "nvfp4" else [list(group)]
        made: dict[str, dict[str, torch.Tensor]] = {}
        for stack in stacks:
            originals = [self.sweep.weight(s.weight).float() for s in stack]
            weight = torch.cat(originals)
            if not bool(torch.isfinite(weight).all()):
                raise ThresherError(f"{names}: the weights are NaN or infinite after rotation.")
            exact_grid = self.config.method == "nearest"
            found = round_to_nearest(weight, grid) if exact_grid else gptq(weight, factored, grid)
            at = 0
            for site, mine in zip(stack, originals):
                rows = rsq_codes.Rows(at, len(mine))
                made[site.fqn] = rsq_codes.to_tensors(found, rows, self.config, bits)
                values = found.values[at : at + len(mine)]
                size = self.rotated.weights[site.weight].tensor.element_size()
                self.outcome.reports[site.fqn] = report(
                    site.fqn, mine, values, matrix, factored.damping, made[site.fqn], self.config, size
                )
                at += len(mine)
        self._accept(group, made)

    def _accept(self, group: Sequence[LinearSite], made: Mapping[str, dict[str, torch.Tensor]]) -> None:
        """From here on the batches see these linears quantised."""
        self.sweep.forget()
        for site in group:
            tensors = self.outcome.linears[site.fqn] = made[site.fqn]
            dtype = self.rotated.weights[site.weight].tensor.dtype
            self.sweep.overrides[site.weight] = functools.partial(_stands_for, tensors, dtype)

    def _advance(
        self, x: fx.Node, later: Sequence[fx.Node], collect: Any, beside: Sequence[fx.Node] = ()
    ) -> None:
        """Run every batch up to x, show the values to `collect`, and keep what later nodes read.

        A state that would be too wide is not kept: the batches stay where they are.
        """
        known = set(self.states[0])
        nodes = self.sweep.needed([x, *beside], known)
        reached = set(nodes) | known
        after = self.sweep.needed(later, reached - set(beside))
        live = {a for n in after for a in n.all_input_nodes if a in reached and a.op != "get_attr"}
        live |= {t for t in [x, *later] if t in reached}
        advance = _width(live) <= _WIDEST_STATE * _width(self._hidden()) if collect or nodes else True
        if collect is None and not advance:
            return
        for index, state in enumerate(self.states):
            values = self.sweep.run(state, {x, *beside, *live}, nodes)
            if collect is not None:
                collect(index, values)
            if advance:
                self.states[index] = {n: v for n, v in values.items() if n in live}

    def _hidden(self) -> set[fx.Node]:
        if self.structure.layers:
            return {self.structure.layers[0].input}
        return {self.pieces[0].groups[0][0].x}

    def _load(self, piece: Piece) -> dict[str, dict[str, torch.Tensor]] | None:
        read = self.files.read(piece.name)
        if read is None:
            return None
        flat, metadata = read
        if "importance" in flat:
            self.outcome.importance[piece.name] = flat.pop("importance")
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in flat.items():
            fqn, _, part = key.rpartition(":")
            found.setdefault(fqn, {})[part] = tensor
        with reading(self.files.path(piece.name), f"the layer {piece.name}", "Delete the file."):
            for fields in json.loads(metadata["reports"]):
                self.outcome.reports[fields["site"]] = LinearReport(**fields)
            for site in (s for group in piece.groups for s in group):
                held, shape = rsq_codes.values(found[site.fqn]), (site.out_features, site.in_features)
                if tuple(held.shape) != shape:
                    raise ThresherError(f"{site.fqn} is {tuple(held.shape)}, and the model's is {shape}")
        return found

    def _save(self, piece: Piece) -> None:
        sites = [s.fqn for group in piece.groups for s in group]
        flat = {f"{s}:{n}": t.contiguous() for s in sites for n, t in self.outcome.linears[s].items()}
        if piece.name in self.outcome.importance:
            flat["importance"] = self.outcome.importance[piece.name]
        reports = json.dumps([vars(self.outcome.reports[s]) for s in sites])
        self.files.write(piece.name, flat, {"reports": reports})


def _stands_for(tensors: rsq_codes.Tensors, dtype: torch.dtype) -> torch.Tensor:
    return rsq_codes.values(tensors).to(dtype)


def _width(nodes: set[fx.Node]) -> int:
    """Features that these nodes hold for each token; what has no token dimensions is not counted."""
    total = 0
    for node in nodes:
        known = node.meta.get("val")
        if isinstance(known, torch.Tensor) and known.is_floating_point() and known.dim() >= 2:
            last = known.shape[-1]
            lead = int(known.shape[1]) if known.dim() == 4 and isinstance(known.shape[1], int) else 1
            total += int(last) * lead if isinstance(last, int) else 0
    return total
