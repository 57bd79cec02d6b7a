"""Rotates what attention compresses hidden states into (MLA): exact, since an RMS norm without weight commutes with it.

The linear that makes a latent takes R^T on those of its rows, the norm's weight goes into the linears that read the
latent, and these take R. Not where a cache holds the latent, since it would leave the graph rotated.
"""

from __future__ import annotations

import torch
from torch import fx

from thresher.graph.nodes import value
from thresher.report import Miss

from ..structure.pattern import described, is_cast
from ..structure.recover import AttentionSite, LinearSite, NormSite, Structure
from ..structure.sites import Latent
from ..structure.views import Unviewable, feature_rows, is_view
from .config import RSQConfig
from .edits import RotationPlan
from .rotation import rotation
from .stream import NotRotatable, scaled_by_number

aten = torch.ops.aten
LATENT_SEED = 4  # added to the seed
CACHED = (
    "A cache holds it in the place of keys and values, and would hold it rotated. latents='all' rotates it too, for "
    "use_cache=False alone."
)


def plan_latents(structure: Structure, site: AttentionSite, config: RSQConfig, plan: RotationPlan) -> None:
    """Plan the rotation of an attention's latents, or a Miss for each that cannot be rotated."""
    for latent in site.latents:
        if config.latents == "none":
            return
        try:
            if latent is site.kv_latent and config.latents != "all":
                raise NotRotatable(CACHED)
            norm = _its_norm(latent)
            readers = _readers(structure, norm)
            taken = [
                s.fqn for s in readers if plan.edit(s).norm is not None or plan.edit(s).reads is not None
            ]
            if taken or plan.edit(latent.down).heads_out is not None:
                raise NotRotatable(
                    f"{(taken or [latent.down.fqn])[0]} is rotated for something else already."
                )
        except NotRotatable as reason:
            plan.missed.append(Miss(f"{latent.down.fqn} (rotation of the latent that it makes)", str(reason)))
            continue
        r = rotation(len(latent.rows), config.seed + LATENT_SEED, config.rotation)
        plan.latents.append((norm, r))
        down = plan.edit(latent.down)
        down.heads_out, down.rows, down.latent_out = r, latent.rows[None], True
        for reader in readers:
            edit = plan.edit(reader)
            edit.norm, edit.reads, edit.latent_in = norm, r, True


def _its_norm(latent: Latent) -> NormSite:
    """The norm between the two linears, behind which alone the latent is read. Raises NotRotatable."""
    norm, down = latent.norm, latent.down
    if norm is None:
        raise NotRotatable(
            "No norm stands between the two linears of the latent, and only normalised ones are rotated."
        )
    if norm.kind != "rms":
        raise NotRotatable(
            f"{norm.fqn} is a layer norm, which subtracts a mean, and only RMS norms commute with a rotation."
        )
    rows = set(latent.rows.tolist())
    stack: list[tuple[fx.Node, list[fx.Node]]] = [(down.output, [])]
    while stack:
        node, steps = stack.pop()
        held = _rows_in(latent, steps)
        for user in node.users:
            if user in norm.nodes or (is_cast(user) and all(u in norm.nodes for u in user.users)):
                continue
            if (
                not isinstance(value(user), torch.Tensor) and user.op == "call_function"
            ):  # a split, whose parts are views
                stack += [(part, [*steps, part]) for part in user.users]
            elif is_view(user) and _rows_in(latent, [*steps, user]) is not None:
                stack.append((user, [*steps, user]))
            elif held is None or rows & held:
                raise NotRotatable(f"The latent is read before {norm.fqn} too, by {_said(user)}.")
    return norm


def _rows_in(latent: Latent, steps: list[fx.Node]) -> set[int] | None:
    """Which of the first linear's features these views hold; None where that is not clear."""
    down = latent.down
    try:
        return set(feature_rows(down.output, down.out_features, steps).tolist())
    except Unviewable:
        return None


def _readers(structure: Structure, norm: NormSite) -> list[LinearSite]:
    """The linears that a normalised latent goes into. Raises NotRotatable when something else reads it."""
    by_x: dict[fx.Node, list[LinearSite]] = {}
    for site in structure.linears:
        by_x.setdefault(site.x, []).append(site)
    found: list[LinearSite] = []
    stack = [norm.output]
    while stack:
        node = stack.pop()
        sites = by_x.get(node, [])
        found += sites
        entered = {site.node for site in sites} | {a for s in sites for a in s.node.all_input_nodes}
        for user in node.users:
            if user in entered:
                continue
            if user.op == "output":
                raise NotRotatable(
                    f"The latent behind {norm.fqn} leaves the graph, as a cache holds it, and would come out rotated."
                )
            if not (is_cast(user) or scaled_by_number(user) or _keeps_width(user)):
                raise NotRotatable(
                    f"The latent behind {norm.fqn} is read by {_said(user)}, and not by linears alone, as where a cache "
                    "continues it."
                )
            stack.append(user)
    return found


def _keeps_width(node: fx.Node) -> bool:
    """A reshape of other dimensions than the last."""
    if node.target not in (aten.reshape.default, aten.unsqueeze.default, aten.contiguous.default):
        return False
    before, after = value(node.args[0]).shape, value(node).shape
    return isinstance(after[-1], int) and after[-1] == before[-1]


def _said(node: fx.Node) -> str:
    return "the graph's outputs" if node.op == "output" else described(node)
