"""Calibration text on its way through a model that is being compressed, block by block.

`Feed` holds what enters the next block: the output of its predecessors as they are after all their passes, so that a pass sees
the errors that were made before it. One block and one buffer of activations are in memory. Statistics are sums over all
tokens, taken in float32 while the block runs on the buffer; only what the recipe's passes ask for is taken.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import ir
from optx.cache import Ragged, View
from optx.errors import PassError
from optx.nn.core import Linear
from optx.nn.moe import GroupedLinear
from optx.registry import Seen, SeenBlock
from optx.watch import watch

CHUNK = 4096  # tokens that run through a block at a time
SPLIT = 128  # tokens of one expert whose products are summed at a time
PROJECTIONS = (Linear, GroupedLinear)


class Feed:
    """Windows of calibration text, as what enters the next block of `model`."""

    def __init__(self, model: nnx.Module, windows: Sequence[np.ndarray], lanes: int = 1):
        """model: the tree that is compiled, abstract will do; windows: int32[1, T] each, all of one length T; lanes: forms of the
        blocks that each have the text run through them, apart from each other."""
        self.plan = model.cache_plan()
        self.length = windows[0].shape[1]
        rows = max(1, CHUNK // self.length)
        joined = [np.concatenate(windows[i : i + rows]).reshape(-1) for i in range(0, len(windows), rows)]
        self.lanes = lanes
        self.chunks: list[jax.Array] = [jnp.asarray(tokens) for tokens in joined] * lanes  # a lane behind the other
        self.pools: list[dict[int, Any]] = [{} for _ in self.chunks]  # of layers whose cache others read, by layer
        self.owners = {spec.follows for spec in self.plan.specs if spec is not None and spec.follows is not None}

    @property
    def tokens(self) -> int:
        return sum(self.chunks[i].shape[0] for i in self._of(0))

    def _of(self, lane: int) -> range:
        """Indices of its chunks."""
        count = len(self.chunks) // self.lanes
        return range(lane * count, (lane + 1) * count)

    def collect(self, block: nnx.Module, prefix: str, sites: Iterable[str], needs: frozenset[str], lane: int = 0):
        """{full path: Seen or SeenBlock} of the sites (paths in `block`, '' for itself), which stands at `prefix`.

        Raises: PassError for a site that the text does not reach, and for inputs that are no numbers.
        """
        sites = tuple(sites)
        under = {site: _projections(ir.get(block, site)) for site in sites}
        paths = {f"{site}/{path}".strip("/"): None for site, found in under.items() for path in found}
        graph, treedef, leaves = _parts(block)
        kinds = {path: _expert_count(ir.get(block, path)) for path in paths}
        whole = tuple(site for site in sites if "inputs" in needs and site not in paths)
        run = _sweep(graph, treedef, _how(prefix), self.length, tuple(kinds.items()), whole, needs - {"inputs"})
        sums, calls = None, {site: [] for site in whole}
        for i in self._of(lane):
            found, called = run(leaves, *self._enter(i, prefix))
            sums = found if sums is None else _add(sums, found)
            for site, arguments in called.items():
                calls[site].append(arguments)
        seen = {path: _mean(total) for path, total in (sums or {}).items()}
        for path, one in seen.items():
            _check_finite(f"{prefix}/{path}".strip("/"), one)
        return {f"{prefix}/{site}".strip("/"): _of_site(prefix, site, under[site], seen, calls) for site in sites}

    def advance(self, block: nnx.Module, prefix: str, lane: int = 0) -> None:
        """Runs the block, as it is after the passes of the lane: its output enters the next one."""
        how = _how(prefix)
        if how == "skip":
            return
        graph, treedef, leaves = _parts(block)
        layer = int(prefix.split("/")[1]) if how == "layer" else None
        run = _forward_of(graph, treedef, how, self.length)
        for i in self._of(lane):
            self.chunks[i], pool = run(leaves, *self._enter(i, prefix))
            if layer in self.owners:
                self.pools[i][layer] = pool

    def _enter(self, i: int, prefix: str) -> tuple[jax.Array, Any]:
        """Chunk i of the buffer, and the pool that a layer reads of an earlier one."""
        pool = None
        if _how(prefix) == "layer":
            layer = int(prefix.split("/")[1])
            owner = self.plan.specs[layer] and self.plan.specs[layer].follows
            pool = None if owner is None else self.pools[i][owner]
        return self.chunks[i], pool


def _of_site(prefix: str, site: str, projections: list[str], seen: Mapping[str, Seen], calls) -> Seen | SeenBlock:
    parts = {path: seen[full] for path in projections if (full := f"{site}/{path}".strip("/")) in seen}
    if projections == [""] and parts:
        return parts[""]
    if parts or calls.get(site):
        return SeenBlock(parts=parts, inputs=tuple(calls.get(site, ())))
    full = f"{prefix}/{site}".strip("/")
    raise PassError(
        f"{full}: calibration text does not reach it: the part around it contracts the weight itself, or the forward leaves it "
        "out; keep it out of the pass with 'match'"
    )


def _how(prefix: str) -> str:
    """How a block of CausalLM is called: a layer, a part of one argument, or not at all (the head ends the way)."""
    if prefix.startswith("layers/"):
        return "layer"
    return "part" if prefix in ("embed", "norm") else "skip"


def _projections(module: nnx.Module) -> list[str]:
    return [path for path, part in ir.walk(module) if isinstance(part, PROJECTIONS)]


def _expert_count(module: nnx.Module) -> int | None:
    return module.experts if isinstance(module, GroupedLinear) else None


def _parts(block: nnx.Module):
    graph, state = nnx.split(block)
    leaves, treedef = jax.tree.flatten(state)
    return graph, treedef, tuple(leaves)


def _forward(block, how: str, length: int, x: jax.Array, pool):
    """-> (what the block makes of x, its pool)."""
    if how != "layer":
        return block(x), None
    ragged = Ragged.dense(x.shape[0] // length, length)
    return block(x, ragged, None if pool is None else View(pool=pool, slots=ragged.starts))


@functools.lru_cache(maxsize=256)
def _forward_of(graph, treedef, how, length):
    def run(leaves, x, pool):
        return _forward(nnx.merge(graph, jax.tree.unflatten(treedef, leaves)), how, length, x, pool)

    return jax.jit(run)


@functools.lru_cache(maxsize=256)
def _sweep(graph, treedef, how, length, projections, whole, needs):
    """projections: ((path, experts or None), ...). One program for all blocks of one form."""
    experts = dict(projections)

    def run(leaves, x, pool):
        block = nnx.merge(graph, jax.tree.unflatten(treedef, leaves))
        found, calls = {}, {}

        def note(path, call, *args):
            if path in experts:
                one = _sums(args, experts[path], needs)
                found[path] = one if path not in found else _add(found[path], one)
            if path in whole:
                calls[path] = tuple(a.pool if isinstance(a, View) else a for a in args)
            return call(*args)

        watch(block, sorted({*experts, *whole}), note)
        if how == "skip":
            block(x)
        else:
            _forward(block, how, length, x, pool)
        return found, calls

    return jax.jit(run)


def _sums(args, experts: int | None, needs: frozenset[str]) -> dict[str, jax.Array]:
    """Sums over the tokens of one call; of experts, args are x sorted by expert, tokens of each, the expert of each token."""
    x = args[0].reshape(-1, args[0].shape[-1]).astype(jnp.float32)
    if experts is None:
        ways = {
            "absmax": lambda: jnp.max(jnp.abs(x), axis=0),
            "absmean": lambda: jnp.sum(jnp.abs(x), axis=0),
            "square": lambda: jnp.sum(x * x, axis=0),
            "gram": lambda: jnp.matmul(x.T, x, precision="highest"),
        }
        tokens = jnp.int32(x.shape[0])
    else:
        _, tokens, owners = args
        none = jnp.zeros((experts, x.shape[1]), jnp.float32)
        ways = {
            "absmax": lambda: none.at[owners].max(jnp.abs(x)),
            "absmean": lambda: none.at[owners].add(jnp.abs(x)),
            "square": lambda: none.at[owners].add(x * x),
            "gram": lambda: _grams(x, tokens),
        }
    return {"tokens": tokens} | {name: way() for name, way in ways.items() if name in needs}


def _grams(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [T, D] sorted by expert, int32[E] tokens of each -> float32[E, D, D], the sum of x x^T of each expert's tokens."""
    experts, d = sizes.shape[0], x.shape[1]
    pieces = -(-sizes // SPLIT)
    ends, starts = jnp.cumsum(pieces), jnp.cumsum(sizes) - sizes
    padded = jnp.pad(x, ((0, SPLIT), (0, 0)))

    def add(i, grams):
        expert = jnp.minimum(jnp.sum(ends <= i), experts - 1)
        inside = (i - (ends[expert] - pieces[expert])) * SPLIT
        rows = jax.lax.dynamic_slice_in_dim(padded, starts[expert] + inside, SPLIT)
        rows = jnp.where((jnp.arange(SPLIT) < sizes[expert] - inside)[:, None], rows, 0)
        return grams.at[expert].add(jnp.matmul(rows.T, rows, precision="highest"))

    return jax.lax.fori_loop(0, ends[-1], add, jnp.zeros((experts, d, d), jnp.float32))


@functools.partial(jax.jit, donate_argnums=0)
def _add(total, more):
    """Sums of both; of largest numbers the larger."""
    join = lambda path, a, b: jnp.maximum(a, b) if path[-1].key == "absmax" else a + b  # noqa: E731
    return jax.tree_util.tree_map_with_path(join, total, more)


def _mean(sums: Mapping[str, jax.Array]) -> Seen:
    count = jnp.maximum(sums["tokens"], 1).astype(jnp.float32)
    share = {
        name: value
        if name in ("tokens", "absmax")
        else value / count.reshape(count.shape + (1,) * (value.ndim - count.ndim))
        for name, value in sums.items()
    }
    return Seen(**share)


def _check_finite(path: str, seen: Seen) -> None:
    for name in ("absmax", "absmean", "square", "gram"):
        value = getattr(seen, name)
        if value is not None and not bool(jnp.all(jnp.isfinite(value))):
            raise PassError(
                f"{path}: {name} of its inputs on calibration text is not finite; look for NaN or Inf in the weights before it, "
                "or compile with a wider dtype"
            )
