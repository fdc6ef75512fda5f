"""Small parts: Linear, Embed, RMSNorm, gated MLPs, rotary embeddings.

Every part is built *abstract* (parameters are shapes) unless `rngs` is given; a checkpoint fills it. Weights may be dense
or `QTensor`: no part asks which. Shapes use the letters of `optx.tensor`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import tensor
from optx.errors import ConfigError, did_you_mean
from optx.formats import Format
from optx.pallas import dispatch
from optx.pallas.add_norm.reference import rms_norm
from optx.pallas.dispatch import OpChoice, OpSite
from optx.pallas.gated_act.reference import ACTIVATIONS


def param(shape, dtype, axes: tuple[str | None, ...], rngs: nnx.Rngs | None, init=None) -> nnx.Param:
    """A parameter with logical axis names: abstract without rngs, else drawn from `init` (lecun normal by default)."""
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes)
    init = init or nnx.initializers.lecun_normal()
    return nnx.Param(init(rngs.params(), shape, jnp.dtype(dtype)), axes=axes)


class Adapter(nnx.Module):
    """y = scale x @ down @ up with down [D, R], up [R, F]: what low-rank adaptation adds to a projection (LoRA, Hu et al. 2021,
    arXiv:2106.09685). Of concrete parts: up starts at 0."""

    def __init__(self, d, f, rank, *, scale=1.0, dtype="float32", rngs):
        self.down = param((d, rank), dtype, ("embed", None), rngs)
        self.up = param((rank, f), dtype, (None, "mlp"), rngs, nnx.initializers.zeros)
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.down.get_value() @ self.up.get_value() * jnp.asarray(self.scale, x.dtype)


@dataclasses.dataclass(frozen=True)
class Multiplied:
    """Stands for the input of a Linear whose weight a kernel has multiplied it by, together with the op that made it."""

    product: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:  # its first axes are those of the input
        return self.product.shape


class Linear(nnx.Module):
    """y = x @ weight + bias with weight [D, F], dense or quantized; where there is one, what an adapter adds."""

    def __init__(self, d, f, *, bias=False, dtype="float32", axes=("embed", "mlp"), rngs=None):
        self.weight = param((d, f), dtype, axes, rngs)
        self.bias = param((f,), dtype, axes[1:], rngs, nnx.initializers.zeros) if bias else None
        self.activations: Format | None = None  # that rows of x are rounded to before a packed weight; None: x as it is
        self.adapter: Adapter | None = None
        self.choices: tuple[OpChoice, ...] = ()

    def __call__(self, x: jax.Array | Multiplied) -> jax.Array:
        done = isinstance(x, Multiplied)
        y = x.product if done else contract(x, self.weight.get_value(), self.choices, self.activations)
        y = y if self.adapter is None else y + self.adapter(x)
        return y if self.bias is None else y + self.bias.get_value()

    def op_sites(self) -> tuple[OpSite, ...]:
        return _matmul_site(self.weight.get_value(), self.activations)

    def arrange(self, relayout: Callable | None) -> None:
        """Puts the weight into a kernel's order, in place; None: back into its canonical packing."""
        self.weight = arranged(self.weight, self.weight.get_value(), relayout or tensor.canonical)

    def split(self, sizes: Sequence[int]) -> list["Linear"]:
        """Linears with `sizes` outputs each, in order: slices of this weight and bias, whatever their form."""
        weight, parts, start = self.weight.get_value(), [], 0
        d, total = weight.shape
        assert sum(sizes) == total, f"{sizes} do not add up to {total}"
        for size in sizes:
            cut = functools.partial(jax.lax.slice_in_dim, start_index=start, limit_index=start + size)
            part = Linear(d, size, bias=self.bias is not None)
            part.activations = self.activations
            sliced = tensor.lift(functools.partial(tensor.columns, start=start, size=size), weight)
            part.weight = nnx.Param(sliced, axes=self.weight.get_metadata().get("axes"))
            if self.bias is not None:
                bias = tensor.lift(cut, self.bias.get_value())
                part.bias = nnx.Param(bias, axes=self.bias.get_metadata().get("axes"))
            parts.append(part)
            start += size
        return parts


def _matmul_site(weight, activations: Format | None = None) -> tuple[OpSite, ...]:
    weight = tensor.canonical(weight)
    facts = {"weight": weight, "dtype": jnp.dtype(weight.dtype).name}
    if not tensor.is_qtensor(weight):
        return (OpSite(op="matmul", args=facts),)
    return (OpSite(op="quant_matmul", args=facts | {"activations": activations}),)


def _gated_sites(down: Linear, activation: str, joined: bool = False) -> tuple[OpSite, ...]:
    weight = tensor.canonical(down.weight.get_value())
    facts = {"f": weight.shape[0], "dtype": jnp.dtype(weight.dtype).name, "activation": activation}
    return (OpSite(op="gated_act", args=facts), *(made_sites("gated_matmul", down, **facts) if joined else ()))


def _gated(part, gate: jax.Array, up: jax.Array | None) -> jax.Array:
    """down(act(gate) * up); up None: it lies beside the gate."""
    act = {"activation": part.activation}
    if makes("gated_matmul", part.choices, part.down):
        weight = part.down.weight.get_value()
        return part.down(Multiplied(dispatch.call("gated_matmul", part.choices, gate, weight, **act)))
    return part.down(dispatch.call("gated_act", part.choices, gate, up, **act))


def made_sites(op: str, linear: Linear, **facts) -> tuple[OpSite, ...]:
    """The product of a plain Linear by an op that makes its input as well."""
    sites = _matmul_site(linear.weight.get_value(), linear.activations) if type(linear) is Linear else ()
    return tuple(OpSite(op=op, args={**site.args, **facts}) for site in sites)


def makes(op: str, choices: tuple[OpChoice, ...], linear: Linear) -> bool:
    """Whether a kernel of such an op was chosen, and nothing but the weight reads the input."""
    return dispatch.lowered(op, choices) and linear.adapter is None


def arranged(like: nnx.Param, weight, relayout) -> nnx.Param:
    return nnx.Param(tensor.lift(relayout, weight), axes=like.get_metadata().get("axes"))


class Inner(Linear):
    """A projection whose weight its parent contracts itself: no op is called for it."""

    def op_sites(self) -> tuple[OpSite, ...]:
        return ()


class Fused:
    """A part that holds several projections in one weight."""

    entry: ClassVar[Linear | None] = None  # the projection that alone reads the part's input, if one does

    @property
    def first(self) -> Linear | None:
        """`entry` where a kernel makes its input (`norm_matmul`)."""
        return self.entry if self.entry is not None and makes("norm_matmul", self.choices, self.entry) else None

    def unfused(self) -> nnx.Module:
        """The plain part with the same numbers."""
        raise NotImplementedError


def contract(x, w, choices=(), activations: Format | None = None) -> jax.Array:
    """x[..., D] @ w[D, F], through the op for dense or packed weights; before packed ones x is rounded to `activations`."""
    if tensor.is_packed(w):
        return dispatch.call("quant_matmul", choices, x, w, activations=activations)
    return dispatch.call("matmul", choices, x, w)


class Embed(nnx.Module):
    """Rows of table [V, D]; `attend` is the tied output head, logits = x @ table.T."""

    def __init__(self, vocab, d, *, scale=1.0, dtype="float32", rngs=None):
        self.table = param((vocab, d), dtype, ("vocab", "embed"), rngs, nnx.initializers.normal(0.02))
        self.scale = scale
        self.head: nnx.Param | None = None  # the table once more, in the order of the kernel that `attend` runs
        self.choices: tuple[OpChoice, ...] = ()

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = tensor.take(self.table.get_value(), ids)
        # The factor is rounded to the activations' type, as in the published models.
        return x if self.scale == 1.0 else x * jnp.asarray(self.scale, x.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        table = self.table.get_value()
        if not tensor.is_qtensor(table):
            return tensor.matmul_rows(x, table)
        return contract(x, table.T if self.head is None else self.head.get_value(), self.choices)

    def op_sites(self) -> tuple[OpSite, ...]:
        table = self.table.get_value()
        return _matmul_site(table.T) if tensor.is_qtensor(table) else ()

    def arrange(self, relayout: Callable | None) -> None:
        """Sets `head`, in place: rows are looked up in the canonical table, which stays; None: drops it."""
        head = None if relayout is None else arranged(self.table, self.table.get_value().T, relayout)
        self.head = nnx.data(head) if head is not None else None


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight), in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, d, *, eps=1e-6, offset=0.0, out=None, dtype="float32", axes=("embed",), rngs=None):
        """out: dtype of y; None: that of x."""
        init = nnx.initializers.ones if offset == 0 else nnx.initializers.zeros
        self.weight = param((d,), dtype, axes, rngs, init)
        self.eps = eps
        self.offset = offset
        self.out = out

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight.get_value(), eps=self.eps, offset=self.offset, out=self.out)


class LayerNorm(nnx.Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, in float32 (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, d, *, eps=1e-5, bias=True, dtype="float32", axes=("embed",), rngs=None):
        self.weight = param((d,), dtype, axes, rngs, nnx.initializers.ones)
        self.bias = param((d,), dtype, axes, rngs, nnx.initializers.zeros) if bias else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * self.weight.get_value().astype(jnp.float32)
        return (y if self.bias is None else y + self.bias.get_value().astype(jnp.float32)).astype(x.dtype)


class MLP(nnx.Module):
    """down(act(up(x))), without a gate."""

    def __init__(self, d, f, *, activation, bias=False, dtype="float32", rngs=None):
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation {activation!r} is not known{did_you_mean(activation, ACTIVATIONS)}")
        self.up = Linear(d, f, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(f, d, bias=bias, dtype=dtype, axes=("mlp", "embed"), rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, d, f, *, activation="silu", bias=False, dtype="float32", rngs=None):
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation {activation!r} is not known{did_you_mean(activation, ACTIVATIONS)}")
        self.gate = Linear(d, f, bias=bias, dtype=dtype, rngs=rngs)
        self.up = Linear(d, f, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(f, d, bias=bias, dtype=dtype, axes=("mlp", "embed"), rngs=rngs)
        self.activation = activation
        self.choices: tuple[OpChoice, ...] = ()

    def __call__(self, x: jax.Array) -> jax.Array:
        return _gated(self, *self.project(x))

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """x [..., D] -> gate and up [..., F], or both side by side [..., 2F] where one matmul makes them, and None."""
        return self.gate(x), self.up(x)

    def op_sites(self) -> tuple[OpSite, ...]:
        return _gated_sites(self.down, self.activation)


class FusedGatedMLP(Fused, GatedMLP):
    """GatedMLP with gate and up in one weight [D, 2F]: one matmul, one read of x."""

    def __init__(self, gate_up: Linear, down: Linear, *, activation):
        self.gate_up = gate_up
        self.down = down
        self.activation = activation
        self.choices = ()

    def project(self, x):
        return self.gate_up(x), None

    @property
    def entry(self) -> Linear:
        return self.gate_up

    def op_sites(self) -> tuple[OpSite, ...]:
        return (*_gated_sites(self.down, self.activation, joined=True), *made_sites("norm_matmul", self.gate_up))

    def unfused(self) -> GatedMLP:
        d, both = self.gate_up.weight.get_value().shape
        plain = GatedMLP(d, both // 2, activation=self.activation)
        plain.gate, plain.up = self.gate_up.split([both // 2] * 2)
        plain.down = self.down
        return plain


class JoinedGatedMLP(nnx.Module):
    """down(act(gate) * up) with [gate | up] = gate_up(x), one weight [D, 2F] in checkpoints too (FusedGatedMLP is what a
    pass makes of two)."""

    def __init__(self, d, f, *, activation="silu", bias=False, dtype="float32", rngs=None):
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation {activation!r} is not known{did_you_mean(activation, ACTIVATIONS)}")
        self.gate_up = Linear(d, 2 * f, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(f, d, bias=bias, dtype=dtype, axes=("mlp", "embed"), rngs=rngs)
        self.activation = activation
        self.choices: tuple[OpChoice, ...] = ()

    def __call__(self, x: jax.Array) -> jax.Array:
        return _gated(self, self.gate_up(x), None)

    def op_sites(self) -> tuple[OpSite, ...]:
        return _gated_sites(self.down, self.activation, joined=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding of the first `dim` numbers of a head (arXiv:2104.09864): halves rotated against each other, or
    neighbours where `interleaved`.

    factor > 1 stretches positions: `linear` divides all frequencies, `llama3` only those of wavelengths longer than
    original / low_freq, with a smooth step up to original / high_freq (Llama 3.1's config names). `yarn` (arXiv:2309.00071)
    divides those that turn less than `beta_slow` times within `original` tokens, keeps those that turn more than
    `beta_fast` times, with a ramp between; what it turns grows by `attention_factor`.
    """

    theta: float
    dim: int
    scaling: str = "none"
    factor: float = 1.0
    low_freq: float = 1.0
    high_freq: float = 4.0
    original: int = 8192  # context length of pre-training, tokens
    factors: tuple[float, ...] = ()  # scaling "factors": divides each frequency (GGUF's rope_freqs)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: the ramp begins and ends at whole numbers of a head
    attention_factor: float = 1.0  # multiplies cos and sin
    interleaved: bool = False  # numbers 2i and 2i + 1 are a pair, not i and i + dim / 2
    rotation: ClassVar[None] = None  # what heads go through after their turns, of a part in its place

    def __post_init__(self):
        if self.dim < 2 or self.dim % 2:
            raise ConfigError(f"rotary embedding of {self.dim} numbers a head; allowed: an even number, at least 2")
        if self.scaling == "yarn" and self.theta <= 1:
            raise ConfigError(f"rotary embedding with yarn and theta {self.theta:g}; allowed: above 1")

    @property
    def keys(self) -> "Rope":
        """What keys go through: parts in its place may treat them otherwise than queries."""
        return self

    def frequencies(self) -> np.ndarray:
        """float32[dim / 2], radians a position."""
        # HF computes the exponent in float32; staying with it keeps angles equal at long positions.
        exponent = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        freq = (1 / np.float32(self.theta) ** exponent).astype(np.float32)
        if self.scaling == "none":
            return freq
        if self.scaling == "linear":
            return freq / np.float32(self.factor)
        if self.scaling == "llama3":
            wavelength = 2 * math.pi / freq
            smooth = (self.original / wavelength - self.low_freq) / (self.high_freq - self.low_freq)
            smooth = np.clip(smooth, 0, 1)
            return ((1 - smooth) * freq / self.factor + smooth * freq).astype(np.float32)
        if self.scaling == "factors":
            return freq / np.asarray(self.factors, np.float32)
        if self.scaling == "yarn":
            kept = (1 - self._ramp()).astype(np.float32)
            return freq / np.float32(self.factor) * (1 - kept) + freq * kept
        raise ConfigError(f"rope scaling {self.scaling!r}; allowed: none, linear, llama3, factors, yarn")

    def _ramp(self) -> np.ndarray:
        """float32[dim / 2], from 0 where yarn keeps a frequency to 1 where it divides it."""
        span = math.log(self.original), math.log(2 * math.pi), 2 * math.log(self.theta)
        low, high = (self.dim * (span[0] - math.log(b) - span[1]) / span[2] for b in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        high += 0.001 if low == high else 0  # as HF does, so as not to divide by 0
        return np.clip((np.arange(self.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x [T, N, H], positions int32[T] -> x with its first `dim` numbers rotated."""
        cos, sin = (x[:, None] for x in self.turns(positions))
        part, rest = jnp.split(x.astype(jnp.float32), [self.dim], axis=-1)
        first, second = (part[..., ::2], part[..., 1::2]) if self.interleaved else jnp.split(part, 2, axis=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        if self.interleaved:
            turned = [jnp.stack(turned, axis=-1).reshape(part.shape)]
        return jnp.concatenate([*turned, rest], axis=-1).astype(x.dtype)

    def turns(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(cos, sin) float32[T, dim / 2] of each pair's angle at positions int32[T], times `attention_factor`."""
        angle = positions.astype(jnp.float32)[:, None] * jnp.asarray(self.frequencies())
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return (cos, sin) if self.attention_factor == 1 else (cos * self.attention_factor, sin * self.attention_factor)

    def __str__(self):
        stretch = "" if self.scaling == "none" else f" {self.scaling} x{self.factor:g}"
        return f"rope {self.theta:g}/{self.dim}{stretch}{' interleaved' if self.interleaved else ''}"
