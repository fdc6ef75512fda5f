"""Rotations learned for the rounding that a recipe does: of the residual stream (R1) and of each layer's values (R2).

min over Q of KL(model || model with rotated, rounded weights and activations) on calibration text, as SpinQuant does (Liu et al.
2024, arXiv:2405.16406). Q = H C(A) with H the Hadamard rotation that pass `rotate` starts from and C(A) = (I - A)(I + A)^-1,
Cayley's transform of a skew-symmetric A, which is what Adam moves; what is rounded passes gradients on as if it were not
(Bengio et al. 2013, arXiv:1308.3432). Groups' scales follow the rotated weights.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from optx import ir, pipeline, quality, tensor
from optx.checkpoint.source import Source
from optx.errors import PassError, RecipeError
from optx.formats import Format
from optx.lower import Program
from optx.nn.attention import Attention
from optx.nn.core import Linear
from optx.nn.decoder import Block
from optx.nn.mla import MLA
from optx.nn.rotated import RotatedBlock
from optx.passes.quantize_activations import QuantizeActivations
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.rotate import Rotate, ports, unrotatable
from optx.recipe import Recipe

RATE = 0.05  # of Adam at the start, for entries of A; falls to 0 as a cosine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """What was learned."""

    matrices: Mapping[str, np.ndarray]  # float64, orthogonal: "stream" [D, D]; "values/LAYER" [H, H]
    kl: tuple[float, ...]  # of the window of each step, before the step; nats a token

    def save(self, path: Path) -> Path:
        """As .npz, which pass `rotate` reads by its option `matrices`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            np.savez(file, **self.matrices)
        return path


def learn_rotation(
    source: Source,
    recipe: Recipe,
    calibration: str | Path,
    *,
    steps: int = 100,
    rate: float = RATE,
    progress: bool = False,
) -> Learned:
    """Rotations for the recipe's rule `rotate`, whose seed they start from, and its formats of weights and activations.

    calibration: a text or a file of one (`quality.windows`); one window a step, in turn. The dense model and its gradients are in
    memory. Raises: RecipeError for a recipe without `rotate` or without rounding, PassError for a stream that cannot be rotated,
    RequestError for a bad text.
    """
    options = next((o for o in recipe.fold if isinstance(o, Rotate)), None)
    if options is None:
        raise RecipeError(f"learn_rotation: recipe {recipe.name!r} has no rule of pass 'rotate'; add one under 'fold:'")
    text, tree = quality.windows(calibration, source), source.load()
    weights, activations = (_formats(tree, recipe, kind) for kind in (QuantizeWeights, QuantizeActivations))
    if not weights:
        raise RecipeError(f"learn_rotation: recipe {recipe.name!r} rounds no weight that a rotation could help")
    for i, block in enumerate(tree.layers):
        if reason := unrotatable(block, options):
            raise PassError(f"learn_rotation at layers/{i}: {reason}")
    program, start = Program.of(tree), _start(tree, options)

    def kl(moved, leaves, tokens, wanted):
        model = program.merge(leaves)
        _rotate(model, {name: start[name] @ cayley(moved[name]) for name in moved}, options)
        _round(model, weights, activations)
        return quality.divergence(wanted, model(tokens)[0], tokens)[0] / (tokens.shape[1] - 1)

    tune = optax.adam(optax.cosine_decay_schedule(rate, steps))
    moved = {name: jnp.zeros(q.shape, jnp.float32) for name, q in start.items()}
    wanted = jax.jit(lambda leaves, tokens: program.merge(leaves)(tokens)[0])

    @jax.jit
    def step(moved, state, leaves, tokens, wanted):
        loss, slope = jax.value_and_grad(kl)(moved, leaves, tokens, wanted)
        change, state = tune.update(slope, state)
        return optax.apply_updates(moved, change), state, loss

    state, found = tune.init(moved), []
    for i in (bar := tqdm(range(steps), desc="learn rotation", unit="step", disable=not progress)):
        tokens = text[i % len(text)]
        moved, state, loss = step(moved, state, program.leaves, tokens, wanted(program.leaves, tokens))
        found.append(float(loss))
        bar.set_postfix(kl=f"{found[-1]:.4f}")
    if not np.isfinite(found).all():
        raise PassError(f"learn_rotation: the KL is {found[-1]} after {steps} steps of {rate:g}; lower the rate")
    matrices = {name: start[name] @ np.asarray(cayley(x), np.float64) for name, x in moved.items()}
    return Learned(matrices={name: _orthogonal(q) for name, q in matrices.items()}, kl=tuple(found))


def cayley(moved: jax.Array) -> jax.Array:
    """Any [D, D] -> (I - A)(I + A)^-1, orthogonal, with A = (moved - moved^T) / 2; the identity for zeros."""
    skew, one = (moved - moved.T) / 2, jnp.eye(moved.shape[0], dtype=moved.dtype)
    return jnp.linalg.solve(one + skew, one - skew)  # both factors commute


def _orthogonal(q: np.ndarray) -> np.ndarray:
    """The nearest orthogonal matrix, float64: what float32 left of it is folded in float64."""
    u, _, v = np.linalg.svd(q)
    return u @ v


def _start(tree: nnx.Module, options: Rotate) -> dict[str, np.ndarray]:
    """Where each rotation starts."""
    width = tree.embed.table.get_value().shape[-1]
    sizes = {"stream": width} if options.stream else {}
    for i, block in enumerate(tree.layers) if options.values else ():
        if isinstance(block.mixer, MLA):
            raise PassError(
                f"learn_rotation at layers/{i}: values of MLA are not learned; set values: false in 'rotate'"
            )
        if name := _values(block, i):
            sizes[name] = block.mixer.head_dim
    return {name: options.rotation(size).fold(np.eye(size), -1) for name, size in sizes.items()}


def _values(block: Block, layer: int) -> str | None:
    """Name of the rotation of the values that a layer reads; None: they are not rotated."""
    attn = block.mixer
    if type(attn) is not Attention or attn.gate is not None:
        return None
    return f"values/{layer if attn.cache.share is None else attn.cache.share}"


def _formats(tree: nnx.Module, recipe: Recipe, kind: type) -> dict[str, Format]:
    """Path of every projection of the layers that rules of `kind` round -> in which format."""
    found = {}
    for pass_, rules in recipe.steps():
        if issubclass(pass_.options, kind):
            for path, _, o in pipeline.matches(tree, pass_, rules):
                under = [
                    f"{path}/{sub}".strip("/") for sub, part in ir.walk(ir.get(tree, path)) if type(part) is Linear
                ]
                found |= {each: o.storage() for each in under if each.startswith("layers/")}
    return found


class _Simulated(nnx.Module):
    """A projection whose inputs are rounded, with gradients as if they were not."""

    def __init__(self, linear: Linear, format_: Format):
        self.linear, self.format = linear, format_

    @property
    def weight(self) -> nnx.Variable:
        return self.linear.weight

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(_rounded(x, self.format, -1))


def _rounded(x: jax.Array, format_: Format, axis: int) -> jax.Array:
    return x + jax.lax.stop_gradient(tensor.quantize(x, format_, axis=axis).dequantize() - x)


def _round(model: nnx.Module, weights: Mapping[str, Format], activations: Mapping[str, Format]) -> None:
    for path, format_ in weights.items():
        linear = ir.get(model, path)
        linear.weight = nnx.Param(_rounded(linear.weight.get_value(), format_, -2))
    for path, format_ in activations.items():
        ir.put(model, path, _Simulated(ir.get(model, path), format_))


def _rotate(model: nnx.Module, turns: Mapping[str, jax.Array], options: Rotate) -> None:
    """What pass `rotate` folds, in place and differentiable."""
    for i, block in enumerate(model.layers):
        if (name := _values(block, i)) in turns:
            _rotate_values(block.mixer, turns[name])
        if "stream" in turns:
            _rotate_stream(block, turns["stream"])
            ends = {"enters": i == 0, "leaves": i == len(model.layers) - 1}
            if any(ends.values()):
                turn = _Turn(turns["stream"])
                at = {name: turn if here else None for name, here in ends.items()}
                model.layers[i] = RotatedBlock(block, **at)


@dataclasses.dataclass(frozen=True)
class _Turn:
    q: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.q

    def back(self, x: jax.Array) -> jax.Array:
        return x @ self.q.T


def _rotate_stream(block, q: jax.Array) -> None:
    for norm, part in ((block.norm, block.mixer), (block.mlp_norm, block.mlp)):
        if part is None:
            continue
        gain = norm.offset + norm.weight.get_value()
        for path, kind, _ in ports(part):
            module = ir.get(part, path)
            w = module.weight.get_value()
            new = jnp.matmul(q.T, gain[:, None] * w) if kind == "read" else jnp.matmul(w, q)
            module.weight = nnx.Param(new)
            if kind == "write" and module.bias is not None:
                module.bias = nnx.Param(module.bias.get_value() @ q)
        norm.weight = nnx.Param(jnp.full_like(gain, 1 - norm.offset))


def _rotate_values(attn: Attention, q: jax.Array) -> None:
    h, o = attn.head_dim, attn.o.weight.get_value()
    attn.o.weight = nnx.Param(jnp.matmul(q.T, o.reshape(-1, h, o.shape[1])).reshape(o.shape))
    for name in ("weight", "bias") if attn.v is not None else ():
        if (variable := getattr(attn.v, name)) is not None:
            x = variable.get_value()
            setattr(attn.v, name, nnx.Param((x.reshape(*x.shape[:-1], -1, h) @ q).reshape(x.shape)))
