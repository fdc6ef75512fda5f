"""Instruction selection: every op call site gets the kernel that runs it, with the reasons of the others; then the tree
is flattened into leaves and a structure that jitted functions merge inside."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from optx import ir, tensor
from optx.cache import CachePlan, CacheSpec
from optx.errors import LoweringError
from optx.pallas import dispatch, late
from optx.pallas.attention import checks
from optx.pallas.dispatch import OpChoice
from optx.target import Target


def lower(model: nnx.Module, target: Target, require: str | None = None) -> nnx.Module:
    """A copy of the tree with the chosen kernel recorded on every module that calls an op, and weights in the order that
    their kernels read.

    require: a backend that every op must use where it has one.
    Raises: LoweringError when no row takes a call site.
    """
    out = choose(model, target, require)
    for _, module in ir.walk(out):
        for choice in getattr(module, "choices", ()):
            if relayout := dispatch.row_of(choice).relayout:
                module.arrange(relayout)
    return out


def choose(model: nnx.Module, target: Target, require: str | None = None) -> nnx.Module:
    """`lower` without a weight touched, so for abstract trees as well: to see which kernels a target would run.

    Raises: LoweringError when no row takes a call site.
    """
    out = ir.shallow(model)
    for _, module in ir.walk(out):
        if hasattr(type(module), "op_sites"):
            module.choices = tuple(dispatch.select(site, target, require) for site in module.op_sites())
    return out


def invariant(model: nnx.Module, target: Target) -> nnx.Module:
    """A copy of a lowered tree whose attention sums in an order that does not depend on the batch; weights stay arranged.

    Raises: LoweringError when no row takes a call site.
    """
    out = ir.shallow(model)
    for _, module in ir.walk(out):
        if hasattr(type(module), "op_sites"):
            sites = {site.op: site for site in module.op_sites()}
            module.choices = tuple(
                dispatch.select(sites[choice.op], target, invariant=True)
                if dispatch.row_of(choice).order == "batch"
                else choice
                for choice in module.choices
            )
    return out


def canonical(model: nnx.Module) -> nnx.Module:
    """A copy of a lowered tree with weights in their canonical packing: what is exported."""
    out = ir.shallow(model)
    for _, module in ir.walk(out):
        if any(dispatch.row_of(choice).relayout for choice in getattr(module, "choices", ())):
            module.arrange(None)
    return out


def check_here(model: nnx.Module) -> None:
    """Raises LoweringError when the tree was lowered to kernels of a device that this machine does not have."""
    here = jax.default_backend()
    for path, choice in choices(model):
        if dispatch.PLATFORMS.get(choice.backend, here) != here:
            raise LoweringError(
                f"{path}: {choice.op} was lowered to {choice}, and this machine runs on {here}; compile with target='auto'"
            )


def choices(model: nnx.Module) -> list[tuple[str, OpChoice]]:
    """(path, choice) of every lowered call site."""
    return [(path, choice) for path, module in ir.walk(model) for choice in getattr(module, "choices", ())]


def explain(model: nnx.Module) -> str:
    """One line a kind of call site: op, how many, the kernel chosen, and why the others declined."""
    groups: dict[OpChoice, list[str]] = {}
    for path, choice in choices(model):
        groups.setdefault(choice, []).append(path)
    lines = []
    for choice, paths in sorted(groups.items(), key=lambda item: item[0].op):
        declined = "".join(f"; {name} declined: {reason}" for name, reason in choice.declined)
        sites = "1 site" if len(paths) == 1 else f"{len(paths)} sites"
        notes = ["weights re-laid once"] if any(_arranged(ir.get(model, path)) for path in paths) else []
        notes += [choice.note] if choice.note else []
        lines.append(f"{choice.op} ({sites}, first {paths[0]}): {', '.join([str(choice), *notes])}{declined}")
    return "\n".join(lines)


def _arranged(module: nnx.Module) -> bool:
    values = (v.get_value() for v in vars(module).values() if isinstance(v, nnx.Variable))
    return any(isinstance(value, tensor.Arranged) for value in values)


@dataclasses.dataclass(frozen=True)
class Program:
    """A lowered model as flat leaves plus the structure to merge them back: what jitted functions take.

    An `nnx.State` argument costs milliseconds of flattening a call; a tuple of arrays costs microseconds.
    """

    leaves: tuple[jax.Array, ...]
    graph: nnx.GraphDef
    treedef: jax.tree_util.PyTreeDef
    plan: CachePlan
    context: int  # longest sequence, tokens
    vocab: int  # token ids are below it
    draft: CacheSpec | None = None  # what the model's MTP module remembers; None: it has none

    @classmethod
    def of(cls, model: nnx.Module) -> "Program":
        graph, state = nnx.split(model)
        leaves, treedef = jax.tree.flatten(state)
        vocab = model.embed.table.get_value().shape[0]
        draft = model.draft.cache if model.draft is not None else None
        return cls(tuple(leaves), graph, treedef, model.cache_plan(), model.context, vocab, draft)

    def merge(self, leaves) -> nnx.Module:
        return nnx.merge(self.graph, jax.tree.unflatten(self.treedef, leaves))

    checkified = staticmethod(checks.checkified)  # what traces a step whose page tables are checked
    traced = staticmethod(late.overlapped)  # what traces one that runs as no CUDA graph

    @functools.cached_property
    def forward(self):
        """jitted (leaves, tokens int32[B, T], counts int32[B]) -> float32[B, T, V]."""
        return jax.jit(lambda leaves, tokens, counts: self.merge(leaves)(tokens, counts))

    def logits(self, tokens) -> jax.Array:
        """tokens int32[B, T] -> float32[B, T, V]; T is padded to a bucket, so nearby lengths share a program."""
        tokens = jnp.asarray(tokens, jnp.int32)
        batch, length = tokens.shape
        size = bucket(length)
        padded = jnp.pad(tokens, ((0, 0), (0, size - length)))
        return self.forward(self.leaves, padded, jnp.full((batch,), length, jnp.int32))[:, :length]


def bucket(n: int, least: int = 16) -> int:
    """The smallest power of two >= n, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())
