"""How far a student is from its teacher, differentiable, in bounded memory and quick to compile.

Every block of layers is run again when its gradient is taken (Chen et al. 2016, arXiv:1604.06174), and logits exist for a
thousand tokens at a time.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from optx import heal_ops, ir
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


@dataclasses.dataclass
class Told:
    """What blocks hand out beside their outputs, in their order."""

    inputs: list[jax.Array] = dataclasses.field(default_factory=list)  # [T, D] of each block
    loads: list[jax.Array] = dataclasses.field(
        default_factory=list
    )  # float32[E] tokens of each expert, by routing layer
    own: list[jax.Array] = dataclasses.field(default_factory=list)  # losses of single layers


class Again(nnx.Module):
    """Blocks of one form in a row, compiled once: a scan over their numbers. For their gradients they keep what enters each, and
    nothing else."""

    def __init__(self, blocks: Sequence[nnx.Module], told: Told):
        self.blocks, self.told = nnx.List(blocks), nnx.static(told)

    @property
    def mixer(self) -> nnx.Module | None:
        return self.blocks[0].mixer

    def unjoined(self, x, y, ragged, cache):
        graph, states = _form(self.blocks[0])[0], [nnx.split(block)[1] for block in self.blocks]

        @jax.checkpoint
        def run(x, pool, state):
            view = None if cache is None else dataclasses.replace(cache, pool=pool)
            with recorded() as routings, auxiliary() as own:
                out, more, pool = nnx.merge(graph, state).unjoined(x, None, ragged, view)
            return out if more is None else out + more, pool, [load(routing) for routing in routings], own

        def step(x, state):
            out, _, loads, own = run(x, None, state)
            return out, (x, loads, own)

        x = x if y is None else x + y
        if len(states) == 1:
            out, pool, loads, own = run(x, None if cache is None else cache.pool, states[0])
            self._tell([x], [loads], [own])
            return out, None, pool
        x = x.astype(jax.eval_shape(step, x, states[0])[0].dtype)  # of the stream, which the first block may widen
        out, each = jax.lax.scan(step, x, jax.tree.map(lambda *one: jnp.stack(one), *states))
        self._tell(*zip(*(jax.tree.map(lambda x: x[i], each) for i in range(len(states)))))  # noqa: B023
        return out, None, {}

    def _tell(self, inputs, loads, own) -> None:
        self.told.inputs.extend(inputs)
        self.told.loads.extend(x for block in loads for x in block)
        self.told.own.extend(x for block in own for x in block)


def _form(block: nnx.Module):
    """What blocks of one form have in common."""
    graph, state = nnx.split(block)
    return graph, jax.tree.structure(state), [(x.shape, x.dtype) for x in jax.tree.leaves(state)]


def _rows(model: nnx.Module) -> list[list[nnx.Module]]:
    """The layers, those of one form in a row together; each for itself where one reads what another keeps."""
    specs = [spec for spec in model.cache_plan().specs if spec is not None]
    if any(spec.follows is not None for spec in specs):
        return [[layer] for layer in model.layers]
    rows: list[list[nnx.Module]] = []
    for layer in model.layers:
        if rows and _form(rows[-1][0]) == _form(layer):
            rows[-1].append(layer)
        else:
            rows.append([layer])
    return rows


def forward(model: nnx.Module, tokens: jax.Array) -> tuple[jax.Array, Told]:
    """tokens int32[B, T] -> (hidden [B, T, D] before the head, what layers told, inputs as [B, T, D]). The tree is changed: it
    must be the caller's own."""
    told = Told()
    model.layers = nnx.List([Again(row, told) for row in _rows(model)])
    hidden, _, _ = model.backbone(tokens.reshape(-1), Ragged.dense(*tokens.shape))
    shape = (*tokens.shape, -1)
    told.inputs = [x.reshape(shape) for x in told.inputs]
    return hidden.reshape(shape), told


def losses(
    teacher: nnx.Module, student: nnx.Module, tokens: jax.Array, *, hidden: bool
) -> tuple[dict[str, jax.Array], list[jax.Array]]:
    """tokens int32[B, T] -> (figures, tokens of each expert by routing layer). Both trees are changed.

    kl: mean KL(teacher || student) of the next token, nats; nll, teacher_nll: mean -log p of the tokens after the first; hidden:
    mean over layers and tokens of |h - h_teacher|^2 / |h_teacher|^2, 0 where not asked for; auxiliary: mean over the student's
    layers that have a loss of their own (nn/recorder.py), missing where none has.
    """
    with heal_ops.fast():
        wanted, its = forward(teacher, tokens)
        wanted, states = jax.lax.stop_gradient((wanted, its.inputs))
        found, mine = forward(student, tokens)
        logits = _of_logits(teacher, student, wanted, found, tokens)
    pairs = [*zip(mine.inputs[1:], states[1:], strict=True), (found, wanted)]
    distance = sum(map(_distance, *zip(*pairs))) / len(pairs) if hidden else jnp.float32(0)
    more = {"hidden": distance} | ({"auxiliary": sum(mine.own) / len(mine.own)} if mine.own else {})
    return logits | more, mine.loads


def _distance(found: jax.Array, wanted: jax.Array) -> jax.Array:
    """Mean over tokens of |found - wanted|^2 / |wanted|^2, float32: a token of huge activations counts as any other."""
    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
    size = jnp.maximum(jnp.sum(wanted**2, axis=-1), jnp.finfo(jnp.float32).tiny)
    return jnp.mean(jnp.sum((found - wanted) ** 2, axis=-1) / size)


def _of_logits(teacher, student, wanted, found, tokens) -> dict[str, jax.Array]:
    for model in (teacher, student):
        if model.output is None:  # a tied head as a product like others
            head = Linear(1, 1)
            head.weight = nnx.Param(model.embed.table.get_value().T)
            model.output = nnx.data(head)
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
