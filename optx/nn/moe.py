"""Mixture of experts: a router that picks K of E experts a token, and experts that run as grouped matmuls.

No capacity: every token reaches its experts. Routing is in float32.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from optx import tensor
from optx.errors import ConfigError
from optx.nn.core import ACTIVATIONS, Linear, arranged, param
from optx.nn.recorder import Recorder
from optx.pallas import dispatch
from optx.pallas.dispatch import OpChoice, OpSite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Where T tokens go. `scores` are those of all experts, for balance losses."""

    weights: jax.Array  # float32[T, K]
    experts: jax.Array  # int32[T, K]
    scores: jax.Array  # float32[T, E], before any selection bias


class Router(nnx.Module):
    """scores = f(x W [+ b]); the K best by score [+ selection bias], within the best groups; weights from their scores.

    score: softmax (Mixtral, arXiv:2401.04088) or sigmoid (DeepSeek-V3, arXiv:2412.19437). normalized: weights are divided by
    their sum. With softmax and `normalized` that equals a softmax over the chosen logits. groups > 1: experts lie in groups,
    of which the `kept` best are looked at, a group being worth the sum of its two best. gain: the chosen are summed, not
    averaged: each weighs 1 + gain_e score_e, 0 at the start, through which a router that was not trained can learn (CMoE,
    arXiv:2502.04416).
    """

    def __init__(
        self, d, experts, *, top_k, score="softmax", normalized=True, scale=1.0, bias=False, selection_bias=False,
        groups=1, kept=1, gain=False, dtype="float32", rngs=None,
    ):  # fmt: skip
        """bias: of the logits; selection_bias: added to scores for choosing only (`balanced_bias` moves it)."""
        whole = experts % groups == 0 and 1 <= kept <= groups
        if not whole or not 1 <= top_k <= kept * (experts // groups):
            raise ConfigError(f"router: {top_k} of {experts} experts in {kept} of {groups} groups does not work out")
        self.experts, self.top_k, self.score, self.normalized, self.scale = experts, top_k, score, normalized, scale
        self.groups, self.kept = groups, kept
        self.weight = param((d, experts), dtype, ("embed", "experts"), rngs)
        self.bias = param((experts,), dtype, ("experts",), rngs, nnx.initializers.zeros) if bias else None
        self.selection_bias = (
            param((experts,), "float32", ("experts",), rngs, nnx.initializers.zeros) if selection_bias else None
        )
        self.gain = param((experts,), "float32", ("experts",), rngs, nnx.initializers.zeros) if gain else None

    def __call__(self, x: jax.Array) -> Routing:
        """x [T, D] -> Routing."""
        logits = jnp.dot(x.astype(jnp.float32), tensor.dense(self.weight.get_value()).astype(jnp.float32))
        if self.bias is not None:
            logits += self.bias.get_value().astype(jnp.float32)
        scores = jax.nn.softmax(logits, axis=-1) if self.score == "softmax" else jax.nn.sigmoid(logits)
        choice = scores if self.selection_bias is None else scores + self.selection_bias.get_value()
        _, experts = jax.lax.top_k(self._within_groups(choice), self.top_k)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.normalized:
            weights /= jnp.sum(weights, axis=-1, keepdims=True) + (1e-20 if self.score == "sigmoid" else 0)
        if self.gain is not None:
            weights = 1 + self.gain.get_value()[experts] * weights
        return Routing(weights=weights * self.scale, experts=experts.astype(jnp.int32), scores=scores)

    def _within_groups(self, choice):
        if self.groups == 1:
            return choice
        by_group = choice.reshape(choice.shape[0], self.groups, -1)
        worth = jnp.sum(jax.lax.top_k(by_group, min(2, by_group.shape[-1]))[0], axis=-1)
        _, best = jax.lax.top_k(worth, self.kept)
        kept = jnp.any(best[..., None] == jnp.arange(self.groups), axis=1)
        return jnp.where(kept[..., None], by_group, -jnp.inf).reshape(choice.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glu:
    """How gate and up become one: act(gate) * (up + shift); `limit` clamps gate from above and up to both sides."""

    activation: str = "silu"
    limit: float | None = None
    slope: float = 1.0  # silu only: gate * sigmoid(slope * gate)
    shift: float = 0.0

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        if self.limit is not None:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        gate = gate * jax.nn.sigmoid(self.slope * gate) if self.slope != 1 else ACTIVATIONS[self.activation](gate)
        return gate * (up + self.shift if self.shift else up)

    def __str__(self):
        said = {"slope": (self.slope, 1.0), "shift": (self.shift, 0.0), "limit": (self.limit, None)}
        return " ".join([self.activation, *(f"{name} {x:g}" for name, (x, usual) in said.items() if x != usual)])


class GroupedLinear(nnx.Module):
    """y = x @ weight[e] + bias[e] for runs of tokens of one expert; weight [E, D, F], dense or packed."""

    def __init__(self, experts, d, f, *, bias=False, dtype="float32", axes=("experts", "embed", "mlp"), rngs=None):
        self.experts = experts
        self.weight = param((experts, d, f), dtype, axes, rngs, nnx.initializers.lecun_normal(batch_axis=0))
        self.bias = param((experts, f), dtype, (axes[0], axes[2]), rngs, nnx.initializers.zeros) if bias else None
        self.choices: tuple[OpChoice, ...] = ()

    def __call__(self, x: jax.Array, sizes: jax.Array, owners: jax.Array) -> jax.Array:
        """x [T, D] sorted by expert, int32[E] tokens of each, int32[T] expert of each token -> [T, F]."""
        y = dispatch.call("grouped_matmul", self.choices, x, self.weight.get_value(), sizes)
        return y if self.bias is None else y + self.bias.get_value()[owners]

    def op_sites(self) -> tuple[OpSite, ...]:
        weight = self.weight.get_value()
        facts = {"weight": tensor.canonical(weight), "dtype": jnp.dtype(weight.dtype).name}
        return (OpSite(op="grouped_matmul", args=facts),)

    def arrange(self, relayout: Callable | None) -> None:
        """Puts packed weights into a kernel's order, in place; None: back into their canonical packing."""
        weight = self.weight.get_value()
        if tensor.is_packed(weight):
            self.weight = arranged(self.weight, weight, relayout or tensor.canonical)


class Experts(nnx.Module):
    """E gated MLPs, gate and up in one weight (`gate_up` [E, D, 2F], gate first); gated False: down(act(up(x)))."""

    def __init__(self, experts, d, f, *, glu: Glu | None = None, gated=True, bias=False, dtype="float32", rngs=None):
        self.glu, self.gated, self.experts = glu or Glu(), gated, experts
        self.active = 1.0  # share of the experts that a token takes
        wide = GroupedLinear(experts, d, 2 * f if gated else f, bias=bias, dtype=dtype, rngs=rngs)
        self.gate_up, self.up = (wide, None) if gated else (None, wide)
        axes = ("experts", "mlp", "embed")
        self.down = GroupedLinear(experts, f, d, bias=bias, dtype=dtype, axes=axes, rngs=rngs)

    def __call__(self, x: jax.Array, routing: Routing) -> jax.Array:
        """x [T, D] -> sum over the K chosen experts of weight * expert(x), [T, D]."""
        return jnp.einsum("tk,tkd->td", routing.weights, self.outputs(x, routing.experts)).astype(x.dtype)

    def outputs(self, x: jax.Array, chosen: jax.Array) -> jax.Array:
        """x [T, D], int32[T, K] -> what each chosen expert makes of the token, float32[T, K, D]."""
        tokens, k = chosen.shape
        flat = chosen.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        owners = flat[order]
        sizes = jnp.zeros(self.experts, jnp.int32).at[flat].add(1)
        y = x[order // k]
        if self.gated:
            gate, up = jnp.split(self.gate_up(y, sizes, owners), 2, axis=-1)
            y = self.glu(gate, up)
        else:
            y = ACTIVATIONS[self.glu.activation](self.up(y, sizes, owners))
        y = self.down(y, sizes, owners).astype(jnp.float32)
        return y[jnp.argsort(order)].reshape(tokens, k, -1)


class LatentExperts(nnx.Module):
    """leave(inner(enter(x))): experts that work in a narrower space of R numbers, which all share; the router sees x."""

    def __init__(self, d, latent, inner: Experts, *, bias=False, dtype="float32", rngs=None):
        self.enter = Linear(d, latent, bias=bias, dtype=dtype, axes=("embed", "latent"), rngs=rngs)
        self.inner = inner
        self.leave = Linear(latent, d, bias=bias, dtype=dtype, axes=("latent", "embed"), rngs=rngs)

    @property
    def active(self) -> float:
        """Both projections are run for every token; `inner` says what it runs."""
        return 1.0

    @active.setter
    def active(self, share: float) -> None:
        self.inner.active = share

    def __call__(self, x: jax.Array, routing: Routing) -> jax.Array:
        return self.leave(self.inner(self.enter(x), routing))

    def outputs(self, x: jax.Array, chosen: jax.Array) -> jax.Array:
        """As `Experts.outputs`, without the bias that leaving adds once."""
        return self.inner.outputs(self.enter(x), chosen) @ tensor.dense(self.leave.weight.get_value()).astype(
            jnp.float32
        )


class MoE(nnx.Module):
    """experts(x) [+ shared(x), which every token takes, times sigmoid(shared_gate(x)) where there is one].

    merged: of what the router calls expert e, the index of the one that stands for it now; None: each for itself.
    """

    def __init__(self, router: Router, experts: Experts, *, shared: nnx.Module | None = None, shared_gate=None):
        self.router, self.experts, self.shared = router, experts, shared
        experts.active = router.top_k / router.experts
        self.shared_gate: Linear | None = shared_gate
        self.merged: tuple[int, ...] | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        routing = self.router(x)
        recorded.add(lambda: routing)
        if self.merged is not None:
            routing = dataclasses.replace(routing, experts=jnp.asarray(self.merged, jnp.int32)[routing.experts])
        y = self.experts(x, routing)
        if self.shared is None:
            return y
        shared = self.shared(x)
        return y + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * shared)


recorded: Recorder[Routing] = Recorder("routings")  # of every MoE


def load(routing: Routing, valid: jax.Array | None = None) -> jax.Array:
    """Tokens that each expert gets, float32[E]; valid bool[T]: which tokens count."""
    ones = jnp.ones(routing.experts.shape, jnp.float32)
    ones = ones if valid is None else ones * valid[:, None]
    return jnp.zeros(routing.scores.shape[-1], jnp.float32).at[routing.experts].add(ones)


def balance_loss(routing: Routing, valid: jax.Array | None = None) -> jax.Array:
    """E sum_e f_e P_e: share of choices times mean score (Switch Transformer, arXiv:2101.03961, eq. 4); 1 when even."""
    valid = jnp.ones(routing.scores.shape[0], bool) if valid is None else valid
    share = load(routing, valid) / jnp.maximum(jnp.sum(valid) * routing.experts.shape[-1], 1)
    scores = routing.scores / jnp.sum(routing.scores, axis=-1, keepdims=True)
    mean = jnp.sum(scores * valid[:, None], axis=0) / jnp.maximum(jnp.sum(valid), 1)
    return routing.scores.shape[-1] * jnp.sum(jax.lax.stop_gradient(share) * mean)


def balanced_bias(bias: jax.Array, loads: jax.Array, rate: float = 1e-3) -> jax.Array:
    """The selection bias after a step: up by `rate` for experts below the mean load, down above (arXiv:2408.15664)."""
    return bias + rate * jnp.sign(jnp.mean(loads) - loads)
