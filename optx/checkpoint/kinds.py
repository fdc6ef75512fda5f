"""How a parameter of the tree lies in files: as one tensor or several, transposed, stacked by expert, interleaved."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optx.tensor import QTensor

Parts = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Kind:
    """join(parts, module) -> the parameter; split(array, module, names) -> its parts, the inverse.

    parts are in the order of the row's names (of expert 0 first, where a name has `{e}`); module owns the parameter;
    names: how many names the row has for one expert, or at all.
    """

    join: Callable[[Parts, Any], np.ndarray]
    split: Callable[[np.ndarray, Any, int], list[np.ndarray]]
    # Files that hold it packed: (parts as jax arrays, module, dtype) -> QTensor; join and split are of the dense form.
    pack: Callable[[Sequence[Any], Any, Any], QTensor] | None = None

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


def single(join: Callable[[np.ndarray], np.ndarray], split: Callable[[np.ndarray], np.ndarray]) -> Kind:
    """A kind of one tensor that says nothing about the module."""
    return Kind(lambda parts, module: join(parts[0]), lambda array, module, names: [split(array)])


KINDS: dict[str, Kind] = {
    "linear": single(np.transpose, np.transpose),  # [out, in] in files, [D, F] in the tree
    "table": single(lambda x: x, lambda x: x),
    "vector": single(lambda x: x, lambda x: x),
    "conv": single(lambda x: x[:, 0].T, lambda x: x.T[:, None]),  # [C, 1, W] -> [W, C]
    "stacked": single(lambda x: np.swapaxes(x, 1, 2), lambda x: np.swapaxes(x, 1, 2)),  # [E, out, in] -> [E, D, F]
    "experts": Kind(_join_experts, _split_experts),  # one file tensor [out, in] an expert and name -> [E, D, F]
}
