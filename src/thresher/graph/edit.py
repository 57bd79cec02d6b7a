"""The two edits that every rewrite is made of: a call put in front of a node, and a node read instead of another."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from thresher.errors import ThresherError

from .nodes import fake_mode, value


def call_before(
    before: fx.Node,
    target: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    like: fx.Node | None = None,
) -> fx.Node:
    """A call just before a node, with a fake result (`meta["val"]`) that has the dtype and the sizes of the real one.

    like: the node whose module and source line the call is given; `before` unless named.
    """
    keywords = dict(kwargs or {})
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, tuple(args), keywords)
    node.meta = {k: v for k, v in (like or before).meta.items() if k != "val"}
    known, named = torch.utils._pytree.tree_map_only(fx.Node, value, (tuple(args), keywords))
    # torch 2.11's own decompositions of composite operators refuse symbolic sizes; those in Python take them
    with fake_mode(before.graph), enable_python_dispatcher(), torch.no_grad():
        node.meta["val"] = target(*known, **named)
    return node


def replace(old: fx.Node, new: Any, erase: bool = False) -> fx.Node:
    """Let what reads a node read another instead; for an operator of several results, `new` is a tuple of nodes.

    `new` may be computed from `old`: what stands up to it in the graph goes on reading `old`.
    erase: take `old` out of the graph at once, where nothing reads it any more. A pass leaves it, for its later matches
        may point to it, and `Program.clean` drops it; a target, which looks for nodes that are left over, does not.
    Returns the node that gives the result; for several results, the first one's.
    Raises ThresherError where something takes several results all at once, without a `getitem`.
    """
    if not isinstance(new, tuple):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: new < user)
    else:
        for user in list(old.users):
            if user.target is not operator.getitem:
                raise ThresherError(
                    f"{old.name} gives several results, and {user.name} takes them all at once."
                )
            replace(user, new[user.args[1]], erase)  # type: ignore[index]
    if erase and not old.users:
        old.graph.erase_node(old)
    return new[0] if isinstance(new, tuple) else new
