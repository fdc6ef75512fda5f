"""Fewer kv heads: heads of keys and values that are alike are aligned and pooled."""

import dataclasses
import itertools
from typing import Literal

import numpy as np

from optx import ir
from optx.errors import PassError
from optx.ir import replace
from optx.nn.attention import Attention
from optx.passes import head_moments as heads
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register

TINY = np.finfo(float).tiny


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gqa(PassOptions):
    kv_heads: int  # left of those there are, which it divides; 1: multi-query attention
    pool: Literal["mean", "aligned"] = (
        "aligned"  # aligned: by what calibration text shows; mean: neighbours as they are
    )

    @property
    def needs(self):
        return frozenset({"inputs"}) if self.pool == "aligned" else frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """How heads become one: float64[K, H, H] each, by old kv head g of the group that becomes head j."""

    groups: list[list[int]]
    keys: np.ndarray  # k'_j = sum over g of k_g keys_g
    queries: np.ndarray  # q' = q queries_g, of query heads that read g
    values: np.ndarray  # v'_j = sum over g of v_g values_g
    outputs: np.ndarray  # rows of o that read a head of g: outputs_g W_o


@register("gqa", axis=Axis.STATE, stage=Stage.STRUCTURE, options=Gqa, exact=False, needs_healing=True)
def gqa(site: Site, attn: Attention, opt: Gqa) -> Attention | Skipped:
    """K kv heads pooled to `kv_heads`: k'_j = sum_g k_g P_g, v'_j = sum_g v_g R_g over the K / kv_heads old heads g of a group.

    mean: neighbours, P = R = 1 / m (GQA, arXiv:2305.13245). aligned: groups by similarity; of each the one head that loses least,
    m heads behind H numbers: v_g ~ v' B_g with B_g folded into o, and for each frequency of RoPE k_g ~ u_g k' in the complex
    plane, u_g a turn and a scale, which pass through RoPE and go into q. What is lost is weighed by W_o and by the queries
    that read it. Align-then-pool (arXiv:2412.20677) allows turns alone; this is the least-squares optimum around it. Exact
    where the pooled heads are equal up to such maps. Keys under a norm keep their directions and are averaged; so are values
    under a gate.
    """
    if reason := heads.check_plain(site, attn, "gqa"):
        return Skipped(reason)
    if attn.cache.share is not None:
        return Skipped(f"reads the cache of layer {attn.cache.share}")
    if attn.kv_heads == opt.kv_heads:
        return Skipped(f"has {attn.kv_heads} kv heads")
    if not 1 <= opt.kv_heads < attn.kv_heads or attn.kv_heads % opt.kv_heads:
        raise PassError(
            f"gqa at {site.path}: kv_heads {opt.kv_heads}; allowed: a number that divides its {attn.kv_heads} and is smaller"
        )
    if ir.is_abstract(attn):
        width = opt.kv_heads * attn.head_dim
        return _with(attn, opt, k=heads.of_width(attn.k, width), v=heads.of_width(attn.v, width))
    if opt.pool == "mean":
        return merged(attn, opt, mean(attn, opt.kv_heads))
    return merged(attn, opt, aligned(attn, opt.kv_heads, heads.moments(site, attn, True, "gqa")))


def _with(attn: Attention, opt: Gqa, **parts) -> Attention:
    shape = (opt.kv_heads, attn.head_dim)
    streams = tuple(dataclasses.replace(stream, shape=shape) for stream in attn.cache.streams)
    return replace(attn, kv_heads=opt.kv_heads, cache=attn.cache.replace(streams=streams), **parts)


def merged(attn: Attention, opt: Gqa, merge: Merge) -> Attention:
    """The layer with its heads in the order of the groups, and pooled."""
    pooled = {}
    for name, maps in (("k", merge.keys), ("v", merge.values)):
        rows = np.einsum("dgh,ghi->dgi", heads.by_head(getattr(attn, name), attn.kv_heads), maps)
        pooled[name] = heads.with_rows(getattr(attn, name), np.stack([rows[:, g].sum(1) for g in merge.groups], axis=1))
    order = [g for group in merge.groups for g in group]
    return _with(attn, opt, **heads.readers(attn, order, merge.queries, merge.outputs), **pooled)


def mean(attn: Attention, kv_heads: int) -> Merge:
    size = attn.kv_heads // kv_heads
    same = np.tile(np.eye(attn.head_dim), (attn.kv_heads, 1, 1))
    groups = [list(range(j * size, (j + 1) * size)) for j in range(kv_heads)]
    return Merge(groups=groups, keys=same / size, queries=same, values=same / size, outputs=same)


def aligned(attn: Attention, kv_heads: int, seen: heads.Moments) -> Merge:
    count, d = attn.kv_heads, attn.head_dim
    size = count // kv_heads
    losses = np.zeros((count, count))
    for one, two in itertools.combinations(range(count), 2):
        losses[one, two] = losses[two, one] = sum(_pooled(attn, seen, [one, two])[-1])
    groups = alike(losses, size)
    out = {name: np.empty((count, d, d)) for name in ("keys", "queries", "values", "outputs")}
    for group in groups:
        for name, maps in zip(out, _pooled(attn, seen, group)[0], strict=True):
            out[name][group] = maps
    return Merge(groups=groups, **out)


def alike(losses: np.ndarray, size: int) -> list[list[int]]:
    """Heads in groups of `size`: the pair that loses least begins one, which takes what loses least on average beside it."""
    free, groups = list(range(len(losses))), []
    while free:
        group = list(min(itertools.combinations(free, 2), key=lambda pair: losses[pair])) if len(free) > 1 else free[:]
        while len(group) < size:
            left = [head for head in free if head not in group]
            group.append(min(left, key=lambda head: losses[head, group].mean()))
        groups.append(sorted(group))
        free = [head for head in free if head not in group]
    return sorted(groups)


def _pooled(attn: Attention, seen: heads.Moments, group: list[int]):
    """((keys, queries, values, outputs) [m, H, H] of a group, shares of the keys' and values' weighted energy that it loses)."""
    d, width = attn.head_dim, attn.kv_heads * attn.head_dim
    asked = seen.queries.reshape(attn.kv_heads, -1, d, d).sum(1)[group]
    at = np.concatenate([np.arange(g * d, (g + 1) * d) for g in group])
    of_keys, of_values = (seen.stored[np.ix_(at + start, at + start)] for start in (0, width))
    keys, queries, lost_keys = _keys(attn, of_keys, asked)
    if attn.gate is None:
        values, outputs, lost_values = _linear(of_values, heads.value_metrics(attn)[group], d)
    else:
        values, outputs, lost_values = _mean_maps(of_values, len(group), d)
    return (keys, queries, values, outputs), (lost_keys, lost_values)


def _keys(attn: Attention, moment: np.ndarray, asked: np.ndarray):
    """(keys, queries [m, H, H], share lost): turns and scales in each frequency's plane, any map of what RoPE leaves alone."""
    m, d = asked.shape[:2]
    if attn.k_norm is not None:
        return _mean_maps(moment, m, d)
    keys, queries, held, kept = np.zeros((m, d, d)), np.zeros((m, d, d)), 0.0, 0.0
    moment = moment.reshape(m, d, m, d)
    for a, b in heads.pairs_of(attn):
        down, up, sizes = _plane(moment, asked, np.array([a, b]))
        for g in range(m):
            keys[g][np.ix_([a, b], [a, b])] = heads.turn(down[g])
            queries[g][np.ix_([a, b], [a, b])] = heads.turn(up[g])
        held, kept = held + sizes.sum(), kept + sizes[-1]
    rest = np.setdiff1d(np.arange(d), heads.pairs_of(attn))
    if rest.size:
        block = moment[:, rest][..., rest].reshape(m * rest.size, -1)
        down, up, sizes = heads.principal(block, asked[:, rest][..., rest], rest.size)
        for g in range(m):
            at = slice(g * rest.size, (g + 1) * rest.size)
            keys[g][np.ix_(rest, rest)], queries[g][np.ix_(rest, rest)] = down[at], up[:, at].T
        held, kept = held + sizes.sum(), kept + sizes[: rest.size].sum()
    return keys, queries, 1 - kept / max(held, TINY)


def _plane(moment: np.ndarray, asked: np.ndarray, pair: np.ndarray):
    """One frequency -> (down complex[m], up complex[m], energies [m] ascending): k' = sum_g down_g k_g, and q up_g reads it."""
    down, up, sizes = heads.planes(moment, asked, *pair[:, None], 1)
    down, up = down.reshape(-1), up.reshape(-1)
    scale = np.sqrt(
        np.mean(np.abs(up) ** 2)
    )  # the pooled head is as large as those it stands for, and turned as they are
    turn = np.exp(-1j * np.angle(down.sum())) * scale
    return down * turn, up * turn / scale**2, sizes


def _linear(moment: np.ndarray, metrics: np.ndarray, d: int):
    down, up, sizes = heads.principal(moment, metrics, d)
    outputs = up.reshape(d, -1, d).swapaxes(0, 1)
    return down.reshape(-1, d, d), outputs, 1 - sizes[:d].sum() / max(sizes.sum(), TINY)


def _mean_maps(moment: np.ndarray, m: int, d: int):
    same = np.tile(np.eye(d), (m, 1, 1))
    spread = moment.reshape(m, d, m, d)
    whole = np.einsum("ghgh->", spread)
    return same / m, same, 1 - np.einsum("ghih->", spread) / m / max(whole, TINY)
