"""Recurrences fitted to attention on calibration text, and what each layer's conversion alone costs."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx.cache import Ragged
from optx.errors import PassError
from optx.ir import replace
from optx.nn.attention import Attention
from optx.passes.head_moments import with_rows
from optx.registry import SeenBlock, Site
from optx.watch import watch

RIDGE = 1e-2  # of the mean square of what enters the output projection, added to it
SCORED = 2  # windows of calibration text on which single layers are compared


def calls_of(site: Site, name: str) -> tuple:
    """Arguments of the site's calls on calibration text. Raises PassError without any."""
    if not isinstance(site.seen, SeenBlock) or not site.seen.inputs:
        raise PassError(
            f"{name} at {site.path}: no statistics of its inputs; compile with calibration text, or set fit: false"
        )
    return site.seen.inputs


def moment_of(attn: Attention, calls: Sequence[tuple]) -> np.ndarray:
    """float64[D + 1, D + 1]: E[x x^T] of the layer's inputs with a 1 behind them; without text as if they were white noise."""
    if not calls:
        return np.eye(attn.q.weight.get_value().shape[0] + 1)
    total = sum(np.asarray(_outer(x), np.float64) for x, *_ in calls)
    return total / total[-1, -1]


@jax.jit
def _outer(x):
    x = jnp.concatenate([x.astype(jnp.float32), jnp.ones((len(x), 1), jnp.float32)], axis=1)
    return jnp.matmul(x.T, x, precision="highest")


def fitted(new: nnx.Module, attn: Attention, calls: Sequence[tuple], site: Site) -> nnx.Module:
    """`new` with W, b = argmin E|f W + b - y|^2 + RIDGE E|f|^2 / n |W|^2 in its `out`: f [n] enters it, y [D] is what attention
    says. Raises PassError for numbers that are none."""
    (graph, state), (old_graph, old_state) = nnx.split(new), nnx.split(attn)
    run = _sums_of(graph, old_graph)
    total = sum(np.asarray(run(state, old_state, x, ragged), np.float64) for x, ragged, _ in calls)
    if not np.isfinite(total).all():
        raise PassError(f"linearize at {site.path}: NaN or Inf in its outputs; look at the weights before it")
    n = new.out.weight.get_value().shape[0]
    mean = total[n] / total[n, n]
    moment = total / total[n, n] - np.outer(mean, mean)
    floor = RIDGE * np.trace(total[:n, :n]) / total[n, n] / n
    weight = np.linalg.solve(moment[:n, :n] + floor * np.eye(n), moment[:n, n + 1 :])
    bias = mean[n + 1 :] - mean[:n] @ weight
    return replace(new, out=with_rows(new.out, np.concatenate([weight, bias[None]])))


@functools.lru_cache(maxsize=64)
def _sums_of(graph, old_graph):
    """-> sum over tokens of z z^T, z = [f, 1, y]."""

    def run(state, old_state, x, ragged):
        new, found = nnx.merge(graph, state), []

        def note(path, call, f):
            found.append(f)
            return call(f)

        watch(new, ["out"], note)
        new(x, ragged, None)
        y, _ = nnx.merge(old_graph, old_state)(x, ragged, None)
        parts = (found[0], jnp.ones((len(x), 1)), y)
        z = jnp.concatenate([part.astype(jnp.float32) for part in parts], axis=1)
        return jnp.matmul(z.T, z, precision="highest")

    return jax.jit(run)


def damage(
    model: nnx.Module, windows: Sequence[np.ndarray], layers: Mapping[int, str], convert: Callable
) -> dict[int, float]:
    """Layer -> mean KL(model || model with that layer alone converted) on the first windows, nats a token; conversions see those
    behind them, or all where there are no more.

    windows: int32[1, T] each; layers: with their paths; convert(path, attention, SeenBlock) -> the new mixer.
    Raises: PassError for a model whose layers read each other's caches.
    """
    if any(spec is not None and spec.share is not None for spec in model.cache_plan().specs):
        raise PassError(
            "linearize.by: sensitivity runs layers one by one, and here some read another's cache; take place"
        )
    ragged = Ragged.dense(1, windows[0].shape[1])
    stream = [model.embed(jnp.asarray(tokens[0])) for tokens in windows]
    want = [_logits(model, _through(model.layers, x, ragged)) for x in stream[:SCORED]]
    found = {}
    for i, layer in enumerate(model.layers):
        if i in layers:
            fresh = stream[SCORED:] or stream
            inputs = tuple((x if layer.norm is None else layer.norm(x), ragged, None) for x in fresh)
            mixer = convert(layers[i], layer.mixer, SeenBlock(parts={}, inputs=inputs))
            rest = (replace(layer, mixer=mixer), *model.layers[i + 1 :])
            got = [_logits(model, _through(rest, x, ragged)) for x in stream[:SCORED]]
            found[i] = float(np.mean([_divergence(*pair) for pair in zip(want, got, strict=True)]))
        stream = [_through((layer,), x, ragged) for x in stream]
    return found


def _through(layers: Sequence[nnx.Module], x: jax.Array, ragged: Ragged) -> jax.Array:
    for layer in layers:
        graph, state = nnx.split(layer)
        x = _block_of(graph)(state, x, ragged)
    return x


@functools.lru_cache(maxsize=64)
def _block_of(graph):
    return jax.jit(lambda state, x, ragged: nnx.merge(graph, state)(x, ragged, None)[0])


def _logits(model: nnx.Module, x: jax.Array) -> jax.Array:
    return model.head(model.norm(x))


@jax.jit
def _divergence(want: jax.Array, got: jax.Array) -> jax.Array:
    want, got = jax.nn.log_softmax(want), jax.nn.log_softmax(got)
    return jnp.mean(jnp.sum(jnp.exp(want) * (want - got), axis=-1))
