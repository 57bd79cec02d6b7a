"""RSQ from end to end on a program: rotate, weigh tokens, quantise layer by layer.

The linears are handled in graph order, those that read one input together: q, k, v; o; gate and up; down. For
each group the calibration batches are run up to its input, with everything before it already quantised; the
weighted X^T X is gathered, the group is quantised, and the batches go on. One group's statistics and the values that
later nodes read are all that is held.

Each layer is written to its own file when it is done, so that an interrupted run goes on and gives the same codes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from thresher import tensor_files
from thresher.errors import ThresherError
from thresher.graph.program import Program, weights_fingerprint
from thresher.machine.memory import give_back
from thresher.progress import progress
from thresher.reading import reading

from ...structure.experts import ExpertSite
from ...structure.recover import Structure, recover
from ...tokens.owners import Owners
from .. import rewrite as rsq_rewrite
from ..config import RSQConfig
from ..plan import make_plan
from ..shared import calls
from . import again, checks
from . import bits as rsq_bits
from . import codes as rsq_codes
from . import experts as rsq_experts
from . import scores as rsq_scores
from .estimate import Estimate, estimate
from .files import LayerFiles, by_site, stamp_of
from .hessian import HessianError
from .linears import LinearGroup, Made
from .outcome import LinearReport, Outcome
from .pieces import Batch, Piece, Site, pieces, seen_from
from .ranks import ALONE, Ranks
from .sizes import Sizes
from .states import Keeping, States, Values
from .steps import Step, steps
from .sweep import Sweep, bind

# Values held between groups, in hidden states; wider ones are computed again, unless they fit in so many bytes.
_WIDEST_STATE, _ROOM = 2.5, 1 << 30
_ALWAYS = 1e9


class Driver:
    """A program, calibration batches and options, ready to be quantised; made without running the model.

    Raises ThresherError, naming the weight and its file, for values that are no numbers, and where there is no batch.
    """

    def __init__(
        self,
        program: Program,
        batches: Sequence[Batch],
        config: RSQConfig,
        keeping: Keeping | None = None,
        ranks: Ranks = ALONE,
    ):
        if not batches:
            raise ThresherError("There was not a single calibration sequence.")
        self.keeping = keeping = keeping or Keeping()
        checks.check_weights(program, keeping.files)
        self.original, self.config, self.batches = program, config, batches
        self.ranks, self.mine = ranks, ranks.share(batches)
        self.rotated = program.copy()
        self.structure: Structure = recover(self.rotated)
        plan = make_plan(self.rotated, self.structure, config)
        tensor_files.release()
        rsq_rewrite.rotate(self.rotated, plan, lazy=True)
        self.rotated.clean()
        rsq_rewrite.rebind_layers(self.rotated, self.structure)
        self.sweep = Sweep(self.rotated, narrow=keeping.multiplied)
        self.outcome = Outcome(weights_fingerprint(program), config, plan, 0.0)
        self.owners = Owners(self.rotated)
        self.pieces = list(pieces(self.structure, plan, self.sweep.order))
        self.counts = rsq_scores.token_counts([b.tokens for b in batches])
        scorers = {p.name: rsq_scores.scorer(self.rotated, p.layer, config) for p in self.pieces}
        first = self.sweep.start(bind(self.rotated, batches[0].inputs))
        plans = [
            list(steps(self.sweep, self.structure, self.pieces, scorers, first, widest))
            for widest in (_ALWAYS, _WIDEST_STATE)
        ]
        self.sizes = Sizes(self.rotated, self.structure, self.mine or batches[:1], keeping.narrow)
        wide = self.sizes.waiting(plans[0])
        self.steps: list[Step] = plans[0] if keeping.activations == "disk" or wide <= _ROOM else plans[1]

    def estimate(self) -> Estimate:
        """What running it will take; nothing is run but a few small products, for their speed."""
        return estimate(
            self.sizes, self.steps, self.original, self.config, self.keeping.activations == "disk"
        )

    def run(self, prove: bool = True, finish: Callable[[Sweep], None] | None = None) -> Outcome:
        """Quantise. prove, finish: see `quantise_program`."""
        with torch.no_grad():
            folder, stamp = self.keeping.folder, ""
            if folder is not None:
                inputs = [b.inputs for b in self.batches]
                stamp = stamp_of(self.original, self.config.to_json() + self.keeping.changes, inputs)
            self.files = LayerFiles(folder, stamp)
            self.ranks.once(lambda: checks.check_activations(self.original, self.batches[0]))
            if prove:
                self.outcome.exact = self.ranks.once(
                    lambda: checks.check_rotation(self.original, self.rotated, self.batches[0])
                )
            self.later = again.gather_again(self.sweep, self.outcome.plan, self.mine, self.owners)
            self._choose_bits()
            place = folder if self.keeping.activations == "disk" else None
            own = f"-{self.ranks.rank}" if self.ranks.size > 1 else ""
            self.states = States(place, self.keeping.narrow, self.sizes.hidden, f"activations{own}")
            self.follow = self.config.follow_original > 0
            # With the original's weights throughout, where it is followed.
            self.plain = Sweep(self.rotated, narrow=self.keeping.multiplied)
            self.plain_states = States(place, self.keeping.narrow, self.sizes.hidden, f"original{own}")
            try:
                for sweep, states in self._running():
                    states.start(sweep.start(bind(self.rotated, b.inputs)) for b in self.mine)
                for piece in progress(self.pieces, "quantizing", len(self.pieces)):
                    self._piece(piece)
            finally:
                for _, states in self._running():
                    states.close()
            if finish is not None:
                finish(self.sweep)
            return self.outcome

    def _running(self) -> list[tuple[Sweep, States]]:
        """What goes through the layers: the batches behind quantised linears, and the original's where it is followed."""
        both = [(self.sweep, self.states), (self.plain, self.plain_states)]
        return both if self.follow else both[:1]

    def _piece(self, piece: Piece) -> None:
        found = self.ranks.together(lambda: self._load(piece))
        if not all(self.ranks.gather(found is not None)):
            found = None
        self.weights: list[torch.Tensor | None] = []
        for step in (s for s in self.steps if s.piece is piece):
            if found is None:
                self._accept(step, self._quantise(step))  # whose statistics are gone by then
                continue
            self.ranks.together(functools.partial(self._advance, step, None))
            self._accept(step, found)
        if found is None:
            self._save(piece)

    def _choose_bits(self) -> None:
        plan, head = self.outcome.plan, self.structure.head
        sensitivity = self.ranks.once(self._sensitivity) if self.config.average_bits else None
        self.outcome.sensitivity = sensitivity or {}
        self.outcome.bits = rsq_bits.widths(self.pieces, plan, head, self.config, sensitivity)

    def _sensitivity(self) -> dict[str, float]:
        saved = self.files.read("sensitivity")
        if saved is not None:
            return {k: float(v) for k, v in saved[0].items()}
        found = rsq_bits.sensitivities(self.sweep, self.pieces, self.batches, self.config)
        self.files.write("sensitivity", {k: torch.tensor(v) for k, v in found.items()}, {})
        return found

    def _quantise(self, step: Step) -> Made:
        """Codes of the step's linears, by the statistics that all batches give."""
        x, scorer, piece = step.x, step.scorer, step.piece
        gathered = self._group(step.group)
        owner = self.owners.of(x)
        weighed = scorer.targets[0] if scorer is not None and scorer.targets else x
        if step.first:
            self.owner = self.owners.of(weighed)
        raw: list[torch.Tensor] = []

        def collect(index: int, values: Values, plain: Values) -> None:
            batch = self.mine[index]
            if not gathered.finite(values, batch):
                number = index * self.ranks.size + self.ranks.rank
                raise HessianError(
                    f"{gathered.names}: batch {number} of the calibration data reaches it as NaN or infinite values."
                )
            if step.first:
                layers = seen_from(self.owners, weighed, batch, values[weighed])
                scores, weights = rsq_scores.weigh(scorer, values, layers, self.counts, self.config)
                self.weights.append(weights)
                if scores is not None:
                    raw.append(scores)
            # Cross attention reads another tower's tokens, which this layer did not weigh.
            gathered.add(values, plain, self.weights[index] if owner == self.owner else None, batch)

        self.ranks.together(lambda: self._advance(step, collect))
        raw = self.ranks.interleaved(raw)
        if raw:
            self.outcome.importance[piece.name] = torch.cat(raw)
        try:
            made, reports = gathered.quantise(self.sweep, self.outcome.bits[piece.name])
        except HessianError as reason:
            raise HessianError(f"{gathered.names}: {reason}") from None
        self.outcome.reports |= {r.site: r for r in reports}
        return made

    def _group(self, group: Sequence[Site]) -> LinearGroup | rsq_experts.ExpertGroup:
        """What a step gathers, empty."""
        first = group[0]
        if not isinstance(first, ExpertSite):
            later = again.of(group, self.later)  # type: ignore[arg-type]
            return LinearGroup(group, self.owners, self.config, self.ranks, later)  # type: ignore[arg-type]
        shared = rsq_experts.reads_shared(self.sweep, self.structure.experts, first)
        return rsq_experts.ExpertGroup(first, self.owners, self.config, shared, self.ranks)

    def _accept(self, step: Step, made: Made) -> None:
        """From here on the batches see these linears quantised."""
        self.sweep.forget()
        self.plain.forget()
        give_back()
        for site in step.group:
            self._use(site, made[site.fqn])

    def _use(self, site: Site, tensors: dict[str, torch.Tensor]) -> None:
        self.outcome.linears[site.fqn] = tensors
        dtype = self.rotated.weights[site.weight].tensor.dtype
        stands_for = functools.partial(rsq_codes.stands_for, tensors, dtype)
        if isinstance(site, ExpertSite):
            stands_for = functools.partial(rsq_codes.experts_for, tensors, dtype, site.transposed)
        self.sweep.overrides |= {call.weight: stands_for for call in calls(self.outcome.plan, site)}

    def _advance(self, step: Step, collect: Callable[[int, Values, Values], None] | None) -> None:
        """Run every batch up to a step, show the values to `collect`, and keep what later steps read."""
        if collect is None and not step.advances:
            return
        for index in range(len(self.states)):
            found = [w.run(s[index], step.shown | step.live, step.nodes) for w, s in self._running()]
            if collect is not None:
                collect(index, found[0], found[-1])
            if step.advances:
                for (_, states), values in zip(self._running(), found):
                    states[index] = {n: v for n, v in values.items() if n in step.live}
                del found, values
                if self.keeping.activations == "disk":
                    tensor_files.release()

    def _load(self, piece: Piece) -> dict[str, dict[str, torch.Tensor]] | None:
        read = self.files.read(piece.name)
        if read is None:
            return None
        flat, metadata = read
        if "importance" in flat:
            self.outcome.importance[piece.name] = flat.pop("importance")
        found = by_site(flat)
        with reading(self.files.path(piece.name), f"the layer {piece.name}", "Delete the file."):
            for fields in json.loads(metadata["reports"]):
                self.outcome.reports[fields["site"]] = LinearReport(**fields)
            for site in (s for group in piece.groups for s in group):
                held = rsq_codes.shape(found[site.fqn])
                count = [site.count] if isinstance(site, ExpertSite) else []
                shape = (*count, site.out_features, site.in_features)
                if held != shape:
                    raise ThresherError(f"{site.fqn} is {held}, and the model's is {shape}")
        return found

    def _save(self, piece: Piece) -> None:
        """Write a finished layer; from then on its file stands for it, and not memory."""
        if self.keeping.folder is None:
            return
        sites = [s for group in piece.groups for s in group]
        flat = {f"{s.fqn}:{n}": t.contiguous() for s in sites for n, t in self.outcome.linears[s.fqn].items()}
        if piece.name in self.outcome.importance:
            flat["importance"] = self.outcome.importance[piece.name]
        reports = json.dumps([vars(self.outcome.reports[s.fqn]) for s in sites])
        self.ranks.once(lambda: self.files.write(piece.name, flat, {"reports": reports}))
        read = self.files.read(piece.name)
        if read is None:
            return  # another machine's disk
        found = by_site({k: t for k, t in read[0].items() if k != "importance"})
        for site in sites:
            self._use(site, found[site.fqn])


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
    when one cannot be calibrated."""
    return Driver(program, batches, config, Keeping(folder)).run(prove, finish)
