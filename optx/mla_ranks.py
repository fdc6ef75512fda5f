"""Ranks of MLA by layer, read off calibration text and fixed in a recipe."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx

from optx import ir, pipeline, registry
from optx.calibrate import Feed
from optx.errors import RecipeError
from optx.passes.head_moments import moments
from optx.passes.mla import Mla, Sizes, sizes_of, spectrum
from optx.recipe import Recipe
from optx.registry import Site

Measured = Mapping[str, tuple[Mla, Sizes, np.ndarray]]  # site -> its rule, sizes and spectrum


def resolved(model: nnx.Module, recipe: Recipe, text: Sequence[np.ndarray], *, energy: float | None = None) -> Recipe:
    """`recipe` with its rules of `mla` replaced by one a layer, whose rank is fixed: shapes then need no text.

    energy None: the numbers that the rules' kv_cut leaves to all layers go where the text has most in them, as shares of what a
    layer holds; else each layer keeps the least rank that holds this share. model: with weights, as the pass meets it; text:
    windows int32[1, T]. Raises RecipeError for a recipe that changes the model before, and for energy outside (0, 1].
    """
    if recipe.structure:
        raise RecipeError("recipe.structure: ranks are read off the model itself; compile these passes first")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"energy {energy:g}; allowed: above 0, 1 at most")
    measured = _measured(model, recipe, text)
    ranks = _by_budget(measured) if energy is None else _by_energy(measured, energy)
    fixed = [
        dataclasses.replace(rule, match=path, rank=ranks[path], kv_cut=None) for path, (rule, *_) in measured.items()
    ]
    others = [options for options in recipe.attention if not isinstance(options, Mla)]
    return dataclasses.replace(recipe, attention=(*others, *fixed))


def _measured(model: nnx.Module, recipe: Recipe, text: Sequence[np.ndarray]) -> Measured:
    pass_ = registry.by_name("mla", "ranks")
    rules = tuple((f"recipe.attention[{i}]", o) for i, o in enumerate(recipe.attention) if isinstance(o, Mla))
    feed, found, layers = Feed(model, text), {}, len(model.layers)
    for prefix in ("embed", *(f"layers/{i}" for i in range(layers))):
        block = ir.get(model, prefix)
        for path, _, rule in pipeline.matches(block, pass_, rules, prefix):
            attn, full = ir.get(block, path), f"{prefix}/{path}"
            if attn.cache.share is None:
                seen = feed.collect(block, prefix, [path], frozenset({"inputs"}))[full]
                held = moments(Site(path=full, layers=layers, seen=seen), attn, rule.least != "weights", "mla")
                sizes = sizes_of(attn, rule, f"mla at {full}")
                found[full] = (rule, sizes, spectrum(attn, rule, sizes, held))
        feed.advance(block, prefix)
    return found


def _by_energy(measured: Measured, energy: float) -> dict[str, int]:
    shares = {path: np.cumsum(held) / held.sum() for path, (*_, held) in measured.items()}
    return {path: min(int(np.searchsorted(x, energy - 1e-12)) + 1, len(x)) for path, x in shares.items()}


def _by_budget(measured: Measured) -> dict[str, int]:
    """Each layer has one number, the others go to the largest shares that are left."""
    budget = sum(sizes.rank for _, sizes, _ in measured.values()) - len(measured)
    shares = [(share, path) for path, (*_, held) in measured.items() for share in held[1:] / held.sum()]
    ranks = dict.fromkeys(measured, 1)
    for _, path in sorted(shares, reverse=True)[:budget]:
        ranks[path] += 1
    return ranks
