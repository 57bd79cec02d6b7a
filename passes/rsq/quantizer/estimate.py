"""What quantizing a model will take, before it starts: memory by part, time, and bytes written.

Memory is counted from the graph: each step's values at the calibration batches' sizes, its linears' weights and their
Hessian. Time: see `seconds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from thresher.graph.program import Program
from thresher.machine.memory import resident

from ...structure.experts import ExpertSite
from ..config import SCALE_DTYPES, RSQConfig
from . import rounding
from .pieces import Site
from .seconds import READS, hindered, matrices, seconds
from .sizes import Sizes
from .steps import Step

_HESSIAN = 16  # bytes for each of its K x K numbers: the fp32 sum, the fp64 matrix, the fp32 factor
_ROUNDING = 40  # bytes for each weight rounded at a time
_ONE_EXPERT = 48  # the same while one expert's is used: filled up, kept for its report, factored
_CODES = 10  # bytes for each code while one linear's are packed
_ALLOCATOR = 1.15  # what the C library keeps of freed memory, as a factor


_HINDERED = (
    " Threads wait for each other here, which may cost most of that time: other work has the cores, or there are fewer "
    "than torch takes for its own. torch.set_num_threads(1), or OMP_NUM_THREADS=1, may be faster."
)


@dataclass(frozen=True)
class Estimate:
    """parts: bytes held at the widest moment, by what they are. peak: their sum, with what the process holds already.
    model: bytes of the weights. seconds: by the clock, on this machine as it is now. written: bytes of finished layers.
    on_disk: bytes of activations there meanwhile. linears, tokens: how many; each expert's matrix counts. hindered: torch's
    threads wait for each other, since other work has the cores or there are fewer than it takes for its own."""

    parts: Mapping[str, int]
    model: int
    seconds: float
    written: int
    on_disk: int
    linears: int
    tokens: int
    at: str = field(default="")
    hindered: bool = field(default=False)

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        told = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in self.parts.items())
        disk = f", and {self.on_disk / 1e6:.0f} MB of activations on disk meanwhile" if self.on_disk else ""
        return (
            f"Quantizing {self.linears} linears on {self.tokens} tokens: at most {self.peak / 1e6:.0f} MB of memory at "
            f"a time ({told}; the widest moment is {self.at}), about {_clock(self.seconds)} on this machine, "
            f"{self.written / 1e6:.1f} MB of codes written{disk}. The model's weights are {self.model / 1e6:.0f} MB."
            + (_HINDERED if self.hindered else "")
        )


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def estimate(
    sizes: Sizes, steps: Sequence[Step], original: Program, config: RSQConfig, on_disk: bool
) -> Estimate:
    """See the module's docstring. on_disk: activations wait in files, not in memory."""
    runs = 2 if config.follow_original else 1  # of the batches through the layers
    waiting = sizes.waiting(steps) * runs
    drift = 4 if config.follow_original else 0  # bytes for each of the K x K
    moments = [moment for step in steps for moment in _moments(sizes, step, drift)]
    where, widest = max(moments, key=lambda m: sum(m[1].values()), default=("nothing", {}))
    held = {"activations": 0 if on_disk else waiting, **widest}
    parts = {"this process already": resident()}
    parts |= {name: int(size * _ALLOCATOR) for name, size in held.items() if size}
    sites = [site for step in steps for site in step.group]
    model = sum({w.tensor.data_ptr(): w.tensor.nbytes for w in original.weights.values()}.values())
    return Estimate(parts, model, seconds(sizes, steps, config, model, runs), sum(stored(s, config) for s in sites),
                    waiting if on_disk else 0, sum(map(matrices, sites)), sizes.tokens, where, hindered())  # fmt: skip


def _moments(sizes: Sizes, step: Step, drift: int) -> list[tuple[str, dict[str, int]]]:
    """What a step holds beside the waiting batches, moment by moment."""
    program, k = sizes.program, step.group[0].in_features
    one = step.group[0]
    if isinstance(one, ExpertSite):
        return _moments_of_experts(sizes, step, one, drift)
    own = sum(program.weights[s.weight].tensor.nbytes for s in step.group)
    touched = sum(program.weights[n].tensor.nbytes for n in _weights(step.nodes) if n in program.weights)
    largest = max(s.in_features * s.out_features for s in step.group)
    some = min(sum(s.in_features * s.out_features for s in step.group), rounding.rows_at_once(k) * k)
    name = step.group[0].fqn
    return [
        (f"gathering statistics of {name}",
         {"one batch": sizes.working(step), "weights": touched, "Hessian": (4 + drift) * k * k}),
        (f"factoring the Hessian of {name}", {"Hessian": (_HESSIAN + drift) * k * k}),
        (f"rounding {name}",
         {"weights": own, "Hessian": (8 + 4 * drift) * k * k, "rounding": _ROUNDING * some + _CODES * largest}),
    ]  # fmt: skip


def _moments_of_experts(
    sizes: Sizes, step: Step, site: ExpertSite, drift: int
) -> list[tuple[str, dict[str, int]]]:
    """The same where the experts of a mixture are quantised: all their Hessians wait while one is factored and used."""
    k, each = site.in_features, site.in_features * site.out_features
    held = sizes.program.weights[site.weight].tensor
    touched = sum(sizes.program.weights[n].tensor.nbytes for n in _weights(step.nodes))
    waiting = (4 + drift) * site.count * k * k
    some = min(each, rounding.rows_at_once(k) * k)
    written = held.nbytes + 4 * each  # put together from the codes for what comes behind
    return [
        (f"gathering statistics of {site.fqn}",
         {"one batch": sizes.working(step), "weights": touched, "Hessians": waiting}),
        (f"rounding {site.fqn}",
         {"weights": held.nbytes + 4 * each, "Hessians": waiting + _ONE_EXPERT * k * k,
          "rounding": _ROUNDING * some + _CODES * each}),
        (f"reading the codes of {site.fqn}", {"weights": written}),
    ]  # fmt: skip


def _weights(nodes: Sequence[fx.Node]) -> set[str]:
    """Attribute names of the matrices that products among these nodes read; of an embedding only rows are."""
    factors = [n.args[1] for n in nodes if str(n.target) in READS]
    return {str(f.target) for f in factors if isinstance(f, fx.Node) and f.op == "get_attr"}


def stored(site: Site, config: RSQConfig) -> int:
    """Bytes of the codes, scales and zero points of a linear, or of a mixture's experts."""
    rows, k = matrices(site) * site.out_features, site.in_features
    if config.grid == "nvfp4":
        return rows * (k // 2 + k // 16) + 4 * matrices(site)
    bits = config.average_bits or config.bits
    groups = k // config.group_size if config.group_size > 0 else 1
    scale = SCALE_DTYPES[config.scale_dtype].itemsize + (0 if config.symmetric else 1)
    return int(rows * (4 * -(-k * bits // 32) + groups * scale))
