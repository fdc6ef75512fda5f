"""Keys and values of all kv heads in one latent: attention by heads turned into multi-head latent attention."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from optx import ir
from optx.errors import PassError
from optx.ir import replace
from optx.nn.attention import Attention
from optx.nn.grouped_mla import GroupedMLA, PartialRope
from optx.passes import head_moments as heads
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register

SHARES = {"all": 1, "2_norm": 4, "pca": 2}  # 1 / n of a head's rotated numbers are rotated where a recipe does not say
TINY = np.finfo(float).tiny
TRACE = 1e-6  # of the moments of weights in those of text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mla(PassOptions):
    rank: int | None = None  # numbers of a latent, without rotated keys; None: by kv_cut
    # Share of the cache's bytes that goes, all that is cached counted; None: by rank, or full rank.
    kv_cut: float | None = None
    # Which keys stay rotated: all of them; of each kv head the pairs that matter most; one key for all heads (DeepSeek's form).
    rope: Literal["all", "2_norm", "pca"] = "all"
    # Rotated numbers that stay: with 2_norm of each kv head, None a quarter of them; with pca of the one key, None half a head's.
    rope_dim: int | None = None
    # What truncation minimises: the error of weights, or on calibration text that of keys and values made equally large, or of
    # what attention makes of them.
    least: Literal["weights", "keys_and_values", "attention"] = "attention"

    @property
    def exact(self) -> bool:
        return self.rank is None and self.kv_cut is None and self.rope == "all"

    @property
    def needs(self):
        return frozenset() if self.exact or self.least == "weights" else frozenset({"inputs"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one layer's latent."""

    slices: int  # rotated keys that are cached
    rope_dim: int  # numbers of each
    nope_dim: int  # numbers of a head's key that come out of the latent
    rank: int
    full: int  # rank at which nothing is lost


@register("mla", axis=Axis.STATE, stage=Stage.ATTENTION, options=Mla, exact=False, needs_healing=True)
def mla(site: Site, attn: Attention, opt: Mla) -> GroupedMLA | Skipped:
    """k_g = s_g [W_UK,g c, rope(x W_KR)_g], v_g = W_UV,g c with one latent c = x W_DKV of `rank` numbers for all kv heads, whose
    numbers that are not rotated are truncated to the best `rank` directions of [keys, values] together.

    At full rank with all keys rotated the layer computes what it did, also with biases (in W_DKV), windows, sinks, gates and
    soft caps, and under norms of queries and keys: s_g = 1 / rms of the head's keys is cached a token and kv head as a scale of
    its logits, the norm's gain is in W_UK and W_KR. Norms behind attention see what they saw.

    2_norm: of each kv head the `rope_dim` / 2 frequencies with the largest |q| |k| stay rotated, with joint SVD of the rest
    (MHA2MLA, arXiv:2502.14837). pca: at each frequency the heads' keys, as complex numbers, are turned to their principal
    component, which alone stays rotated; rope_dim below a head's folds neighbouring frequencies into one (RoRoPE and FreqFold,
    TransMLA, arXiv:2502.07864, with turns in the plane, not only between heads).

    attention weighs errors of keys by the queries that meet them and by what their values are worth, of values by W_o.
    """
    if reason := heads.check_plain(site, attn, "mla"):
        return Skipped(reason)
    if attn.cache.share is not None:
        return Skipped(f"reads the cache of layer {attn.cache.share}")
    sizes = sizes_of(attn, opt, f"mla at {site.path}")
    rope = attn.rope
    if rope is not None and opt.rope != "all":
        rope = PartialRope(sizes.slices, sizes.rope_dim, rope.attention_factor)
    new = GroupedMLA(attn, rank=sizes.rank, slices=sizes.slices, nope_dim=sizes.nope_dim, rope=rope)
    if ir.is_abstract(attn):
        return new
    seen = heads.moments(site, attn, bool(opt.needs), "mla")
    return filled(new, attn, opt, sizes, seen)


def sizes_of(attn: Attention, opt: Mla, where: str) -> Sizes:
    """Raises PassError for options that do not fit the layer, with the numbers that would."""
    k, d, turned = attn.kv_heads, attn.head_dim, 0 if attn.rope is None else attn.rope.dim
    slices, rope_dim, nope_dim = _rotated(attn, opt, turned, where)
    inputs = attn.q.weight.get_value().shape[0] + (attn.k.bias is not None or attn.v.bias is not None)
    gone = rope_dim if opt.rope == "pca" else 0  # what is rotated is taken out of the others
    full = min(inputs, k * (nope_dim + d) - gone)
    if opt.rank is not None and opt.kv_cut is not None:
        raise PassError(f"{where}: rank {opt.rank} and kv_cut {opt.kv_cut:g}; allowed: one of them")
    if opt.kv_cut is not None and not 0 <= opt.kv_cut < 1:
        raise PassError(f"{where}: kv_cut {opt.kv_cut:g}; allowed: at least 0 and below 1")
    rank = full if opt.rank is None else opt.rank
    if opt.kv_cut is not None:
        one = attn.cache.unit_bytes / (2 * k * d)
        scales = 0 if attn.k_norm is None else k * max(one, 2)
        rank = min(full, int((1 - opt.kv_cut) * attn.cache.unit_bytes / one - slices * rope_dim - scales / one + 1e-9))
    if not 1 <= rank <= full:
        what = f"rank {rank}" if opt.kv_cut is None else f"kv_cut {opt.kv_cut:g} leaves a rank of {rank}"
        raise PassError(
            f"{where}: {what} beside {slices * rope_dim} rotated numbers of {2 * k * d} that are cached now; "
            f"allowed: 1 to {full}, the full rank"
        )
    return Sizes(slices=slices, rope_dim=rope_dim, nope_dim=nope_dim, rank=rank, full=full)


def _rotated(attn: Attention, opt: Mla, turned: int, where: str) -> tuple[int, int, int]:
    """Slices, numbers of each, and numbers of a head's key that are not rotated."""
    k, d, kept = attn.kv_heads, attn.head_dim, opt.rope_dim
    if kept is not None and opt.rope == "all":
        raise PassError(f"{where}: rope_dim {kept} with rope: all; leave it out, or take 2_norm or pca")
    if not turned:
        return 0, 0, d
    if kept is None:
        kept = max(2, turned // SHARES[opt.rope] // 2 * 2)
    if opt.rope == "all":
        return k, turned, d - turned
    if opt.rope == "2_norm":
        if kept % 2 or not 2 <= kept <= turned:
            raise PassError(f"{where}: rope_dim {kept}; allowed: an even number, 2 to {turned}, what a head rotates")
        return k, kept, d - kept
    if kept % 2 or not 2 <= kept <= k * turned or (turned % kept and kept % turned):
        raise PassError(
            f"{where}: rope_dim {kept}; allowed: an even number that divides {turned}, what a head rotates, or a "
            f"multiple of it up to {k * turned}"
        )
    return 1, kept, d


def filled(new: GroupedMLA, attn: Attention, opt: Mla, sizes: Sizes, seen: heads.Moments) -> GroupedMLA:
    """The layer with weights. Rows of weights are [D + 1, ...], the bias last."""
    k, d = attn.kv_heads, attn.head_dim
    rows, frame = _rows(attn), FRAMES[opt.rope](attn, sizes, seen, opt)
    down, up = _truncated(attn, opt, sizes, seen, frame, rows)
    turned = rows[:, : k * d] @ frame.rotated
    q = heads.by_head(attn.q, attn.heads)
    asked = frame.asked if new.query_map is None else np.tile(np.eye(d), (k, 1, 1))
    own = np.einsum("dkgh,khi->dkgi", q[..., :d].reshape(len(q), k, -1, d), asked).reshape(len(q), attn.heads, -1)
    parts = {
        "q": heads.with_rows(new.q, np.concatenate([own, q[..., d:]], axis=-1)),
        "kv_a": heads.with_rows(new.kv_a, np.concatenate([rows @ down, turned], axis=1)),
        "kv_b": replace(new.kv_b, weight=jnp.asarray(up, new.kv_b.weight.get_value().dtype)),
    }
    if isinstance(new.rope, PartialRope):
        parts["rope"] = replace(new.rope, frequencies=jnp.asarray(frame.frequencies, jnp.float32))
    if new.query_map is not None:
        parts["query_map"] = jnp.asarray(frame.asked[..., d:], new.query_map.get_value().dtype)
    if new.head_norm is not None:  # of numbers that stand in another order, at most
        gains = np.repeat(heads.gain(attn.q_norm) @ asked, attn.heads // k, axis=0)
        weight = jnp.asarray(gains, new.head_norm.weight.get_value().dtype)
        parts["head_norm"] = replace(new.head_norm, weight=weight)
    return replace(new, **parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """How keys come apart: float64, K kv heads of H numbers, Hn + Hr of a query."""

    kept: np.ndarray  # [K H, K Hn]: keys that go into the latent
    rotated: np.ndarray  # [K H, S Hr]: keys that stay rotated
    asked: np.ndarray  # [K, H, Hn + Hr]: what queries of a kv head become
    frequencies: np.ndarray  # [S, Hr / 2] of what stays rotated


def _all(attn: Attention, sizes: Sizes, seen: heads.Moments, opt: Mla) -> Frame:
    """Every number of a head that is rotated stays so, in its order."""
    turned = np.arange(sizes.rope_dim)
    return _picked(attn, [turned] * attn.kv_heads, np.empty((attn.kv_heads, 0)))


def _by_norm(attn: Attention, sizes: Sizes, seen: heads.Moments, opt: Mla) -> Frame:
    """Of each kv head the frequencies with the largest root of E|q|^2 E|k|^2."""
    if not sizes.slices:
        return _all(attn, sizes, seen, opt)
    k, d, pairs = attn.kv_heads, attn.head_dim, heads.pairs_of(attn)
    held = np.diag(seen.stored)[: k * d].reshape(k, d)
    asked = np.einsum("khh->kh", seen.queries.reshape(k, -1, d, d).sum(1))
    worth = held[:, pairs].sum(-1) * asked[:, pairs].sum(-1)
    best = np.sort(np.argsort(-worth, axis=1, kind="stable")[:, : sizes.rope_dim // 2], axis=1)
    return _picked(attn, [pairs[chosen].T.reshape(-1) for chosen in best], attn.rope.frequencies()[best])


def _picked(attn: Attention, picked: list[np.ndarray], frequencies: np.ndarray) -> Frame:
    """Numbers `picked` of each kv head stay rotated, the others go into the latent."""
    d = attn.head_dim
    same, keep, turn, asked = np.eye(d), [], [], []
    for chosen in picked:
        rest = np.setdiff1d(np.arange(d), chosen)
        keep.append(same[:, rest] * _unturned(attn)[rest])
        turn.append(same[:, chosen])
        asked.append(np.concatenate([same[:, rest], same[:, chosen]], axis=1))
    return Frame(
        kept=heads.block_diagonal(keep),
        rotated=heads.block_diagonal(turn),
        asked=np.stack(asked),
        frequencies=frequencies,
    )


def _unturned(attn: Attention) -> np.ndarray:
    """float64[H]: what a number of a key is multiplied by where it is no longer rotated: cos and sin of yarn have a factor."""
    out = np.ones(attn.head_dim)
    if attn.rope is not None:
        out[: attn.rope.dim] = attn.rope.attention_factor**2
    return out


def _principal_keys(attn: Attention, sizes: Sizes, seen: heads.Moments, opt: Mla) -> Frame:
    """The principal components of all heads' keys, a frequency or a fold of several at a time, stay rotated by the first."""
    if not sizes.slices:
        return _all(attn, sizes, seen, opt)
    k, d, pairs = attn.kv_heads, attn.head_dim, heads.pairs_of(attn)
    fold, count = max(1, 2 * len(pairs) // sizes.rope_dim), max(1, sizes.rope_dim // (2 * len(pairs)))
    moment = seen.stored[: k * d, : k * d].reshape(k, d, k, d)
    asked = seen.queries.reshape(k, -1, d, d).sum(1)
    half = sizes.rope_dim // 2
    down, up = np.zeros((k, d, 2, half)), np.zeros((k, d, 2, half))
    for i in range(len(pairs) // fold):
        first, second = pairs[i * fold : (i + 1) * fold].T
        at = np.arange(count) * (len(pairs) // fold) + i
        *found, _ = heads.planes(moment, asked if opt.least == "attention" else None, first, second, count)
        for out, z in zip((down, up), found, strict=True):  # complex[K, fold, count]
            out[:, first[:, None], 0, at], out[:, first[:, None], 1, at] = z.real, z.imag
            out[:, second[:, None], 0, at], out[:, second[:, None], 1, at] = -z.imag, z.real
    down, up = down.reshape(k * d, -1), up.reshape(k * d, -1)
    kept = (np.eye(k * d) - down @ up.T) * np.tile(_unturned(attn), k)
    asked = np.concatenate([np.tile(np.eye(d), (k, 1, 1)), up.reshape(k, d, -1)], axis=-1)
    frequencies = np.tile(attn.rope.frequencies()[::fold], count)[None]
    return Frame(kept=kept, rotated=down, asked=asked, frequencies=frequencies)


FRAMES = {"all": _all, "2_norm": _by_norm, "pca": _principal_keys}


def _rows(attn: Attention) -> np.ndarray:
    """float64[D + 1, 2KH]: weights of keys, with the gain of their norm, and of values; their biases last."""
    keys, values = (heads.by_head(part, attn.kv_heads) for part in (attn.k, attn.v))
    keys = keys if attn.k_norm is None else keys * heads.gain(attn.k_norm)
    return np.concatenate([part.reshape(len(part), -1) for part in (keys, values)], axis=1)


def _truncated(
    attn: Attention, opt: Mla, sizes: Sizes, seen: heads.Moments, frame: Frame, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(down [2KH, R], up [R, K (Hn + H)]): a latent of [keys, values], and of it each head's unrotated key and value."""
    wanted = _wanted(attn, sizes, frame)
    if sizes.rank == wanted.shape[1]:
        return wanted, np.eye(sizes.rank)
    if sizes.rank == sizes.full:
        moment, metrics = wanted.T @ (rows.T @ rows) @ wanted, _alike(attn, sizes, seen, frame, None)
    else:
        moment, metrics = _weighed(attn, opt, sizes, seen, frame, rows)
    down, up, _ = heads.principal(moment, metrics, sizes.rank)
    return wanted @ down, up


def spectrum(attn: Attention, opt: Mla, sizes: Sizes, seen: heads.Moments) -> np.ndarray:
    """float64, descending: what each number of a latent would hold, as `least` counts."""
    frame = FRAMES[opt.rope](attn, sizes, seen, opt)
    return heads.principal(*_weighed(attn, opt, sizes, seen, frame, _rows(attn)), sizes.full)[2][: sizes.full]


def _wanted(attn: Attention, sizes: Sizes, frame: Frame) -> np.ndarray:
    """float64[2KH, K (Hn + H)]: of [keys, values] each head's unrotated key and its value."""
    k, d, n = attn.kv_heads, attn.head_dim, sizes.nope_dim
    wanted = np.zeros((2, k * d, k, n + d))
    wanted[0, ..., :n] = frame.kept.reshape(k * d, k, n)
    wanted[1, ..., n:] = np.eye(k * d).reshape(k * d, k, d)
    return wanted.reshape(2 * k * d, -1)


def _weighed(attn: Attention, opt: Mla, sizes: Sizes, seen: heads.Moments, frame: Frame, rows: np.ndarray):
    """(E[w w^T], metrics by block) of what is wanted, with a trace of what inputs as white noise would give: text need not reach
    every direction."""
    wanted, text, plain = _wanted(attn, sizes, frame), _heard(attn, seen), rows.T @ rows
    moment = wanted.T @ (text + TRACE * np.trace(text) / max(np.trace(plain), TINY) * plain) @ wanted
    return moment, METRICS[opt.least](attn, sizes, seen, frame, moment)


def _heard(attn: Attention, seen: heads.Moments) -> np.ndarray:
    """E[y y^T] without the keys' mean: what all tokens share moves all logits of a query alike and needs no direction, where
    softmax is over nothing but tokens and the scale of logits is 1."""
    moment, width = seen.stored.copy(), attn.kv_heads * attn.head_dim
    if attn.k_norm is None and attn.sinks is None:
        moment[:width] -= np.outer(seen.mean[:width], seen.mean)
        moment[width:, :width] = moment[:width, width:].T
    return moment


def _alike(attn, sizes, seen, frame, moment):
    return [np.eye(size) for size in (sizes.nope_dim, attn.head_dim) * attn.kv_heads]


def _balanced(attn, sizes, seen, frame, moment):
    """Keys and values as if both had the same energy."""
    held = np.diag(moment).reshape(attn.kv_heads, -1)
    keys, values = held[:, : sizes.nope_dim].sum(), held[:, sizes.nope_dim :].sum()
    return [np.eye(sizes.nope_dim) * (values / max(keys, TINY)), np.eye(attn.head_dim)] * attn.kv_heads


def _attended(attn, sizes, seen, frame, moment):
    """An error of a logit moves the output by it times what the head's values are worth behind W_o; one of a value by W_o."""
    k, d, n = attn.kv_heads, attn.head_dim, sizes.nope_dim
    shared = attn.heads // k
    o = heads.as_float64(attn.o.weight).reshape(attn.heads, d, -1)
    cost = np.einsum("nhd,nid->nhi", o, o)
    values = seen.stored[k * d :, k * d :].reshape(k, d, k, d)
    out = []
    for g in range(k):
        mine = slice(g * shared, (g + 1) * shared)
        worth = np.einsum("nhi,ih->n", cost[mine], values[g, :, g]) * attn.scale**2
        asked = np.einsum("n,nhi->hi", worth, seen.queries[mine])
        unturned = frame.asked[g][:, :n]
        out += [unturned.T @ asked @ unturned, cost[mine].sum(0)]
    return out


METRICS = {"weights": _alike, "keys_and_values": _balanced, "attention": _attended}
