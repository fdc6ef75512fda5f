"""Low-rank adapters beside a tree's projections, and folded into them (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

from collections.abc import Iterable

import jax.numpy as jnp
from flax import nnx

from optx import ir
from optx.nn.core import Adapter, Linear


def projections(model: nnx.Module) -> list[str]:
    """Paths of the projections that can hold an adapter: those that contract their weight themselves."""
    return [path for path, part in ir.walk(model) if type(part) is Linear]


def adapted(model: nnx.Module, paths: Iterable[str], rank: int, seed: int = 0) -> nnx.Module:
    """A copy of a concrete tree with adapters of `rank` at the projections at `paths`, which change nothing yet.

    What an adapter adds is scaled by 1 / sqrt(rank), so that its rate does not depend on the rank (Kalajdzievski 2023,
    arXiv:2312.03732).
    """
    out, rngs = ir.shallow(model), nnx.Rngs(seed)
    for path in paths:
        linear = ir.get(out, path)
        d, f = linear.weight.get_value().shape
        ir.put(out, path, ir.replace(linear, adapter=Adapter(d, f, rank, scale=rank**-0.5, rngs=rngs)))
    return out


def merged(model: nnx.Module) -> nnx.Module:
    """A copy with W + scale down up for every weight W that has an adapter, and no adapters."""
    out = ir.shallow(model)
    for path, part in ir.walk(model):
        if isinstance(part, Linear) and (adapter := part.adapter) is not None:
            weight = part.weight.get_value()
            added = jnp.matmul(adapter.down.get_value(), adapter.up.get_value(), precision="highest") * adapter.scale
            ir.put(out, path, ir.replace(part, weight=(weight + added).astype(weight.dtype), adapter=None))
    return out
