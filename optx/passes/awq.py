"""Weights rounded after channels that matter were scaled up, by what the rounding costs the output of the part around them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import formats, ir, tensor
from optx.cache import Ragged, View
from optx.errors import FormatError, PassError
from optx.formats.search import clipped_grid
from optx.ir import replace
from optx.nn.attention import Attention
from optx.nn.core import Linear
from optx.nn.decoder import Block
from optx.nn.grouped_mla import GroupedMLA
from optx.nn.mla import MLA
from optx.nn.moe import GroupedLinear
from optx.passes import folding
from optx.passes.quantize_weights import QuantizeWeights, grid_of, weight_of
from optx.registry import Axis, Noted, Seen, SeenBlock, Site, Stage, register
from optx.tensor import QTensor
from optx.watch import watch

LEAST = 1e-4  # of a scale, before it is centred on 1
# What queries and keys come from: clipping weights there moves logits of the softmax, which the output error of a group misses.
UNCLIPPED: Mapping[type, tuple[str, ...]] = {
    Attention: ("q", "k"),
    MLA: ("q", "q_a", "q_b", "kv_a", "kv_b"),
    GroupedMLA: ("q", "kv_a", "kv_b"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ(folding.Smoothing, QuantizeWeights):
    points: int = 20  # exponents that are tried for each scale, besides leaving it out
    clip: bool = (
        True  # each group's range is shrunk where that makes less error; False: by `scales`, as those of q and k
    )
    sample: int = 2048  # tokens on which outputs are compared; statistics are of all

    @property
    def needs(self):
        return frozenset({"absmean", "inputs"} | ({"gram"} if self.clip else set()) | super().needs)


@register("awq", axis=Axis.BITS, stage=Stage.WEIGHTS, options=AWQ, exact=False)
def awq(site: Site, block: Block, opt: AWQ) -> Block | Noted:
    """W' = round(s W) / s with 1 / s in what comes before: s = x^a / w^(1 - a), x the mean |x_j| and w the mean |W_j| over its
    group's largest, a of 20 between 0 and 1 with the least error of the mixer's or mlp's output; then groups are clipped.

    Lin et al. 2023, arXiv:2306.00978. All projections of the block are rounded. Experts that read a norm share its scale; scales
    inside of experts differ, with one exponent for all.
    """
    if opt.points < 2 or opt.sample < 1:
        raise PassError(f"awq at {site.path}: {opt.points} points on {opt.sample} tokens; allowed: at least 2 on 1")
    format_ = _checked(site, opt)
    dense = {path: _weight(site, path, part, opt, format_) for path, part in _projections(block)}
    if ir.is_abstract(block):
        _places(_with(block, dense), opt)
        return _with(block, {path: tensor.quantize(weight, format_, axis=-2) for path, weight in dense.items()})
    if not isinstance(site.seen, SeenBlock) or not site.seen.inputs:
        raise PassError(f"awq at {site.path}: no statistics of its inputs; compile with calibration text")
    block = _with(block, dense)
    places, refused = _places(block, opt)
    calls = _calls(block, sorted({fold.part for fold in places}), site.seen.inputs, opt.sample)
    took = {path: jnp.float32(1) for path in dense}
    for fold, s in [(fold, _best(site, block, fold, calls[fold.part], format_, opt)) for fold in places]:
        block = folding.move(block, fold, s)
        took |= {path: fold.spread(s) for path in fold.readers if path in took}
    packed = {path: _rounded(block, path, site.seen, took[path], format_, opt) for path in dense}
    unseen = [
        f"{path}: calibration text does not reach it, rounded as it is" for path in dense if path not in site.seen.parts
    ]
    notes = [*(f"{source}: {reason}" for source, reason in refused.items()), *unseen]
    block = _with(block, packed)
    return Noted(block, "; ".join(notes)) if notes else block


def _checked(site: Site, opt: AWQ) -> formats.Format:
    try:
        return opt.storage()
    except FormatError as error:
        raise PassError(f"awq at {site.path}: {error}") from None


def _places(block: Block, opt: AWQ):
    return folding.folds(block, opt)


def _projections(block: Block) -> list[tuple[str, nnx.Module]]:
    return [(path, part) for path, part in ir.walk(block) if isinstance(part, Linear | GroupedLinear)]


def _weight(site: Site, path: str, part, opt: AWQ, format_: formats.Format):
    where = f"{site.path}/{path}"
    weight = weight_of(dataclasses.replace(site, path=where), part, opt)
    if reason := format_.check(weight.shape[-2]):
        raise PassError(f"awq at {where}, weight {list(weight.shape)}: {reason}")
    return weight


def _with(block: Block, weights: Mapping) -> Block:
    out = ir.shallow(block)
    for path, weight in weights.items():
        ir.put(out, path, replace(ir.get(out, path), weight=weight))
    return out


# --- Scales ----------------------------------------------------------------------------------------------------------


def _calls(block: Block, parts: Sequence[str], inputs: tuple, tokens: int) -> dict[str, list]:
    """What the mixer and the mlp are called with: arguments of each, of some windows of every chunk until `tokens`."""
    ragged = inputs[0][1]
    windows = max(1, tokens // (ragged.longest * len(inputs)))
    found = {part: [] for part in parts}
    graph, state = nnx.split(block)
    run = _calls_of(graph, tuple(parts), min(windows, ragged.batch))
    for arguments in inputs[: max(1, tokens // (ragged.longest * windows))]:
        for part, args in run(state, arguments).items():
            found[part].append(args)
    return found


@functools.lru_cache(maxsize=64)
def _calls_of(graph, parts, windows: int):
    def run(state, arguments):
        block, called = nnx.merge(graph, state), {}
        x, ragged, cache = arguments  # cache: what an earlier layer has left for this one, or None
        rows = Ragged.dense(min(windows, ragged.batch), ragged.longest)
        few = x[: rows.rows.shape[0]]
        if cache is not None:
            cache = View(pool=jax.tree.map(lambda p: p[: few.shape[0]], cache), slots=rows.starts)

        def note(path, call, *args):
            called[path] = args
            return call(*args)

        watch(block, parts, note)
        block(few, rows, cache)
        return called

    return jax.jit(run)


def _best(site: Site, block: Block, fold: folding.Fold, calls, format_, opt: AWQ) -> jax.Array:
    """The scale of the source's channels with the least error."""
    x = folding.seen_of(fold, site.seen.parts, "absmean")
    w = fold.gather(_importance(folding.weights_of(block, fold), format_, x.ndim > 1), jnp.mean)
    exponents = np.linspace(0, 1, opt.points)
    scales = jnp.stack([jnp.ones_like(x), *(_scale(x, w, a) for a in exponents)])
    part = ir.get(block, fold.part)
    graph, state = nnx.split(part)
    run = _errors_of(graph, tuple(path[len(fold.part) + 1 :] for path in fold.readers), fold, format_)
    errors = np.sum([np.asarray(run(state, scales, args)) for args in calls], axis=0)
    if not np.all(np.isfinite(errors)):
        raise PassError(f"awq at {site.path}/{fold}: NaN or Inf in the weights or in what they read")
    return scales[int(np.argmin(errors))]


def _importance(weights: Sequence[jax.Array], format_: formats.Format, per_expert: bool) -> jax.Array:
    """Mean over outputs of |w| / its group's largest: float32[D], or [E, D]."""
    shares = []
    for weight in weights:
        rows = jnp.abs(jnp.swapaxes(weight, -1, -2).astype(jnp.float32))
        grouped = rows.reshape(*rows.shape[:-1], -1, format_.group or rows.shape[-1])
        top = jnp.max(grouped, axis=-1, keepdims=True)
        shares.append((grouped / jnp.where(top > 0, top, 1)).reshape(rows.shape))
    if per_expert:
        (share,) = shares
        return jnp.mean(share, axis=-2)
    return jnp.mean(jnp.concatenate([share.reshape(-1, share.shape[-1]) for share in shares]), axis=0)


def _scale(x: jax.Array, w: jax.Array, a: float) -> jax.Array:
    """Centred on 1; 1 for channels that were never active."""
    s = jnp.maximum(x**a / (w ** (1 - a) + LEAST), LEAST)
    live = x > 0
    low = jnp.min(jnp.where(live, s, jnp.inf), axis=-1, keepdims=True)
    high = jnp.max(jnp.where(live, s, 0), axis=-1, keepdims=True)
    return jnp.where(live, s / jnp.sqrt(low * high), 1)


@functools.lru_cache(maxsize=256)
def _errors_of(graph, readers: tuple[str, ...], fold: folding.Fold, format_: formats.Format):
    """run(state of a part, scales [points, channels], arguments of its call) -> float32[points], mean |y' - y|^2."""

    def run(state, scales, args):
        part = nnx.merge(graph, state)
        want = _output(part(*args))

        def one(s):
            trial, rows = ir.shallow(part), fold.spread(s)[..., None, :]
            for path in readers:
                reader = ir.get(trial, path)
                if isinstance(reader, Linear | GroupedLinear):
                    ir.put(trial, path, replace(reader, weight=_as_rounded(reader.weight.get_value(), rows, format_)))
            return jnp.mean((_output(trial(*args)) - want) ** 2)

        return jax.lax.map(one, scales)

    return jax.jit(run)


def _output(y) -> jax.Array:
    """A mixer's output without its pool."""
    return (y[0] if isinstance(y, tuple) else y).astype(jnp.float32)


def _as_rounded(weight: jax.Array, s: jax.Array, format_: formats.Format) -> jax.Array:
    """round(s W) / s, rows of W times s [..., 1, D]."""
    rows = jnp.swapaxes(weight, -1, -2).astype(jnp.float32) * s
    scale, zero = format_.grid(rows)
    steps = format_.steps(scale, zero, rows.shape[-1])
    return jnp.swapaxes(format_.value(format_.code(rows, *steps), *steps) / s, -1, -2).astype(weight.dtype)


# --- Rounding --------------------------------------------------------------------------------------------------------


def _rounded(block: Block, path: str, seen: SeenBlock, s: jax.Array, format_: formats.Format, opt: AWQ) -> QTensor:
    """The weight at `path`, whose rows took the scale s, packed."""
    weight = ir.get(block, path).weight.get_value()
    rows = jnp.swapaxes(weight, -1, -2).astype(jnp.float32)
    scale, zero = _grid(block, path, rows, seen.parts.get(path), s, format_, opt)
    parts = format_.assemble(format_.code(rows, *format_.steps(scale, zero, rows.shape[-1])), scale, zero)
    return QTensor(
        data=parts.data, scale=parts.scale, zero=parts.zero, format=format_, length=rows.shape[-1], dtype=weight.dtype
    )


def _grid(block: Block, path: str, rows, seen: Seen | None, s, format_, opt: AWQ):
    above, _, name = path.rpartition("/")
    if seen is None:
        return format_.grid(rows)
    if not opt.clip or name in UNCLIPPED.get(type(ir.get(block, above)), ()):
        return grid_of(format_, rows, opt.scales, None if seen.square is None else seen.square / s**2)
    s = jnp.broadcast_to(s, (*rows.shape[:-2], rows.shape[-1]))
    gram = seen.gram / (s[..., :, None] * s[..., None, :])
    if rows.ndim == 2:
        return clipped_grid(format_, rows, gram)
    return jax.lax.map(lambda each: clipped_grid(format_, *each), (rows, gram))
