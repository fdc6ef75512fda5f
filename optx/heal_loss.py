"""How far a student is from its teacher, differentiable and in bounded memory.

Every block of layers is run again when its gradient is taken (Chen et al. 2016, arXiv:1604.06174), and logits exist for a
thousand tokens at a time.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from optx import ir
from optx.cache import Ragged
from optx.nn.core import Embed, LayerNorm, Linear, RMSNorm
from optx.nn.moe import GroupedLinear, MoE, load, recorded
from optx.nn.recorder import auxiliary

ROWS = 1024  # tokens whose logits exist at once
NARROW = (Embed, GroupedLinear, LayerNorm, Linear, RMSNorm)  # parts whose vectors follow the type of their matrices


def values_of(model: nnx.Module) -> dict[str, jax.Array]:
    """Numbers of the parameters by path; of one that stands in several places, by the first, as `fill` asks for them."""
    found: dict[int, tuple[str, jax.Array]] = {}
    for path, variable in ir.params(model).items():
        found.setdefault(id(variable), (path, variable.get_value()))
    return dict(found.values())


def narrow(model: nnx.Module) -> frozenset[str]:
    """Names of parameters that products are made of: matrices, and vectors that are added to products or multiply them. Others
    (decay rates, biases that choose experts) stay as they are."""
    found = set()
    for path, part in ir.walk(model):
        for name, variable in vars(part).items():
            if isinstance(variable, nnx.Variable) and (isinstance(part, NARROW) or variable.get_value().ndim > 1):
                found.add(f"{path}/{name}".lstrip("/"))
    return frozenset(found)


def cast(values: Mapping[str, jax.Array], names: frozenset[str], dtype) -> dict[str, jax.Array]:
    """The numbers, those called `names` in `dtype`."""
    return {name: x.astype(dtype) if name in names else x for name, x in values.items()}


class Again(nnx.Module):
    """A block that keeps nothing for its gradient but what enters it, counts the tokens of its experts and hands on the losses
    of its own."""

    def __init__(self, block: nnx.Module, loads: list[jax.Array], own: list[jax.Array]):
        self.block = block
        self.loads, self.own = nnx.static(loads), nnx.static(own)

    @property
    def mixer(self) -> nnx.Module | None:
        return self.block.mixer

    def unjoined(self, x, y, ragged, cache):
        graph, state = nnx.split(self.block)

        @jax.checkpoint
        def run(state, x, y, pool):
            view = None if cache is None else dataclasses.replace(cache, pool=pool)
            with recorded() as routings, auxiliary() as own:
                out = nnx.merge(graph, state).unjoined(x, y, ragged, view)
            return out, [load(routing) for routing in routings], own

        out, loads, own = run(state, x, y, None if cache is None else cache.pool)
        self.loads.extend(loads)
        self.own.extend(own)
        return out


def forward(model: nnx.Module, tokens: jax.Array, tapped: bool):
    """tokens int32[B, T] -> (hidden [B, T, D] before the head, float32[E] tokens of each expert by routing layer, inputs of all
    layers but the first [B, T, D] where `tapped`, losses of single layers). The tree is changed: it must be the caller's own."""
    loads: list[jax.Array] = []
    own: list[jax.Array] = []
    model.layers = nnx.List([Again(layer, loads, own) for layer in model.layers])
    taps = tuple(range(1, len(model.layers))) if tapped else ()
    hidden, _, states = model.backbone(tokens.reshape(-1), Ragged.dense(*tokens.shape), taps=taps)
    shape = (*tokens.shape, -1)
    return hidden.reshape(shape), loads, tuple(x.reshape(shape) for x in states), own


def losses(
    teacher: nnx.Module, student: nnx.Module, tokens: jax.Array, *, hidden: bool
) -> tuple[dict[str, jax.Array], list[jax.Array]]:
    """tokens int32[B, T] -> (figures, tokens of each expert by routing layer). Both trees are changed.

    kl: mean KL(teacher || student) of the next token, nats; nll, teacher_nll: mean -log p of the tokens after the first; hidden:
    mean over layers and tokens of |h - h_teacher|^2 / |h_teacher|^2, 0 where not asked for; auxiliary: mean over the student's
    layers that have a loss of their own (nn/recorder.py), missing where none has.
    """
    wanted, _, states, _ = jax.lax.stop_gradient(forward(teacher, tokens, hidden))
    found, loads, mine, own = forward(student, tokens, hidden)
    pairs = [*zip(mine, states, strict=True), (found, wanted)]
    distance = sum(map(_distance, *zip(*pairs))) / len(pairs) if hidden else jnp.float32(0)
    more = {"hidden": distance} | ({"auxiliary": sum(own) / len(own)} if own else {})
    return _of_logits(teacher, student, wanted, found, tokens) | more, loads


def _distance(found: jax.Array, wanted: jax.Array) -> jax.Array:
    """Mean over tokens of |found - wanted|^2 / |wanted|^2, float32: a token of huge activations counts as any other."""
    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
    size = jnp.maximum(jnp.sum(wanted**2, axis=-1), jnp.finfo(jnp.float32).tiny)
    return jnp.mean(jnp.sum((found - wanted) ** 2, axis=-1) / size)


def _of_logits(teacher, student, wanted, found, tokens) -> dict[str, jax.Array]:
    batch, length = tokens.shape
    size = max(n for n in range(1, length + 1) if length % n == 0 and (n * batch <= ROWS or n == 1))
    following = jnp.roll(tokens, -1, axis=1)
    scored = jnp.broadcast_to(jnp.arange(length) < length - 1, tokens.shape)

    @jax.checkpoint
    def part(total, cut):
        wanted, found, following, scored = (x.reshape(-1, *x.shape[2:]) for x in cut)
        p, q = (
            jax.nn.log_softmax(model.head(x.astype(jnp.float32))) for model, x in ((teacher, wanted), (student, found))
        )
        p = jax.lax.stop_gradient(p)
        kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        nll, teacher_nll = (-jnp.take_along_axis(x, following[:, None], axis=-1)[:, 0] for x in (q, p))
        return total + jnp.stack([jnp.sum(x * scored) for x in (kl, nll, teacher_nll)]), None

    parts = [_cuts(x, size) for x in (wanted, found, following, scored)]
    total, _ = jax.lax.scan(part, jnp.zeros(3), tuple(parts))
    return dict(zip(("kl", "nll", "teacher_nll"), total / (batch * (length - 1)), strict=True))


def _cuts(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] -> [T / size, B, size, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def routers(model: nnx.Module) -> list[str | None]:
    """Name of the selection bias of each routing layer, in the order in which they run; None: the router has none."""
    found = [(path, part) for path, part in ir.walk(model) if isinstance(part, MoE) and path.startswith("layers/")]
    return [f"{path}/router/selection_bias" if part.router.selection_bias is not None else None for path, part in found]


def converted(teacher: nnx.Module, student: nnx.Module) -> frozenset[str]:
    """Paths of the student's parameters in parts that are not the teacher's: of another class, with other facts or shapes."""
    own = {path: _own(part) for path, part in ir.walk(teacher)}
    parts = [path for path, part in ir.walk(student) if path and own.get(path) != _own(part)]
    return frozenset(name for name in values_of(student) if any(name.startswith(f"{path}/") for path in parts))


def _own(part: nnx.Module) -> tuple:
    """What a module says itself, without its children: class, facts, shapes of its parameters."""
    facts = [(n, value) for n, value in vars(part).items() if not n.startswith("_") and n not in ir.FOLDED_ATTRIBUTES]
    plain = {
        name: value for name, value in facts if value is not None and not isinstance(value, nnx.Pytree | nnx.Variable)
    }
    shapes = {name: value.get_value().shape for name, value in facts if isinstance(value, nnx.Variable)}
    return type(part), plain, shapes
