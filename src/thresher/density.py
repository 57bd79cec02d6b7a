"""Training MLPs to be sparse: the density loss of DEFT (arXiv 2402.01911), ReLU swaps, and metrics.

    model = thresher.relufy(model)                      # GELU and SiLU are never exactly zero; ReLU is
    density = thresher.density_loss(model, weight=1.0)
    for batch in batches:
        loss = model(**batch).loss + density()          # the penalty of the forward pass just run
        loss.backward(); optimizer.step(); optimizer.zero_grad()
    density.remove()
    print(thresher.activation_density(model, held_out))

The penalty of one MLP is mean(h^2 / (h^2 + eps)) over real tokens and neurons, h being what the down
projection reads (for gated MLPs the product): a smooth count of nonzero activations. Pad tokens
count neither in the loss nor in the metrics. MLPs are found by the same structure recovery as the
rewrite uses, on a copy of the model without storage, so any unmodified model works, and one wrapped in
PEFT adapters: their low-rank branches are switched off in that copy.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import capture
from .errors import ArgumentError, ThresherError
from .passes.deft_sites import site_names, widest
from .passes.structure import recover
from .program import module_fqn

EPS = 1e-2
_NAMES_AN_ACTIVATION = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "dense_act_fn",
    "activation",
)


@dataclass(frozen=True)
class Mlp:
    """One MLP of a model. down: FQN of its last linear's module. activation: its name.

    activation_module: FQN of the module that computes the activation. width: neurons.
    """

    fqn: str
    down: str
    activation: str
    activation_module: str
    width: int


def mlps(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> list[Mlp]:
    """The MLPs of a model, in the order they run; a module that runs twice is named once.

    example_inputs: keyword arguments of one forward pass; a Hugging Face model brings its own.
    """
    inputs = example_inputs if example_inputs is not None else getattr(model, "dummy_inputs", None)
    if inputs is None:
        raise ArgumentError(
            "example_inputs", None, "a dict of keyword arguments of one forward pass",
            "This model has no dummy_inputs of its own; pass a batch.",
        )  # fmt: skip
    shadow = _without_storage(model)
    given = {k: v.to("meta") for k, v in dict(inputs).items() if isinstance(v, torch.Tensor)}
    given.pop("labels", None)
    if (
        "attention_mask" in inspect.signature(model.forward).parameters and "input_ids" in given
    ):  # without a mask models look for pads by value
        given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    with torch.no_grad(), _adapters_off(shadow):
        program = capture.from_export(torch.export.export(shadow, (), given, strict=False))
    structure = recover(program)
    sites, _ = widest(structure.mlps)  # an adapter's linear beside the down projection reads the same value
    found: dict[str, Mlp] = {}
    for m, name in site_names(sites).items():
        down = m.down.weight_fqn.removesuffix(".weight")
        found.setdefault(
            down, Mlp(name, down, m.activation, module_fqn(m.activation_node), m.down.in_features)
        )
    if not found:
        raise ThresherError(
            "No MLP was found in this model: none of its linears feeds an activation and another linear. Adapters "
            "other than LoRA inside an MLP hide it; find the MLPs before wrapping it."
        )
    return list(found.values())


def _without_storage(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose tensors have shapes only; quantized linears become plain ones."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        )
    shadow = copy.deepcopy(model, memo)
    for module in shadow.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # a cache among the results is one more thing to trace
        for name, child in list(module.named_children()):
            packed = getattr(child, "weight", None)
            sizes = getattr(child, "in_features", 0), getattr(child, "out_features", 0)
            if hasattr(packed, "quant_state") or (
                isinstance(packed, torch.Tensor) and packed.dtype in _PACKED
            ):
                plain = nn.Linear(*sizes, bias=getattr(child, "bias", None) is not None, device="meta")
                setattr(module, name, plain)
    return shadow.eval()


_PACKED = (torch.uint8, torch.int8, torch.int32)


def _adapters_off(model: nn.Module) -> Any:
    disable = getattr(model, "disable_adapter", None)
    return disable() if callable(disable) else contextlib.nullcontext()


class Watch:
    """Shows the hidden activations of a model's MLPs, with a mask of real tokens, as forward passes run.

    see: called with (site, h [..., F], real: bool of h's leading shape or None).
    """

    def __init__(self, model: nn.Module, sites: Sequence[Mlp], see: Callable[[str, torch.Tensor, Any], None]):
        self._signature = inspect.signature(model.forward)
        self._masks: dict[str, Any] = {}
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for site in sites:
            module = model.get_submodule(site.down)
            self._handles.append(module.register_forward_pre_hook(self._reader(site, see)))

    def begin(self) -> None:
        """A forward pass starts; for subclasses."""

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._signature.parameters, args)) | kwargs
        labels = given.get("labels")
        self._masks = {"": given.get("attention_mask"), "decoder": given.get("decoder_attention_mask")}
        if self._masks["decoder"] is None and isinstance(labels, torch.Tensor):
            self._masks["decoder"] = labels != -100
        self.begin()

    def _reader(self, site: Mlp, see: Callable[[str, torch.Tensor, Any], None]) -> Callable[..., None]:
        of_decoder = "decoder" in site.fqn.split(".")

        def read(_: nn.Module, args: tuple[Any, ...]) -> None:
            see(site.fqn, args[0], self._real(args[0], of_decoder))

        return read

    def _real(self, h: torch.Tensor, of_decoder: bool) -> torch.Tensor | None:
        """The mask that fits, or None. With a cache, the mask is longer than the new tokens: its end counts."""
        wanted = [self._masks.get("decoder")] if of_decoder else []
        for mask in (*wanted, self._masks.get("")):
            if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or h.dim() < 2:
                continue
            rows, width = h.shape[0], h.shape[1] if h.dim() == 3 else 0
            if h.dim() == 2 and mask.numel() == rows:  # tokens were flattened (OPT before transformers 4.50)
                return mask.reshape(-1).bool()
            if h.dim() == 3 and mask.shape[0] == rows and mask.shape[1] >= width:
                return mask[:, mask.shape[1] - width :].bool()
        return None


class DensityLoss(nn.Module):
    """The penalty to add to a task's loss. Call it after the model's forward pass; see `density_loss`."""

    def __init__(self, model: nn.Module, sites: list[Mlp], eps: float, weight: float, layers: Any):
        super().__init__()
        self.layers: torch.Tensor
        self.sites, self.eps, self.weight = sites, eps, weight
        self._learned = layers == "learned"
        if self._learned:
            device = next(model.parameters()).device
            self.logits = nn.Parameter(torch.zeros(len(sites), device=device))
        else:
            self.register_buffer("layers", torch.as_tensor(layers, dtype=torch.float32), persistent=False)
        self._terms: dict[str, list[torch.Tensor]] = {}
        self._watch = Watch(model, sites, self._see)
        self._watch.begin = self._terms.clear  # type: ignore[method-assign]

    def _see(self, site: str, h: torch.Tensor, real: torch.Tensor | None) -> None:
        self._terms.setdefault(site, []).append(soft_density(h, real, self.eps))

    def layer_weights(self) -> torch.Tensor:
        """What each MLP's term counts, fp32 [sites], their mean being 1."""
        if self._learned:
            return self.logits.softmax(0) * len(self.sites)
        return self.layers * (len(self.sites) / self.layers.sum())

    def per_layer(self) -> dict[str, float]:
        """The last forward pass's terms before any weight, by MLP."""
        return {s: float(torch.stack(t).detach().mean()) for s, t in self._terms.items()}

    def forward(self) -> torch.Tensor:
        if not self._terms:
            raise ThresherError("The density loss was asked for before a forward pass of its model.")
        weights = self.layer_weights()
        total = None
        for index, site in enumerate(self.sites):
            terms = self._terms.get(site.fqn)
            if terms:
                term = torch.stack(terms).mean() * weights[index].to(terms[0].device)
                total = term if total is None else total + term.to(total.device)
        assert total is not None
        return self.weight * total / len(self.sites)

    def remove(self) -> None:
        """Take the hooks out of the model."""
        self._watch.remove()


def soft_density(h: torch.Tensor, real: torch.Tensor | None, eps: float) -> torch.Tensor:
    """mean(h^2 / (h^2 + eps)) over real tokens and neurons, fp32. h [..., F]; real: bool of its leading shape."""
    squares = h.float().square()
    share = squares / (squares + eps)
    if real is None:
        return share.mean()
    kept = real.to(share.dtype)
    return (share.mean(-1) * kept).sum() / kept.sum().clamp_min(1)


def density_loss(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None = None,
    *,
    eps: float = EPS,
    weight: float = 1.0,
    layers: Sequence[float] | str | None = None,
    only: Sequence[str] | None = None,
) -> DensityLoss:
    """Watch a model's MLPs and give the density penalty of each forward pass.

    eps: where the smooth count of h is one half is sqrt(eps). The paper's 1e-7 reaches activations below 0.01
        only; 1e-2 also moves larger ones, and GELU and SiLU need it.
    weight: of the penalty in the sum; a plain number, which a schedule may set on the result at any time.
    layers: what each MLP counts: numbers in the order of the MLPs, or "learned" for weights that are trained
        (softmax, mean 1): give `density.parameters()` to the optimizer then. None counts all alike.
    only: FQNs of the MLPs to watch, as `thresher.explain` names them; None for all.
    example_inputs: one batch, to find the MLPs with; a Hugging Face model brings its own.

    Works for full fine-tuning and with PEFT, whichever of the model's parameters are trained. Where dropout lies
    between activation and down projection (T5), the penalty sees its zeros.
    """
    if eps <= 0:
        raise ArgumentError("eps", eps, "above 0", "The default is 1e-2; the paper uses 1e-7.")
    sites = mlps(model, example_inputs)
    if only is not None:
        known = [s.fqn for s in sites]
        for name in only:
            if name not in known:
                raise ArgumentError(
                    "only", repr(name), f"MLPs of this model: {', '.join(known)}", "Use those names."
                )
        sites = [s for s in sites if s.fqn in only]
    if layers is None:
        layers = [1.0] * len(sites)
    elif layers != "learned" and (
        isinstance(layers, str) or len(layers) != len(sites) or min(layers) < 0 or not sum(layers)
    ):
        raise ArgumentError(
            "layers", repr(layers), f"'learned', or {len(sites)} numbers of which none is negative and one is positive",
            "One number for each MLP, in order.",
        )  # fmt: skip
    return DensityLoss(model, sites, eps, weight, layers)


def _are_weights(layers: Any, count: int) -> bool:
    return not isinstance(layers, str) and len(layers) == count and min(layers) >= 0 and sum(layers) > 0


def relufy(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> nn.Module:
    """Swap the activation of every MLP for ReLU, in place; the model's config says so too. Returns the model.

    The model must be fine-tuned afterwards. Raises ThresherError for an activation that is no module of its own.
    """
    sites = [s for s in mlps(model, example_inputs) if not s.activation.startswith("relu")]
    if not sites:
        return model
    hidden = [s for s in sites if not isinstance(_swappable(model, s), nn.Module)]
    if hidden:
        raise ThresherError(
            f"{hidden[0].fqn} computes its {hidden[0].activation} in its own forward, where it cannot be swapped. "
            "Build the model with a ReLU in its config instead."
        )
    for site in sites:
        owner, _, name = site.activation_module.rpartition(".")
        setattr(model.get_submodule(owner), name, nn.ReLU())
    for config in _configs(getattr(model, "config", None)):
        for name in _NAMES_AN_ACTIVATION:
            if isinstance(getattr(config, name, None), str):
                setattr(config, name, "relu")
        if isinstance(getattr(config, "feed_forward_proj", None), str):
            config.feed_forward_proj = "gated-relu" if "gated" in config.feed_forward_proj else "relu"
    return model


def _swappable(model: nn.Module, site: Mlp) -> nn.Module | None:
    """The activation's module, when it is one that holds nothing else."""
    try:
        module = model.get_submodule(site.activation_module)
    except AttributeError:
        return None
    return module if site.activation_module and not any(True for _ in module.parameters()) else None


def _configs(config: Any) -> Iterator[Any]:
    if config is not None:
        yield config
        for name in getattr(config, "sub_configs", {}):
            yield from _configs(getattr(config, name, None))


@dataclass
class Density:
    """How dense one MLP's activations are at real tokens: shares of neurons, 0 to 1.

    exact: nonzero. above: |h| over each threshold. union: nonzero for any of so many unrelated tokens.
    """

    tokens: int
    exact: float
    above: dict[float, float] = field(default_factory=dict)
    union: dict[int, float] = field(default_factory=dict)


def activation_density(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    thresholds: Sequence[float] = (),
    unions: Sequence[int] = (4, 16),
    example_inputs: Mapping[str, Any] | None = None,
) -> dict[str, Density]:
    """Measure the MLPs' density over batches, by MLP; the model runs in its present mode without gradients.

    thresholds: also report the share of |h| above these. unions: also report, for groups of so many real tokens
    drawn at random from a batch (decoding serves unrelated sequences together), the share on for any of them.
    """
    counts: dict[str, dict[Any, list[float]]] = {}
    random = torch.Generator().manual_seed(0)

    def see(site: str, h: torch.Tensor, real: torch.Tensor | None) -> None:
        rows = h.detach()[real] if real is not None else h.detach().reshape(-1, h.shape[-1])
        sums = counts.setdefault(site, {})

        def add(key: Any, on: torch.Tensor) -> None:
            entry = sums.setdefault(key, [0.0, 0.0])
            entry[0] += float(on.float().sum())
            entry[1] += on.numel()

        on = ~(rows == 0)  # a NaN is on
        add("exact", on)
        sums.setdefault("tokens", [0.0, 1.0])[0] += len(rows)
        for t in thresholds:
            add(("above", t), ~(rows.abs() <= t))
        shuffled = on[torch.randperm(len(on), generator=random).to(on.device)]
        for k in unions:
            groups = len(on) // k
            add(("union", k), shuffled[: groups * k].view(groups, k, -1).any(1))

    if example_inputs is None and not hasattr(model, "dummy_inputs"):
        batches = list(batches)
        example_inputs = batches[0] if batches else None
    watch = Watch(model, mlps(model, example_inputs), see)
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        watch.remove()
    if not counts:
        raise ThresherError("There was not a single batch to measure density on.")
    return {site: _shares(sums) for site, sums in counts.items()}


def _shares(sums: dict[Any, list[float]]) -> Density:
    def share(key: Any) -> float:
        return sums[key][0] / sums[key][1] if sums[key][1] else float("nan")

    found = Density(int(sums["tokens"][0]), share("exact"))
    for key in sums:
        if isinstance(key, tuple):
            (found.above if key[0] == "above" else found.union)[key[1]] = share(key)
    return found
