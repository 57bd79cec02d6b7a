"""What a call of `generate` asks for, and why it cannot have it, before the first token is made.

A recipe that leaves tokens out, or rounds what is remembered, needs a cache of ours: its layers hold different tokens, which
transformers' caches and masks do not know. It is made here, so that a caller never picks one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch

from thresher.errors import ArgumentError
from thresher.recipe import Recipe

from . import windows
from .programs import CACHES, cache_of

_DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
_USUAL = 20  # new tokens, where nobody says how many
_REPLACED = (None, "dynamic", "static", "hybrid", "sliding_window", "hybrid_chunked")


def check_model(model: torch.nn.Module, options: Mapping[str, Any]) -> None:
    """Raise ArgumentError for a model without `generate`, and for a `compile_config`."""
    if not callable(getattr(model, "generate", None)):
        raise ArgumentError(
            "model",
            f"a {type(model).__name__}, which has no generate",
            "a model with generate, such as transformers' ...ForCausalLM",
            "Call the compiled model step by step.",
        )
    if options.get("compile_config") is not None:
        raise ArgumentError("compile_config", type(options["compile_config"]).__name__, "None: this model is compiled",
                            "Leave it out, or call generate of the model itself.")  # fmt: skip


def policy_of(recipe: Recipe) -> Any:
    """How a cache stores what a prompt rewritten by this recipe leaves: a `KVPolicy`; None where any cache will do."""
    from thresher.runtime.kv.policy import KVPolicy

    named = {p.name: p for p in recipe.passes}
    zipvl: Any = named.get("zipvl")
    if zipvl is not None and zipvl.kv == "quantize":
        return KVPolicy(zipvl.keep, zipvl.tau, recent=zipvl.recent, spread=zipvl.spread, seed=zipvl.seed)
    if "transprune" in named or (zipvl is not None and zipvl.kv == "drop"):
        return KVPolicy(bits=None, important=1.0, drop=True)  # as they come
    return None


def argument_of_caches() -> str:
    """What this version of transformers calls the cache among `generate`'s arguments."""
    from transformers import GenerationMixin

    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHES if name in known)


def _lets_others_attend(model: Any) -> bool:
    """Whether transformers lets others do the attention of a model's decoder; its tower is left as it is.

    A class may not say so (`_supports_attention_backend` asks for more, such as a plan for several devices) and yet look its
    attention up where others have put theirs, as Qwen3-Next does.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    both = (model, decoder)
    if any(getattr(one, "_supports_attention_backend", True) is not False for one in both):
        return True
    return hasattr(sys.modules.get(type(decoder).__module__), "ALL_ATTENTION_FUNCTIONS")


class Request:
    """One call's options: given by name, in its generation_config, or in the model's.

    inputs: the prompt, where it was given by position.
    cache: the one to generate with where it must be ours, already in `options`; else None.
    """

    def __init__(self, model: Any, recipe: Recipe | None, options: dict[str, Any], inputs: Any = None):
        self.model, self.options = model, options
        given = (inputs, options.get("inputs"), options.get("input_ids"))
        self.prompt = next((g.shape[1] for g in given if isinstance(g, torch.Tensor) and g.dim() > 1), None)
        self.given = cache_of(options)
        policy = policy_of(recipe) if recipe is not None and not model.config.is_encoder_decoder else None
        self.cache = self._ours(policy)

    def option(self, name: str) -> Any:
        """An option of generation as transformers would find it."""
        places = (self.options.get("generation_config"), getattr(self.model, "generation_config", None))
        found = self.options.get(name)
        for place in places:
            found = getattr(place, name, None) if found is None else found
        return found

    def keep_whole(self, cache: Any, prompt: int) -> None:
        """Have the cache that transformers made for a decoder keep what is behind a window too, where that is little; see
        `windows`. prompt: tokens a row. Drafts that are taken back have a cache that knows of it."""
        if cache is None or self.given is not None or self.model.config.is_encoder_decoder:
            return
        if any(self.option(name) for name in _DRAFTS):
            return
        windows.keep_whole(cache, self.model, self.most(prompt))

    def drafts(self, tokens: torch.Tensor) -> int:
        """How many of a prompt's tokens are drafts, which transformers puts behind the first prompt it runs."""
        if self.prompt is None or not any(self.option(name) for name in _DRAFTS):
            return 0
        return max(0, tokens.shape[1] - self.prompt)

    def most(self, prompt: int) -> int:
        """Tokens that a row may come to have behind a prompt of so many."""
        new = self.option("max_new_tokens")
        if new is not None:
            return prompt + int(new)
        return max(prompt, self.option("max_length") or prompt + _USUAL)

    def _ours(self, policy: Any) -> Any:
        if policy is None and type(self.given).__name__ != "MixedPrecisionCache":
            return None
        from thresher.runtime.kv.cache import MixedPrecisionCache

        cache = self.given
        if not isinstance(cache, MixedPrecisionCache):
            if cache is not None and cache.get_seq_length():
                return None  # nothing is left out behind a past, and all layers hold the same
            if cache is not None:
                raise ArgumentError(
                    "cache",
                    f"an empty {type(cache).__name__}",
                    "None: layers of this recipe hold different tokens, and their cache is made for them",
                    "Leave it out; return_dict_in_generate=True returns it, for a second turn.",
                )
            cache = MixedPrecisionCache(self.model.config, policy)
        self._refuse(cache.policy)
        self.options = {k: v for k, v in self.options.items() if k not in (*CACHES, "cache_implementation")}
        self.options[argument_of_caches()] = cache
        return cache

    def _refuse(self, policy: Any) -> None:
        """Raise ArgumentError for what does not go with a cache of ours."""
        why = "with a recipe that shortens or rounds the cache"
        implementation = self.option("cache_implementation")
        if implementation not in _REPLACED:
            raise ArgumentError(
                "cache_implementation", repr(implementation), f"None {why}, which has a cache of its own",
                "Leave it out.")  # fmt: skip
        if self.option("use_cache") is False:
            raise ArgumentError(
                "use_cache", False, f"True {why}: what was left out once stays out", "Leave it out."
            )
        if self.option("prefill_chunk_size") is not None:
            raise ArgumentError("prefill_chunk_size", self.option("prefill_chunk_size"),
                                f"None {why}: tokens are chosen out of the whole prompt", "Leave it out.")  # fmt: skip
        if self.option("output_attentions"):
            raise ArgumentError("output_attentions", True, f"False {why}: attention is not written out",
                                "Ask the model itself.")  # fmt: skip
        drafts = [name for name in _DRAFTS if self.option(name)]
        if drafts and not policy.lossless:
            raise ArgumentError(
                drafts[0],
                "a draft, parts of which are taken back",
                "None with a cache that rounds or forgets while it generates",
                "Use zipvl={'kv': 'keep'} or 'drop', or transprune alone, whose caches can go back.",
            )
        if not _lets_others_attend(self.model):
            raise ArgumentError(
                "model",
                f"a {type(self.model).__name__}, whose attention transformers does not let others do",
                "a model with transformers' attention interface",
                "Use a recipe without transprune, and without zipvl's kv='quantize' or 'drop'.",
            )
