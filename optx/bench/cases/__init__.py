"""Calls of every op, made from random data: the tests, `verify_gpu` and `optx bench kernels` share them.

A `Case` is one call. Small ones run in interpreters, in `make test`; all run compiled on a device.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of an op.

    make(rng) -> (args, kwargs) of the op, arrays on the default device; `site` is what `supports` is asked;
    pick(output, kwargs) takes the numbers to compare out of the op's result (all of them when None).
    """

    op: str
    name: str
    make: Callable[[np.random.Generator], tuple[tuple, dict]]
    site: Mapping[str, Any]
    tolerance: float = 5e-3  # relative error against the reference in float32
    small: bool = True  # takes a second or so in an interpreter
    pick: Callable | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One line of `optx bench kernels`: a call, the fewest bytes it reads and writes and the FLOPs it does.

    peers(args, kwargs) -> {name: function of the same args} are other implementations to time beside ours.
    """

    op: str
    name: str
    make: Callable[[np.random.Generator], tuple[tuple, dict]]
    site: Mapping[str, Any]
    bytes: float
    flops: float
    unit: str = "bf16"  # which matmul ceiling binds: bf16, fp8
    both: bool = False  # the parts bound by reading and by FLOPs are different work: the bound is their sum
    copies: int = 2  # input sets in rotation
    peers: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
