"""A tree of weights through a recipe with random token ids as calibration text, block by block as `compile` does it."""

import numpy as np
from flax import nnx

from optx import ir, pipeline
from optx.calibrate import Feed
from optx.legality import Guard
from optx.recipe import Recipe


def windows(tree: nnx.Module, count: int = 4, length: int = 32, seed: int = 0) -> list[np.ndarray]:
    """int32[1, length] each."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, tree.embed.table.get_value().shape[0], (1, length), dtype=np.int32) for _ in range(count)]


def through(tree: nnx.Module, recipe: Recipe, text=None) -> tuple[nnx.Module, list[pipeline.Record]]:
    """The tree after all passes, and their records. text: windows; None: random ones."""
    planned, records = pipeline.run(ir.abstract(tree), recipe, [Guard(recipe)])
    feed, out = Feed(planned[-1], windows(tree) if text is None else text), ir.shallow(tree)
    for prefix in ("embed", *(f"layers/{i}" for i in range(len(tree.layers))), "norm"):
        ir.put(out, prefix, pipeline.apply_block(ir.get(tree, prefix), prefix, recipe, planned, records, feed))
    return out, records
