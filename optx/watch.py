"""Calls of single modules seen from outside while a tree is traced."""

import functools
from collections.abc import Callable, Sequence

from flax import nnx

from optx import ir


def watch(model: nnx.Module, paths: Sequence[str], through: Callable) -> None:
    """Calls of the modules at `paths` ('' for the model itself) go through(path, call, *args), in place: for a tree that the
    caller owns."""
    for path in paths:
        module = ir.get(model, path)
        vars(module)["_watch"] = functools.partial(through, path)
        module.__class__ = _watched(type(module))


@functools.cache
def _watched(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass whose calls go through the instance's `_watch`; one a class, as flax keeps every class for good."""

    def call(self, *args, **kwargs):
        return vars(self)["_watch"](functools.partial(kind.__call__, self), *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})
