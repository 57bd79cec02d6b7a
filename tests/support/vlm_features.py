"""What else a user asks of `generate`, for one model of `vlm_zoo` and one recipe: each cell says whether it is right.

Beside the model's own `generate` where the recipe is exact. Else beside the plainest way of the same compiled model, made to
say the same tokens (`forced`): greedy, one token a step, in a cache that it makes by itself. `vlm_cases` says that this one
is right. Whatever is raised is what the cell says.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
import vlm_zoo
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer
from vlm_cases import ASKED, NEW, PRUNE, ROWS, ZIP, Case, cache_of, longer

from thresher.compiled import Compiled
from thresher.errors import ThresherError
from thresher.generation.request import argument_of_caches
from thresher.recipe import Recipe

_CUT = dict(PRUNE, stages=((1, 0.5),))
RECIPES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "exact": ("exact", {}),
    "transprune": (None, dict(transprune=_CUT)),
    "zipvl": (None, dict(zipvl=ZIP)),
    "zipvl, quantize": (None, dict(zipvl=dict(ZIP, kv="quantize"))),
    "transprune, nvfp4": (None, dict(transprune=_CUT, nvfp4=dict(min_weights=0, budget=9.0))),
}
ENOUGH = 1e-3  # of the largest logit
HALF = 5e-2  # the same in bf16: a few roundings of eight bits


def holds(said: str) -> bool:
    """Whether a cell is right: equal, or refused with a reason."""
    return said == "equal" or said.startswith(
        ("ArgumentError", "NothingRewrittenError", "not in transformers")
    )


class Forced(LogitsProcessor):
    """Has `generate` say these tokens, int [rows, prompt and new ones]."""

    def __init__(self, sequences: torch.Tensor):
        self.sequences = sequences

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = self.sequences[:, ids.shape[1] : ids.shape[1] + 1]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def _off(ours: Any, expected: Any) -> float:
    """The largest difference of steps' logits, as a share of a row's largest one."""
    return max(
        ((a.float() - b.float()).abs().amax(1) / b.float().abs().amax(1)).max().item()
        for a, b in zip(ours, expected, strict=True)
    )


class Features:
    """One class under one recipe; each method fills one cell."""

    def __init__(self, name: str, recipe: str, case: Case | None = None):
        self.case, self.name = case or Case(name), name
        self.model, self.batch = self.case.model, self.case.batch
        self.preset, self.options = RECIPES[recipe]
        self.exact = self.preset == "exact"
        self.fast = self.make()

    def make(self) -> Any:
        return Compiled(self.model, Recipe.of(self.preset, **self.options), target="reference")

    def cell(self, feature: str) -> str:
        """What `feature`, the name of a method, found: "equal", or what was wrong or raised.

        "not in transformers" where the model itself, uncompiled, raises in that feature.
        """
        try:
            return getattr(self, feature)()
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            if not isinstance(error, ThresherError) and self._own_raises(feature):
                return f"not in transformers: {type(error).__name__}: {first[:200]}"
            return f"{type(error).__name__}: {first[:300]}"

    def _own_raises(self, feature: str) -> bool:
        held = self.fast, self.exact
        self.fast, self.exact = self.model, True
        try:
            getattr(self, feature)()
        except Exception:
            return True
        finally:
            self.fast, self.exact = held
        return False

    # -- features --------------------------------------------------------------------------------------------------------

    def greedy(self) -> str:
        return self._as_plain({})

    def static(self) -> str:
        return self._as_plain(dict(cache_implementation="static"))

    def hybrid(self) -> str:
        return self._as_plain(dict(cache_implementation="hybrid"))

    def sample(self) -> str:
        return self._as_plain(dict(do_sample=True, top_k=20))

    def returned(self) -> str:
        return self._as_plain(dict(do_sample=True, top_k=20, num_return_sequences=2))

    def beams(self) -> str:
        """Of each sequence found, the sum of its tokens' log-probabilities, told by the plainest way."""
        given = {**self.batch, **ASKED, "num_beams": 3, "num_return_sequences": 2, "output_scores": True}
        out = self.fast.generate(**given)
        if self.exact:
            own = self.model.generate(**given)
            same = torch.equal(own.sequences, out.sequences)
            off = (own.sequences_scores - out.sequences_scores).abs().max().item()
            return "equal" if same and off < ENOUGH else f"WRONG, {off:.2g} off"
        off = 0.0
        for each in range(2):
            said = out.sequences[each::2]
            logits = torch.stack(self.forced(self.batch, said), 1).float().log_softmax(-1)
            sums = logits.gather(2, said[:, -NEW:, None]).sum((1, 2)) / NEW
            off = max(off, (sums - out.sequences_scores[each::2]).abs().max().item())
        return "equal" if off < ENOUGH else f"WRONG, {off:.2g} off"

    def lookup(self) -> str:
        return self._assisted(prompt_lookup_num_tokens=2)

    def assistant(self) -> str:
        return self._assisted(assistant_model=self.model)

    def streamer(self) -> str:
        given, heard = self._alone(), Heard()
        out = self.fast.generate(**given, **ASKED, streamer=heard)
        plain = self.fast.generate(**given, **ASKED)
        same = torch.equal(out.sequences, plain.sequences) and heard.tokens == out.sequences[0].tolist()
        return "equal" if same and heard.ended else f"WRONG, it heard {heard.tokens}"

    def right(self) -> str:
        """Rows padded on the right, each as it is alone."""
        given = vlm_zoo.padded_right(self.batch)
        out = self.fast.generate(**given, **ASKED)
        plain = self.fast.generate(**self.batch, **ASKED)
        return self._verdict(out.logits, plain.logits)

    def turn(self) -> str:
        """A second question on the first's cache, beside the same tokens said one by one in one turn."""
        given, name = self.batch, argument_of_caches()
        first = (self.model if self.exact else self.fast).generate(**given, **ASKED)
        further = longer(self.name, given, first.sequences)
        if self.exact:
            expected = self.model.generate(**further, **{name: cache_of(first)}, **ASKED).logits
            first = self.fast.generate(**given, **ASKED)
        second = self.fast.generate(**further, **{name: cache_of(first)}, **ASKED)
        if not self.exact:
            expected = self.forced(given, second.sequences)[-NEW:]
        return self._verdict(second.logits, expected)

    def text(self) -> str:
        """Rows without images behind a call with some: as by a model compiled for them alone."""
        given = vlm_zoo.batch(self.name, self.model, (0, 0))
        self.fast.generate(**self.batch, **ASKED)
        after = self.fast.generate(**given, **ASKED)
        before = (self.model if self.exact else self.make()).generate(**given, **ASKED)
        return self._verdict(after.logits, before.logits)

    def half(self) -> str:
        """A sample of two in bf16, and a second turn; what leaves the model as it is beside fp32, with eager's own error."""
        wide = self.model, self.batch, self.fast
        self.model = copy.deepcopy(self.model).bfloat16()
        self.batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in self.batch.items()}
        self.fast = self.make()
        try:
            found = [self._rounded(*wide[:2]), self.turn()] if self.exact else [self.returned(), self.turn()]
        finally:
            self.model, self.batch, self.fast = wide
        return next((said for said in found if said != "equal"), "equal")

    # -- what they share -------------------------------------------------------------------------------------------------

    def forced(self, given: Any, said: torch.Tensor, model: Any = None) -> list[torch.Tensor]:
        """Logits of each step that leads to `said`, [rows, prompt and new tokens], one token a step; by the compiled model
        where none is given."""
        new = said.shape[1] - given["input_ids"].shape[1]
        asked = {**ASKED, "max_new_tokens": new, "logits_processor": [Forced(said)]}
        asked.pop("suppress_tokens")
        out = (model or self.fast).generate(**given, **asked)
        assert torch.equal(out.sequences, said)
        return list(out.logits)

    def _as_plain(self, more: dict[str, Any]) -> str:
        given = {**self.batch, **ASKED, **more}
        with _seeded():
            out = self.fast.generate(**given)
        if self.exact:
            with _seeded():
                own = self.model.generate(**given)
            same = torch.equal(own.sequences, out.sequences)
            return self._verdict(out.logits, own.logits) if same else "WRONG, other tokens"
        copies = more.get("num_return_sequences", 1)
        for each in range(copies):
            expected = self.forced(self.batch, out.sequences[each::copies])
            said = self._verdict([step[each::copies] for step in out.logits], expected)
            if said != "equal":
                return said
        return "equal"

    def _rounded(self, model: Any, batch: Any) -> str:
        """The logits of a sample of two beside those of the model in fp32, led along the same tokens: off by no more than
        half again what the eager bf16 model is."""
        sampled = dict(do_sample=True, top_k=20, num_return_sequences=2)
        with _seeded():
            out = self.fast.generate(**{**self.batch, **ASKED, **sampled})
        for each in range(2):
            said = out.sequences[each::2]
            true, own = self.forced(batch, said, model), self.forced(self.batch, said, self.model)
            off, allowed = (
                _off([step[each::2] for step in out.logits], true),
                1.5 * _off(own, true) + HALF / 5,
            )
            if off > allowed:
                return f"WRONG, {off:.2g} off where {allowed:.2g} is allowed"
        return "equal"

    def _assisted(self, **draft: Any) -> str:
        given = self._alone()
        out = self.fast.generate(**given, **ASKED, **draft)
        plain = (self.model if self.exact else self.fast).generate(**given, **ASKED)
        same = torch.equal(out.sequences, plain.sequences)
        return "equal" if same else "WRONG, other tokens"

    def _alone(self) -> Any:
        return vlm_zoo.row(self.batch, ROWS, 1)

    def _verdict(self, ours: Any, expected: Any) -> str:
        enough = HALF if self.model.dtype == torch.bfloat16 else ENOUGH
        off = _off(ours, expected)
        return "equal" if off < enough else f"WRONG, {off:.2g} off"


@contextlib.contextmanager
def _seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        yield


COLUMNS = ("greedy", "static", "hybrid", "beams", "returned", "sample", "lookup", "assistant", "streamer", "right",
           "turn", "text", "half")  # fmt: skip
