"""How a parameter of the tree lies in files: as one tensor or several, transposed, stacked by expert, interleaved."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optx.formats import Float4
from optx.tensor import QTensor

Parts = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Pack:
    """How files hold a parameter in a format: make(parts as jax arrays, dtype) -> QTensor, bit for bit.

    parts(shape of the parameter) -> shape and dtype of each, or why that shape cannot be stored so.
    """

    parts: Callable[[tuple[int, ...]], list[jax.ShapeDtypeStruct] | str]
    make: Callable[[Sequence[jax.Array], Any], QTensor]

    def form(self, shape: tuple[int, ...], dtype) -> QTensor:
        """The parameter as shapes."""
        return jax.eval_shape(lambda parts: self.make(parts, dtype), self.parts(shape))


@dataclasses.dataclass(frozen=True)
class Kind:
    """join(parts, module) -> the parameter; split(array, module, names) -> its parts, the inverse.

    parts are in the order of the row's names (of expert 0 first, where a name has `{e}`); module owns the parameter;
    names: how many names the row has for one expert, or at all.
    """

    join: Callable[[Parts, Any], np.ndarray]
    split: Callable[[np.ndarray, Any, int], list[np.ndarray]]
    pack: Pack | None = None  # of files that hold it in a format; join and split are of the dense form

    def shapes(self, shape: tuple[int, ...], module: Any, names: int) -> list[tuple[int, ...]]:
        """Shapes of the parts of a parameter of `shape`."""
        return [part.shape for part in self.split(np.broadcast_to(np.int8(0), shape), module, names)]


def _join_experts(parts: Parts, module) -> np.ndarray:
    """[out, in] of each expert, or several to lie one after the other -> [E, in, out]."""
    experts = module.experts
    each = len(parts) // experts
    return np.stack([np.concatenate(parts[e * each : (e + 1) * each]).T for e in range(experts)])


def _split_experts(array: np.ndarray, module, names: int) -> list[np.ndarray]:
    return [part for expert in array for part in np.split(expert.T, names)]


def single(join: Callable[[Any], Any], split: Callable[[Any], Any], pack: Pack | None = None) -> Kind:
    """A kind of one tensor that says nothing about the module."""
    return Kind(lambda parts, module: join(parts[0]), lambda array, module, names: [split(array)], pack)


def same(x):
    return x


def halves(x, axis: int = -1):
    """Gate and up by turns along `axis` -> gate first, then up."""
    return _exchanged(x, axis % x.ndim, (-1, 2))


def turns(x: np.ndarray) -> np.ndarray:
    """Inverse of `halves`, along the last axis."""
    return _exchanged(x, x.ndim - 1, (2, -1))


def _exchanged(x, axis: int, as_matrix: tuple[int, int]):
    """x with the numbers along `axis` seen as a matrix and transposed."""
    matrix = x.reshape(*x.shape[:axis], *as_matrix, *x.shape[axis + 1 :])
    return matrix.swapaxes(axis, axis + 1).reshape(x.shape)


def mx_blocks(*, by_turns: bool = False) -> Pack:
    """MXFP4 of [E, D, F] as blocks uint8[E, F, D / 32, 16] and scales uint8[E, F, D / 32]; by_turns: F are gate and up.

    Codes lie as in `Float4`: two a byte, the even index in the low nibble, scales e8m0 (OCP MX v1.0).
    """
    format_ = Float4(kind="mx")

    def parts(shape):
        *experts, d, f = shape
        groups = (*experts, f, d // format_.group)
        shapes = ((*groups, format_.group // 2), groups)
        return format_.check(d) or [jax.ShapeDtypeStruct(shape, jnp.uint8) for shape in shapes]

    def make(parts, dtype):
        blocks, scales = parts
        data = blocks.reshape(*scales.shape[:-1], -1)
        if by_turns:
            data, scales = halves(data, -2), halves(scales, -2)
        return QTensor(data=data, scale=scales, format=format_, length=2 * data.shape[-1], dtype=dtype)

    return Pack(parts, make)


KINDS: dict[str, Kind] = {
    "linear": single(np.transpose, np.transpose),  # [out, in] in files, [D, F] in the tree
    "table": single(same, same),
    "vector": single(same, same),
    "conv": single(lambda x: x[:, 0].T, lambda x: x.T[:, None]),  # [C, 1, W] -> [W, C]
    "stacked": single(lambda x: np.swapaxes(x, 1, 2), lambda x: np.swapaxes(x, 1, 2)),  # [E, out, in] -> [E, D, F]
    "grouped": single(same, same, mx_blocks()),  # [E, D, F]
    "by_turns": single(halves, turns, mx_blocks(by_turns=True)),  # [E, D, 2F], gate and up by turns -> gate, then up
    "experts": Kind(_join_experts, _split_experts),  # one file tensor [out, in] an expert and name -> [E, D, F]
}
