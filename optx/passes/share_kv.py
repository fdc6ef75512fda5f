"""Keys and values of one layer read by several: cross-layer attention (CLA) and a decoder of one cache (YOCO)."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import ir
from optx.errors import PassError
from optx.ir import replace
from optx.nn.attention import Attention
from optx.passes.head_moments import check_plain, pairs_of, readers, turn
from optx.registry import Axis, PassOptions, SeenBlock, Site, Skipped, Stage, register

RIDGE = 1e-4  # of the producer's mean energy, added to it
TINY = np.finfo(float).tiny


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareKV(PassOptions):
    factor: int | None = None  # layers that read one cache, the first of each run owns it (CLA); None: see producer
    producer: int | None = None  # layer whose cache all later ones read, negative from the end (YOCO); None: see factor
    align: bool = True  # queries and outputs fitted to the other layer's keys and values, on calibration text

    @property
    def needs(self):
        return frozenset({"inputs"}) if self.align else frozenset()


@register("share_kv", axis=Axis.STATE, stage=Stage.STRUCTURE, options=ShareKV, exact=False, needs_healing=True)
def share_kv(site: Site, attn: Attention, opt: ShareKV) -> Attention | Skipped:
    """The layer loses W_k and W_v and reads the cache of an earlier one. CLA, arXiv:2405.12981: of every `factor` layers the
    first. YOCO, arXiv:2405.05254: all layers behind `producer` read its cache.

    align: with k, v the layer's own and k', v' those that it will read, each kv head takes the head of the other layer from
    which it is told best: k ~ u k' in each frequency's plane, conj(u) going into q, and v ~ v' B, B going into o. Keys are read
    as they are under a query norm, values under a gate.
    """
    if reason := check_plain(site, attn, "share_kv"):
        return Skipped(reason)
    owner = producer_of(site, opt)
    if attn.cache.share is not None:
        return Skipped(f"reads the cache of layer {attn.cache.share}")
    if owner is None:
        return Skipped("keeps its cache")
    parts = {} if ir.is_abstract(attn) or not opt.align else _fitted(site, attn)
    return replace(attn, k=None, v=None, k_norm=None, cache=attn.cache.replace(share=owner), **parts)


def producer_of(site: Site, opt: ShareKV) -> int | None:
    """The layer whose cache a site's layer will read; None: its own. Raises PassError for options that name none."""
    if (opt.factor is None) == (opt.producer is None):
        raise PassError("share_kv: give one of factor (CLA) and producer (YOCO)")
    if opt.factor is not None:
        if not 2 <= opt.factor <= site.layers:
            raise PassError(f"share_kv: factor {opt.factor}; allowed: 2 to {site.layers}, the number of layers")
        return site.layer - site.layer % opt.factor if site.layer % opt.factor else None
    if not -site.layers <= opt.producer < site.layers - 1 or opt.producer == -1:
        raise PassError(f"share_kv: producer {opt.producer}; allowed: {-site.layers} to {site.layers - 2}, but -1")
    first = opt.producer % site.layers
    return first if site.layer > first else None


def _fitted(site: Site, attn: Attention) -> dict:
    """q, o and sinks for the producer's heads. Raises PassError without calibration text behind the producer."""
    from scipy.optimize import linear_sum_assignment  # slow to load

    calls = site.seen.inputs if isinstance(site.seen, SeenBlock) else ()
    if not calls or any(pool is None for *_, pool in calls):
        raise PassError(f"share_kv at {site.path}: no statistics of its inputs; compile with calibration text")
    graph, state = nnx.split(attn)
    sums = [_sums_of(graph)(state, x, ragged, pool["k"], pool["v"]) for x, ragged, pool in calls]
    keys, values = ([sum(np.asarray(part, np.float64) for part in each) for each in zip(*side, strict=True)]
                    for side in zip(*sums, strict=True))  # fmt: skip
    if not all(np.isfinite(part).all() for part in (*keys, *values)):
        raise PassError(f"share_kv at {site.path}: NaN or Inf in keys or values; look at the weights before it")
    heads, d = attn.kv_heads, attn.head_dim
    gain, queries, outputs = np.empty((heads, heads)), np.empty((heads, heads, d, d)), np.empty((heads, heads, d, d))
    for read, own in itertools.product(range(heads), repeat=2):
        queries[read, own], of_keys = _key_map(attn, *(part[read] for part in keys[:2]), own)
        outputs[read, own], of_values = _value_map(attn, *(part[read] for part in values[:2]), own)
        gain[read, own] = of_keys / max(keys[2][own], TINY) + of_values / max(values[2][own], TINY)
    _, order = linear_sum_assignment(gain, maximize=True)
    taken = np.argsort(order)  # the head of the other layer that each of the own becomes
    return readers(attn, order, queries[taken, range(heads)], outputs[taken, range(heads)])


@functools.lru_cache(maxsize=64)
def _sums_of(graph):
    """-> of keys behind RoPE and of values: sums of y'_p y_g by head of both [K', K, H, H], of y'_p y'_p [K', H, H], of
    |y_g|^2 [K], y' what will be read."""

    def run(state, x, ragged, k_read, v_read):
        own, found = nnx.merge(graph, state).keys_and_values(x, ragged), []
        outer = functools.partial(jnp.einsum, precision="highest")
        for mine, read in zip(own, (k_read, v_read), strict=True):
            mine, read = mine.astype(jnp.float32), read.astype(jnp.float32)
            sums = (
                outer("tph,tgi->pghi", read, mine),
                outer("tph,tpi->phi", read, read),
                jnp.sum(mine * mine, axis=(0, 2)),
            )
            found.append(sums)
        return found

    return jax.jit(run)


def _key_map(attn: Attention, across: np.ndarray, held: np.ndarray, own: int) -> tuple[np.ndarray, float]:
    """(what queries take [H, H], energy of the head's keys that it tells)."""
    out, across = np.eye(attn.head_dim), across[own]
    if attn.q_norm is not None:
        return out, 2 * np.trace(across) - np.trace(held)
    told = 0.0
    for a, b in pairs_of(attn):
        energy = held[a, a] + held[b, b] + RIDGE * np.trace(held) / len(held)
        z = (across[a, a] + across[b, b] + 1j * (across[a, b] - across[b, a])) / energy
        out[np.ix_([a, b], [a, b])] = turn(np.conj(z))
        told += abs(z) ** 2 * energy
    rest = np.ix_(*[np.setdiff1d(np.arange(attn.head_dim), pairs_of(attn))] * 2)
    fit, more = _regressed(across[rest], held[rest])
    out[rest] = fit.T
    return out, told + more


def _value_map(attn: Attention, across: np.ndarray, held: np.ndarray, own: int) -> tuple[np.ndarray, float]:
    """(what goes before o [H, H], energy of the head's values that it tells)."""
    if attn.gate is not None:
        return np.eye(attn.head_dim), 2 * np.trace(across[own]) - np.trace(held)
    return _regressed(across[own], held)


def _regressed(across: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, float]:
    """(B, energy told): y ~ y' B with the least mean square, of y'^T y and y'^T y'."""
    floor = RIDGE * np.trace(held) / max(len(held), 1) + TINY
    fit = np.linalg.solve(held + floor * np.eye(len(held)), across)
    return fit, float(np.sum(fit * across))
