"""Attention turned into a recurrence of fixed state: Mamba-2, gated DeltaNet or lightning attention."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import ir
from optx.errors import PassError
from optx.ir import replace
from optx.nn.attention import Attention
from optx.nn.delta import GatedDelta
from optx.nn.linear_attention import LinearAttention
from optx.nn.ssm import Mamba2
from optx.passes import linear_fit as fit
from optx.passes.head_moments import as_float64, by_head, check_plain, gain, with_rows
from optx.passes.layer_choice import left_out, taken
from optx.passes.sliding_window import far_mass
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register

SMALL = 0.1  # rms of what meets silu: silu(s x) ~ s x / 2, so queries, keys and values stay linear
EPS = 1e-5  # of norms: near the square of what comes out of numbers that small, so what is far below it stays small
OPEN = 1.2784645  # silu of it is 1: a gate that changes nothing
BETA = -1.3862944  # its sigmoid is 0.2: the share of what a key holds that one token replaces
FAR = 64  # tokens back from which on `by: mass` counts attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linearize(PassOptions):
    to: Literal["mamba2", "gdn", "lightning"]  # gdn: gated DeltaNet
    layers: tuple[int, ...] | None = None  # that are converted, negative from the end; None: every matched layer
    keep_every: int | None = None  # with layers None: every n-th layer stays attention (4: a ratio of 3:1); None: none
    # Which those are. place: every n-th. On calibration text, as many: sensitivity: those whose conversion alone costs most KL of
    # the logits; mass: those that attend most to what is more than FAR tokens away, as layers that retrieve do.
    by: Literal["place", "sensitivity", "mass"] = "place"
    fit: bool = (
        True  # the output projection is fitted to what attention said on calibration text; False: attention's own
    )

    @property
    def needs(self):
        return frozenset({"inputs"}) if self.fit else frozenset()

    @property
    def unresolved(self) -> bool:
        return self.by != "place"

    def resolved(self, model: nnx.Module, windows: Sequence[np.ndarray]) -> "Linearize":
        """With `layers` in place of `keep_every`. Raises PassError where that says nothing."""
        if self.layers is not None or not self.keep_every:
            raise PassError(
                f"linearize.by: {self.by} chooses the layers that keep_every leaves attention: give it, and no layers"
            )
        all_of_them = dataclasses.replace(self, by="place", keep_every=None)
        worth = MEASURES[self.by](model, windows, all_of_them)
        # As many as by place, so that bytes are those planned.
        stay = sum((layer + 1) % self.keep_every == 0 for layer in worth)
        return dataclasses.replace(all_of_them, layers=taken(worth, stay))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """What a recurrence starts from. float64, of N query heads; kv heads are repeated."""

    q: np.ndarray  # [D + 1, N, H], the bias last; on calibration text, or on white noise, of rms SMALL
    k: np.ndarray
    v: np.ndarray
    rates: np.ndarray  # [N], of forgetting, a token

    @property
    def none(self) -> np.ndarray:
        """A projection to nothing."""
        return np.zeros_like(self.v)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """shape: sizes -> the module in shapes; parts: its attributes with weights, but for `out`; loud: what its output is
    multiplied by where that has rms 1."""

    shape: Callable[[dict], nnx.Module]
    parts: Callable[[nnx.Module, Start], Mapping]
    loud: float = 1.0


@register("linearize", axis=Axis.REPLACE, stage=Stage.ATTENTION, options=Linearize, exact=False, needs_healing=True)
def linearize(site: Site, attn: Attention, opt: Linearize) -> Mamba2 | GatedDelta | LinearAttention | Skipped:
    """softmax(q k^T) v with a cache that grows -> a state of [H, H] numbers a query head, which starts from attention's weights.

    Mamba-2: C <- q, B <- k, x <- v, out <- o (The Mamba in the Llama, arXiv:2408.15237; MOHAWK, arXiv:2408.10189); gated
    DeltaNet (arXiv:2412.06464) and lightning attention (arXiv:2401.04658) take q, k, v and o by their names. kv heads are
    repeated for the query heads that read them. Head n = 1..N forgets at 2^(-8 n / N) a token, whatever the token; gates are
    open, convolutions pass on the newest token, silu is met where it is linear, and each head's output is normed to the size of
    its values, as an average of them would have. With `fit`, W_o and its bias are then the ridge regression of what attention
    said on what the recurrence brings. Where queries and keys are normed the gains stay and the division goes (gated DeltaNet has
    its own). RoPE, sinks and soft caps have no counterpart and go.

    Layers with a window stay, their cache is bounded, and so does gated attention. States of all three are float32. Raises
    PassError without calibration text where `fit` wants it, and for layers that other passes have rewritten.
    """
    which = "attention; which ones, calibration text says" if opt.unresolved else "attention"
    if reason := check_plain(site, attn, "linearize"):
        return Skipped(reason)
    if reason := left_out(site, opt.layers, opt.keep_every, "linearize", which):
        return Skipped(reason)
    if attn.cache.share is not None:
        return Skipped(f"reads the cache of layer {attn.cache.share}")
    if attn.cache.window is not None:
        return Skipped(f"has a window of {attn.cache.window}, so its cache is bounded")
    if attn.gate is not None:
        return Skipped(f"its output has a {attn.gate} gate, which {opt.to} does not start from")
    form, d = FORMS[opt.to], attn.q.weight.get_value().shape[0]
    make = {"d": d, "heads": attn.heads, "head_dim": attn.head_dim, "bias": True, "eps": EPS}
    new = form.shape(make | {"dtype": jnp.dtype(attn.o.weight.get_value().dtype).name})
    if ir.is_abstract(attn):
        return new
    calls = fit.calls_of(site, "linearize") if opt.fit else ()
    start, sizes = started(attn, calls)
    new = replace(new, **form.parts(new, start))
    o = as_float64(attn.o.weight).reshape(attn.heads, attn.head_dim, d) * (form.loud * sizes)[:, None, None]
    bias = np.zeros(d) if attn.o.bias is None else as_float64(attn.o.bias)
    new = replace(new, out=with_rows(new.out, np.concatenate([o.reshape(-1, d), bias[None]])))
    return fit.fitted(new, attn, calls, site) if opt.fit else new


def started(attn: Attention, calls: Sequence[tuple]) -> tuple[Start, np.ndarray]:
    """(what the recurrence starts from, float64[N]: rms of the heads' values)."""
    moment = fit.moment_of(attn, calls)
    rows, sizes = {}, {}
    for name, norm in (("q", attn.q_norm), ("k", attn.k_norm), ("v", None)):
        part = getattr(attn, name)
        heads = by_head(part, part.weight.get_value().shape[1] // attn.head_dim)
        heads = heads if norm is None else heads * gain(norm)
        heads = np.repeat(heads, attn.heads // heads.shape[1], axis=1)
        flat = heads.reshape(len(heads), -1)
        square = np.einsum("dn,dn->n", flat, moment @ flat).reshape(attn.heads, -1).mean(1)
        sizes[name] = np.sqrt(np.maximum(square, np.finfo(np.float32).tiny))
        rows[name] = heads * (SMALL / sizes[name])[:, None]
    return Start(**rows, rates=2.0 ** (-8 * np.arange(1, attn.heads + 1) / attn.heads)), sizes["v"]


def _always(rows: np.ndarray, value: float) -> np.ndarray:
    """A projection that says `value` of every token. rows [D + 1, ...], the bias last."""
    out = np.zeros_like(rows)
    out[-1] = value
    return out


def _newest(new: nnx.Module) -> jax.Array:
    """Taps of a convolution that passes on the newest token."""
    return jnp.zeros_like(new.conv_weight.get_value()).at[-1].set(1)


def _dt_bias(rates: np.ndarray) -> jax.Array:
    """softplus of it is the rate, with A = -1."""
    return jnp.asarray(np.log(np.expm1(rates)), jnp.float32)


def _ones(norm: nnx.Module) -> nnx.Module:
    return replace(norm, weight=jnp.ones_like(norm.weight.get_value()))


def _flat(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _mamba2(make: dict) -> Mamba2:
    n = make["heads"]
    return Mamba2(**make, state_dim=make["head_dim"], groups=n, norm_groups=n)


def _mamba2_parts(new: Mamba2, start: Start) -> Mapping:
    """The skip weighs a token's own value as a key of its query's direction would."""
    rows = _flat(_always(start.v, OPEN), start.v, start.k, start.q, start.none[..., 0])
    own = SMALL**2 / 4 * new.state_dim
    return {
        "in_proj": with_rows(new.in_proj, rows),
        "conv_weight": _newest(new),
        "conv_bias": jnp.zeros_like(new.conv_bias.get_value()),
        "dt_bias": _dt_bias(start.rates),
        "a_log": jnp.zeros(new.heads, jnp.float32),
        "skip": jnp.full(new.heads, own, jnp.float32),
        "norm": _ones(new.norm),
    }


def _gdn(make: dict) -> GatedDelta:
    return GatedDelta(**make, key_heads=make["heads"], key_dim=make["head_dim"])


def _gdn_parts(new: GatedDelta, start: Start) -> Mapping:
    one = start.none[..., 0]
    return {
        "qkvz": with_rows(new.qkvz, _flat(start.q, start.k, start.v, _always(start.v, OPEN))),
        "ba": with_rows(new.ba, _flat(_always(one, BETA), one)),
        "conv_weight": _newest(new),
        "dt_bias": _dt_bias(start.rates),
        "a_log": jnp.zeros(new.heads, jnp.float32),
        "norm": _ones(new.norm),
    }


def _lightning_parts(new: LinearAttention, start: Start) -> Mapping:
    """All heads are normed together, so a head's queries take the length of its memory off its output."""
    kept = -np.expm1(-start.rates)[:, None]
    return {
        "qkv": with_rows(new.qkv, _flat(np.concatenate([start.q * kept, start.k, start.v], axis=-1))),
        "gate": with_rows(new.gate, start.none),
        "norm": _ones(new.norm),
    }


FORMS: Mapping[str, Form] = {
    "mamba2": Form(shape=_mamba2, parts=_mamba2_parts),
    "gdn": Form(shape=_gdn, parts=_gdn_parts),
    "lightning": Form(
        shape=lambda make: LinearAttention(**make), parts=_lightning_parts, loud=2.0
    ),  # its gate says 1/2
}


def _takes(model: nnx.Module, opt: Linearize) -> dict[int, str]:
    """Layers that the pass would convert, with their paths."""
    found, match = {}, re.compile(opt.match or ".*")
    for i, layer in enumerate(model.layers):
        path = f"layers/{i}/mixer"
        if isinstance(layer.mixer, Attention) and match.fullmatch(path):
            shapes = linearize(Site(path=path, layers=len(model.layers)), ir.abstract(layer.mixer), opt)
            found |= {} if isinstance(shapes, Skipped) else {i: path}
    return found


def _sensitivity(model: nnx.Module, windows: Sequence[np.ndarray], opt: Linearize) -> dict[int, float]:
    def convert(path, attn, seen):
        return linearize(Site(path=path, layers=len(model.layers), seen=seen), attn, opt)

    return fit.damage(model, windows, _takes(model, opt), convert)


def _mass(model: nnx.Module, windows: Sequence[np.ndarray], opt: Linearize) -> dict[int, float]:
    mass = far_mass(model, windows, FAR, 4)
    return {layer: mass[layer] for layer in _takes(model, opt)}


MEASURES = {"sensitivity": _sensitivity, "mass": _mass}
