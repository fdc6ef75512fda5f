"""Projections of the same input joined into one weight."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from optx.ir import replace, tensor_text
from optx.nn.attention import Attention, FusedAttention
from optx.nn.core import FusedGatedMLP, GatedMLP, Linear
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register
from optx.tensor import is_qtensor, lift


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseProjections(PassOptions):
    pass


@register("fuse_projections", axis=Axis.LAYOUT, stage=Stage.LOWER, options=FuseProjections, exact=True)
def fuse_projections(site: Site, part: Attention | GatedMLP, opt: FuseProjections) -> nnx.Module | Skipped:
    """x @ [A | B] = [x @ A | x @ B]: q, k, v become one matmul, gate and up another; x is read once, launches fall.

    Exact: columns keep their scales. Weights stored in different formats stay apart.
    """
    if isinstance(part, FusedAttention | FusedGatedMLP):
        return Skipped("fused already")
    if isinstance(part, GatedMLP):
        joined = join(part.gate, part.up)
        return joined if isinstance(joined, Skipped) else FusedGatedMLP(joined, part.down, activation=part.activation)
    if part.k is None:
        return Skipped("has no k and v projections")
    joined = join(part.q, part.k, part.v)
    return joined if isinstance(joined, Skipped) else FusedAttention(part, joined)


def join(*parts: Linear) -> Linear | Skipped:
    """One Linear with the outputs of all, in order, zeros where one alone has no bias; Skipped when their weights are stored
    differently."""
    weights = [p.weight.get_value() for p in parts]
    if len({jax.tree.structure(w) for w in weights}) > 1:
        return Skipped("stored differently: " + ", ".join(tensor_text(w) for w in weights))
    if len({p.activations for p in parts}) > 1:
        return Skipped("inputs rounded differently: " + ", ".join(str(p.activations) for p in parts))
    each = weights[0].format.block_rows if is_qtensor(weights[0]) else 1
    if any(w.shape[1] % each for w in weights[:-1]):
        return Skipped(f"outputs do not fill their blocks of {each}: " + ", ".join(tensor_text(w) for w in weights))
    outputs = 0 if is_qtensor(weights[0]) else 1  # packed weights keep their outputs first
    changes = {"weight": lift(lambda ws: jax.tree.map(lambda *w: jnp.concatenate(w, axis=outputs), *ws), weights)}
    if biased := [p.bias for p in parts if p.bias is not None]:
        zeros = [jnp.zeros(p.weight.get_value().shape[1], biased[0].get_value().dtype) for p in parts]
        biases = [zero if p.bias is None else p.bias.get_value() for p, zero in zip(parts, zeros, strict=True)]
        changes["bias"] = nnx.Param(lift(jnp.concatenate, biases), axes=biased[0].get_metadata().get("axes"))
    return replace(parts[0], **changes)
