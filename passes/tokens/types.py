"""What the token passes share: where token types come from, how many tokens may go, and what it saves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thresher import given_tokens
from thresher.graph.call_plan import CallPlan
from thresher.graph.nodes import value
from thresher.graph.program import Program
from thresher.graph.sizes import example_of
from thresher.report import Miss

from ..extract import extract

aten = torch.ops.aten


class NotPrunable(Exception):
    """Why a program is not pruned, as a full sentence."""


@dataclass(frozen=True)
class Types:
    """Where token types come from.

    kind: "types" (a node of integers as `token_types` has), "image" (the [B, n, ...] booleans that say where image
        features go), "ids" (token ids,
        an image token being `image_token`), "extra" (an input of our own, see `thresher.token_types`), "span"
        (columns `span`), or "none". node: its node. padding: a [B, n] padding mask, or None.
    """

    kind: str
    node: fx.Node | None = None
    image_token: int | None = None
    span: tuple[int, int] | None = None
    padding: fx.Node | None = None

    def describe(self) -> str:
        """Where token types come from, as the beginning of a sentence."""
        where = self.node.name if self.node is not None else ""
        return {
            "types": f"token types from {where}",
            "image": f"image tokens from {where}, where the model puts its image features",
            "ids": f"image tokens where {where} is {self.image_token}",
            "extra": "token types from thresher.token_types or the prompt's ids",
            "span": f"image tokens in columns {self.span}",
            "none": "no token is an image's",
        }[self.kind]

    def length(self, values: Sequence[Any], inputs: Sequence[Any]) -> int:
        """Tokens in a row, from what `counts_program` and the caller give."""
        known = [*values, *given_tokens.known(inputs).values()]
        return int(known[0].shape[1]) if known else (self.span or (0, 0))[1]

    def flags(self, env: Mapping[Any, Any], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """image bool [B, n], and pad bool [B, n] or None. like: [B, n, ...]."""
        batch, tokens = like.shape[:2]
        pad = None
        if self.padding is not None:
            pad = env[self.padding] == 0
        if self.kind in ("types", "extra"):
            types = env["token_types" if self.kind == "extra" else self.node]
            image = types > 0
            hidden = types < 0
            pad = hidden if pad is None else pad | hidden
        elif self.kind == "image":
            image = env[self.node].select(-1, 0)
        elif self.kind == "ids":
            image = env[self.node] == self.image_token
        else:
            first, end = self.span or (0, 0)
            columns = torch.arange(tokens, device=like.device)
            image = ((columns >= first) & (columns < end))[None].expand(batch, tokens)
        return (image if pad is None else image & ~pad), pad


def find_types(
    program: Program, config: Any, sizes: Sequence[int], inputs: Sequence[Any] | None, may_come: bool = False
) -> Types:
    """The best source of token types for `sizes` [batch, tokens]. Raises NotPrunable for options that cannot be followed.

    may_come: ids that are at hand are a source also where none of them is an image's, since those of later calls may be.
    """
    sizes = list(sizes)
    named = {
        name: place
        for place, name in zip(program.placeholders, program.input_names)
        if isinstance(value(place), torch.Tensor) and [example_of(s) for s in value(place).shape] == sizes
    }
    padding = named.get(program.mask_name)
    if config.image_span is not None:
        return Types("span", span=tuple(config.image_span), padding=padding)
    ours = given_tokens.told(inputs or ())
    if ours:
        shape = list(ours["token_types"].shape)
        if shape != sizes:
            raise NotPrunable(
                f"thresher.token_types was given {shape}, and the tokens of this call are {sizes}."
            )
        return Types("extra", padding=padding)
    for name in ("token_types", "mm_token_type_ids"):
        if name in named:
            return Types("types", named[name], padding=padding)
    ids = named.get("input_ids") or _ids(program, sizes)
    if config.image_token_id is not None:
        if ids is None:
            raise NotPrunable("image_token_id is given, and the graph has no token ids to compare with it.")
        return Types("ids", ids, config.image_token_id, padding=padding)
    for node in program.nodes(aten.masked_scatter.default):
        image: Any = node.args[1]
        known = value(image)
        if (
            known.dtype == torch.bool
            and known.dim() == 3
            and [example_of(n) for n in known.shape[:2]] == sizes
        ):
            return Types("image", image, padding=padding)
    read = given_tokens.types_by_ids()
    if (
        inputs is not None
        and read is not None
        and list(read.shape) == sizes
        and (may_come or (read > 0).any())
    ):
        return Types("extra", padding=padding)
    return Types("none", padding=padding)


def _ids(program: Program, sizes: Sequence[int]) -> fx.Node | None:
    """The input that the first embedding reads."""
    for node in program.nodes(aten.embedding.default):
        ids = node.args[1]
        if (
            isinstance(ids, fx.Node)
            and ids.op == "placeholder"
            and [example_of(s) for s in value(ids).shape] == list(sizes)
        ):
            return ids
    return None


def embeddings_fed(program: Program) -> dict[int, fx.Node]:
    """Results that are embeddings with image features put in, and where: [B, n, ...] of booleans."""
    found = {}
    for index, node in enumerate(program.outputs):
        if (
            isinstance(node, fx.Node)
            and node.target is aten.masked_scatter.default
            and value(node).dim() == 3
        ):
            found[index] = node.args[1]
    return found  # type: ignore[return-value]


def publish_image(program: Program, fed: Mapping[int, fx.Node]) -> CallPlan:
    """Return those masks too, for the graph that gets the embeddings; see `thresher.token_types`."""
    plan = program.calls or CallPlan()
    for index, mask in fed.items():
        if index in plan.published:  # by another pass
            continue
        image = program.insert(program.output_node, aten.select.int, mask, -1, 0)
        name = f"image.{index}"
        program.output_node.args = ((*program.outputs, image),)
        plan.extra_outputs.append(name)
        plan.published[index] = name
    return plan


def counts_program(program: Program, types: Types) -> Program | None:
    """Computes what `Types.flags` needs from the caller's inputs: [source, padding mask] as far as present."""
    wanted = [n for n in (types.node, types.padding) if n is not None]
    appended = program.calls.extra_inputs if program.calls is not None else []
    own = program.placeholders[: len(program.placeholders) - len(appended)]
    return extract(program, own, wanted) if wanted else None


def types_facts(types: Types) -> dict[str, Any]:
    """What `image_counts` reads of a source of types, as data for a `Rule`."""
    return {
        "kind": types.kind,
        "image_token": types.image_token,
        "span": types.span,
        "source": types.node is not None,
        "padding": types.padding is not None,
    }


def types_from(facts: Mapping[str, Any]) -> Types:
    """The source again, with names in the place of nodes: enough for `image_counts`."""
    source: Any = "source" if facts["source"] else None
    padding: Any = "padding" if facts["padding"] else None
    span = tuple(facts["span"]) if facts["span"] is not None else None
    return Types(facts["kind"], source, facts["image_token"], span, padding)


def _flags(
    types: Types, values: Sequence[Any], inputs: Sequence[Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`Types.flags` of a call, from what `counts_program` gives."""
    values = list(values)
    env: dict[Any, Any] = {n: values.pop(0) for n in (types.node, types.padding) if n is not None}
    if types.kind == "extra":
        env["token_types"] = given_tokens.known(inputs)["token_types"]
    like = next(iter(env.values()), None)
    return types.flags(env, torch.empty(1, (types.span or (0, 0))[1]) if like is None else like)


def image_counts(
    types: Types, values: Sequence[Any], inputs: Sequence[Any]
) -> tuple[list[int] | None, list[int]]:
    """Image and padding tokens of each row; None when nobody says which these are."""
    if types.kind == "extra" and "token_types" not in given_tokens.known(inputs):
        return None, []
    image, pad = _flags(types, values, inputs)
    pads = [0] * image.shape[0] if pad is None else pad.sum(1).tolist()
    return image.sum(1).tolist(), pads


def image_runs(types: Types, values: Sequence[Any], inputs: Sequence[Any]) -> list[list[int]]:
    """Tokens of each image of each row, an image being neighbouring image tokens; where `image_counts` knows them."""
    image = _flags(types, values, inputs)[0]
    found = []
    for row in image.tolist():
        found.append([len(list(same)) for one, same in itertools.groupby(row) if one])
    return found


def whole(site: str, reason: object) -> list[Miss]:
    """The one Miss of a pass that rewrites a program as a whole or not at all. site: "" for the whole program."""
    return [Miss(site or "the whole program", str(reason))]
