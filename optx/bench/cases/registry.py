"""All cases and benchmark shapes by op, and the reference that every row is compared with."""

import importlib
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from optx.bench.cases import Case, Shape
from optx.bench.timing import relative_error
from optx.errors import UsageError, did_you_mean
from optx.pallas import dispatch
from optx.pallas.dispatch import Row
from optx.tensor import QTensor, is_qtensor

MODULES = (
    "flash_attention",
    "ragged_paged_attention",
    "paged_decode",
    "mla",
    "compressed_attention",
    "top_blocks",
    "matmul",
    "quant_matmul",
    "w8a8",
    "grouped_matmul",
    "rotate_append",
    "add_norm",
    "gated_act",
    "norm_matmul",
    "gated_matmul",
    "chained_matmul",
)


def _gather(name: str, ops: Iterable[str]) -> list:
    wanted = set(ops)
    modules = [importlib.import_module(f"optx.bench.cases.{module}") for module in MODULES]
    found = [item for module in modules for item in getattr(module, name)]
    known = {item.op for item in found}
    for op in wanted - known:
        raise UsageError(f"no cases for op {op!r}{did_you_mean(op, known)}")
    return [item for item in found if not wanted or item.op in wanted]


def cases(ops: Iterable[str] = ()) -> list[Case]:
    """Every case, or those of `ops`. Raises UsageError for an unknown op."""
    return _gather("CASES", ops)


def shapes(ops: Iterable[str] = ()) -> list[Shape]:
    """Every benchmark line, or those of `ops`. Raises UsageError for an unknown op."""
    return _gather("SHAPES", ops)


def kernels(item: Case | Shape, target) -> list[Row]:
    """The rows other than the reference that take the call on the target."""
    return [row for row in dispatch.rows(item.op)[:-1] if row.supports(item.site, target) is None]


def in_float32(tree):
    """16-bit floats as float32, packed tensors as ones that dequantize to it."""

    def widen(x):
        if is_qtensor(x):
            return QTensor(**{**vars(x), "dtype": jnp.dtype("float32")})
        return x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x

    return jax.tree.map(widen, tree, is_leaf=is_qtensor)


def split(kwargs: dict) -> tuple[dict, dict]:
    """(arrays, static values) of keyword arguments."""
    dynamic = {
        key: value
        for key, value in kwargs.items()
        if jax.tree.leaves(value) and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
    }
    return dynamic, {key: value for key, value in kwargs.items() if key not in dynamic}


def jitted(function, kwargs: dict):
    """function(*args, **kwargs) as a jitted function of (args, arrays of kwargs)."""
    _, static = split(kwargs)
    return jax.jit(lambda args, dynamic: function(*args, **dynamic, **static))


def reference(op: str, args, kwargs):
    """The op by its reference, in float32 from the same stored numbers."""
    args, kwargs = in_float32(args), in_float32(split(kwargs)[0]) | split(kwargs)[1]
    with jax.default_matmul_precision("highest"):
        return jitted(dispatch.rows(op)[-1].run, kwargs)(args, split(kwargs)[0])


def picked(item: Case, out, kwargs) -> list:
    """The numbers of a result that the case compares: padding may come out as anything."""
    return item.pick(out, kwargs) if item.pick else jax.tree.leaves(out)


def errors(item: Case, out, want, kwargs) -> Sequence[float]:
    """Relative errors of the numbers that the case compares."""
    return [relative_error(a, b) for a, b in zip(picked(item, out, kwargs), picked(item, want, kwargs), strict=True)]
