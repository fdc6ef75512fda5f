"""Decoder-only language models: a stack of blocks between an embedding and a head."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from optx import tensor
from optx.cache import Address, CachePlan, Caches, Ragged, View, view
from optx.nn.attention import Attention
from optx.nn.core import Embed, Fused, FusedGatedMLP, Linear, Multiplied, RMSNorm
from optx.pallas import dispatch
from optx.pallas.dispatch import OpChoice, OpSite
from optx.pools import PICKED, store_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual:
    """kept * (x or norm(x)) + added * y: how what a part made of norm(x) joins the stream."""

    kept: float = 1.0
    added: float = 1.0
    normed: bool = False  # the stream goes on from norm(x)
    dtype: str | None = None  # of the stream; None: that of x

    def __call__(self, x: jax.Array, normed: jax.Array, y: jax.Array) -> jax.Array:
        x = normed if self.normed else x
        x = x if self.dtype is None else x.astype(self.dtype)
        x = x if self.kept == 1 else x * jnp.asarray(self.kept, x.dtype)
        return x + (y if self.added == 1 else y * jnp.asarray(self.added, y.dtype))

    def __str__(self):
        kept, added = ("" if share == 1 else f"{share:g} " for share in (self.kept, self.added))
        stream = "norm(x)" if self.normed else "x"
        return f"{kept}{stream} + {added}y" + (f" in {self.dtype}" if self.dtype else "")


PLAIN = Residual()


class Block(nnx.Module):
    """x + post(mixer(norm(x))), then the same around the mlp. Mixer or mlp may be None; post norms are
    None in most models."""

    def __init__(
        self, *, norm=None, mixer=None, mlp_norm=None, mlp=None, post_norm=None, post_mlp_norm=None,
        residual: Residual | None = None, mlp_residual: Residual | None = None,
    ):  # fmt: skip
        self.norm, self.mixer, self.post_norm = norm, mixer, post_norm
        self.mlp_norm, self.mlp, self.post_mlp_norm = mlp_norm, mlp, post_mlp_norm
        self.residual, self.mlp_residual = residual, mlp_residual
        self.choices: tuple[OpChoice, ...] = ()

    def __call__(self, x: jax.Array, ragged: Ragged, cache: View | None):
        """x [T, D] -> (x [T, D], the mixer's pool)."""
        x, y, pool = self.unjoined(x, None, ragged, cache)
        return _sum(x, y), pool

    def unjoined(self, x: jax.Array, y: jax.Array | None, ragged: Ragged, cache: View | None):
        """x and y [T, D], whose sum is the stream (y None: x is) -> (x, y of the stream behind the block, the mixer's pool).

        What a part brings is added where the next norm reads the sum: one op does both.
        """
        pool = {}
        if self.mixer is not None:
            x, normed = self._normed(self.norm, x, y, self.mixer, self.residual)
            y, pool = self.mixer(normed, ragged, cache)
            x, y = _joined(self.residual, x, normed, y if self.post_norm is None else self.post_norm(y))
        if self.mlp is not None:
            x, normed = self._normed(self.mlp_norm, x, y, self.mlp, self.mlp_residual)
            y = self.mlp(normed)
            x, y = _joined(self.mlp_residual, x, normed, y if self.post_mlp_norm is None else self.post_mlp_norm(y))
        return x, y, pool

    def _normed(self, norm, x, y, part, residual):
        """-> (x + y, norm(x + y) for `part`)."""
        if not _is_op(norm):
            x = _sum(x, y)
            return x, norm(x)
        args, kwargs = (x, y, norm.weight.get_value()), {"eps": norm.eps, "offset": norm.offset}
        first = part.first if isinstance(part, Fused) and residual in (None, PLAIN) else None
        if first is None:
            return dispatch.call("add_norm", self.choices, *args, **kwargs)
        x, product = dispatch.call("norm_matmul", part.choices, *args, first.weight.get_value(), **kwargs)
        return x, Multiplied(product)

    def chained(self, last: "Chained", following: "Block | None", ragged: Ragged, cache: View | None):
        """`unjoined` of one token where `chains`, and with it the first product of the block that follows, if it `chains` too
        -> (what goes into that, the mixer's pool)."""
        x, y, product, sync = last
        normed = Multiplied(product)
        if product is None:
            x, normed = self._normed(self.norm, x, y, self.mixer, self.residual)
        heads, pool = self.mixer.unprojected(normed, ragged, cache)
        then = following and following.mixer.entry
        then = then and (following.norm.weight.get_value(), then.weight.get_value())
        weights = (linear.weight.get_value() for linear in self._products)
        args = (heads, x, self.mlp_norm.weight.get_value(), *weights, then, sync)
        x, y, sync = dispatch.call("chained_matmul", self.choices, *args, **self._chain)
        return Chained(x, *((y, None) if then is None else (None, y)), sync), pool

    @property
    def chains(self) -> bool:
        """Whether a kernel was chosen for all products behind the attention, and nothing else reads or changes their results."""
        return dispatch.lowered("chained_matmul", self.choices) and self._chainable

    def leads_to(self, following: "Block") -> bool:
        """Whether that kernel can take the first product of the block that follows as well."""
        if not (
            isinstance(following, Block)
            and following.chains
            and _is_product(getattr(following.mixer, "entry", None), biased=True)
        ):
            return False
        norm, mine = following.norm, self.mlp_norm
        if not _is_op(norm) or (norm.eps, norm.offset) != (mine.eps, mine.offset):
            return False
        dtypes = [jnp.dtype(x.weight.get_value().dtype).name for x in (norm, mine)]
        if dtypes[0] != dtypes[1]:
            return False
        weights = [linear.weight.get_value() for linear in (*self._products, following.mixer.entry)]
        kernel = dispatch.running("chained_matmul", self.choices).code
        return kernel.takes(weights, norm=dtypes[0], **self._chain)

    @property
    def _products(self) -> tuple[Linear, ...]:
        return self.mixer.o, self.mlp.gate_up, self.mlp.down

    @property
    def _chain(self) -> dict:
        return {"activation": self.mlp.activation, "eps": self.mlp_norm.eps, "offset": self.mlp_norm.offset}

    @property
    def _chainable(self) -> bool:
        parts = type(self) is Block and isinstance(self.mixer, Attention) and type(self.mlp) is FusedGatedMLP
        plain = {self.residual, self.mlp_residual} <= {None, PLAIN} and self.post_norm is self.post_mlp_norm is None
        return parts and plain and _is_op(self.mlp_norm) and all(map(_is_product, self._products))

    def op_sites(self) -> tuple[OpSite, ...]:
        weights = [norm.weight.get_value() for norm in (self.norm, self.mlp_norm) if _is_op(norm)]
        if not weights:
            return ()
        dtypes = tuple(jnp.dtype(weight.dtype).name for weight in weights)
        # Norms have the dtype of the activations where they are built.
        facts = {"d": weights[0].shape[0], "dtype": dtypes[0], "weights": dtypes}
        sites = (OpSite(op="add_norm", args=facts),)
        if not self._chainable:
            return sites
        products = tuple(tensor.canonical(linear.weight.get_value()) for linear in self._products)
        facts = {"weights": products, "norm": dtypes[-1], "dtype": jnp.dtype(products[0].dtype).name, **self._chain}
        return (*sites, OpSite(op="chained_matmul", args=facts))


class Chained(NamedTuple):
    """What goes from a block to the next where one kernel does all between two attentions."""

    x: jax.Array  # [1, D]
    y: jax.Array | None  # [1, D], not yet added; None: x is the stream
    product: jax.Array | None = None  # of the next block's first weight with its norm of the stream
    sync: jax.Array | None = None  # what kernels hand each other


def _is_product(linear: nnx.Module | None, *, biased: bool = False) -> bool:
    """Nothing but a product with a weight; biased: to which a bias may be added."""
    plain = type(linear) is Linear and linear.adapter is None and linear.activations is None
    return plain and (biased or linear.bias is None)


def _is_op(norm) -> bool:
    """The norm is what the op `add_norm` computes."""
    return type(norm) is RMSNorm and norm.out is None


def _sum(x: jax.Array, y: jax.Array | None) -> jax.Array:
    return x if y is None else x + y


def _joined(residual: Residual | None, x, normed, y):
    """The stream as (x, y), not yet added where a plain sum is all that there is to do."""
    return (x, y) if residual in (None, PLAIN) else (residual(x, normed, y), None)


class CausalLM(nnx.Module):
    """logits = head(norm(blocks(embed(tokens)))); `head` None ties it to the embedding."""

    def __init__(
        self, *, embed: Embed, layers, norm: RMSNorm, head: Linear | None, context: int, logit_softcap=None,
        logit_scale: float | None = None, draft: nnx.Module | None = None,
    ):  # fmt: skip
        """context: longest sequence, tokens; logit_scale: multiplies the logits; draft: an `MTP`, which the forward leaves out:
        head(draft(hidden, embed(next tokens), ragged, view)[0]) are logits two tokens ahead."""
        self.embed = embed
        self.layers = nnx.List(layers)
        self.norm = norm
        self.output = head
        self.context = context
        self.logit_softcap = logit_softcap
        self.logit_scale = logit_scale
        self.draft = draft

    def cache_plan(self) -> CachePlan:
        return CachePlan(specs=tuple(layer.mixer and layer.mixer.cache for layer in self.layers))

    def backbone(
        self,
        tokens: jax.Array,
        ragged: Ragged,
        caches: Caches | None = None,
        address: Address | None = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[jax.Array, Caches | None, tuple[jax.Array, ...]]:
        """tokens int32[T] -> (hidden [T, D] before the head, caches with these tokens appended, inputs of layers `taps`).

        Without caches every row is a self-contained sequence from position 0.
        """
        plan = self.cache_plan()
        x, y, picks = self.embed(tokens), None, {}
        last = None  # of blocks whose products are chained
        if caches is not None:
            caches = _append_positions(plan, caches, address, ragged)
        pools: list = []
        tapped = []
        for i, layer in enumerate(self.layers):
            if i in taps:
                x, y = _sum(x, y), None
                tapped.append(x)
            if caches is None:
                shared = plan.owner(i) != i
                cache = View(pool=pools[plan.owner(i)], slots=ragged.starts) if shared else None
            else:
                cache = view(plan, Caches(layers=(*pools, *caches.layers[i:]), positions=caches.positions), address, i)
            if (like := plan.specs[i] and plan.specs[i].select and plan.specs[i].select.like) is not None:
                cache = cache or View(pool={}, slots=ragged.starts)
                cache = dataclasses.replace(cache, pool=cache.pool | {PICKED: picks[like]})
            if len(tokens) == 1 and isinstance(layer, Block) and layer.chains:
                following = self.layers[i + 1] if i + 1 < len(self.layers) else None
                following = following if following is not None and layer.leads_to(following) else None
                last, pool = layer.chained(last and last._replace(x=x, y=y) or Chained(x, y), following, ragged, cache)
                x, y = last.x, last.y
            else:
                x, y, pool = layer.unjoined(x, y, ragged, cache)
            picks[i] = pool.pop(PICKED, None)
            pools.append({} if caches is not None and plan.owner(i) != i else pool)
        if caches is not None:
            caches = Caches(layers=tuple(pools), positions=caches.positions)
        return self.norm(_sum(x, y)), caches, tuple(tapped)

    def head(self, x: jax.Array) -> jax.Array:
        """Selected rows of the hidden state [M, D] -> float32[M, V]."""
        logits = self.embed.attend(x) if self.output is None else self.output(x)
        logits = logits.astype(jnp.float32)
        logits = logits if self.logit_scale is None else logits * self.logit_scale
        return logits if self.logit_softcap is None else self.logit_softcap * jnp.tanh(logits / self.logit_softcap)

    def __call__(self, tokens: jax.Array, counts: jax.Array | None = None) -> jax.Array:
        """tokens int32[B, T], of which the first `counts` int32[B] are real -> float32[B, T, V]."""
        batch, length = tokens.shape
        hidden, _, _ = self.backbone(tokens.reshape(-1), Ragged.dense(batch, length, counts))
        return self.head(hidden).reshape(batch, length, -1)


def _append_positions(plan: CachePlan, caches: Caches, address: Address, ragged: Ragged) -> Caches:
    """Of what may be evicted, masks compare slots; where heads keep different tokens, ops count them from the end."""

    def stored(spec, positions, lengths, writes):
        if writes.ndim == 2 and len(writes) > 1:
            return positions
        at = ragged.positions if spec.evict is None else ragged.in_slots(lengths[0]).positions
        return store_tokens(positions, at, writes.reshape(-1))

    groups = zip(plan.groups, caches.positions, address.lengths, address.writes, strict=True)
    return Caches(layers=caches.layers, positions=tuple(stored(*group) for group in groups))
