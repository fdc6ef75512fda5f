"""Modules of Mosaic GPU, imported when a kernel is traced: they take half a second, and a row's `supports` needs none; and how
kernels of Hopper follow each other."""

import contextvars
import functools
import importlib
from collections.abc import Callable
from typing import Any


class Late:
    """A module by name, imported when an attribute is asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


plgpu = Late("jax.experimental.pallas.mosaic_gpu")
mgpu = Late("jax.experimental.mosaic.gpu")
utils = Late("jax.experimental.mosaic.gpu.utils")
fragmented = Late("jax.experimental.mosaic.gpu.fragmented_array")
launch_context = Late("jax.experimental.mosaic.gpu.launch_context")
arith = Late("jaxlib.mlir.dialects.arith")
gpu = Late("jaxlib.mlir.dialects.gpu")
llvm = Late("jaxlib.mlir.dialects.llvm")
memref = Late("jaxlib.mlir.dialects.memref")
nvvm = Late("jaxlib.mlir.dialects.nvvm")
scf = Late("jaxlib.mlir.dialects.scf")
vector = Late("jaxlib.mlir.dialects.vector")


def scalar():
    """Layout of a number that all threads of a warpgroup have."""
    return plgpu.Layout.WG_SPLAT()


def by_row():
    """Layout of a number a row of a WGMMA accumulator."""
    return plgpu.Layout.WGMMA.reduce(1)


def by_token():
    """Layout of a number a column of it."""
    return plgpu.Layout.WGMMA.reduce(0)


_overlapped = contextvars.ContextVar("kernels are launched one by one and come up early", default=False)


def overlapped(function: Callable) -> Callable:
    """`function`, in whose trace kernels of Hopper come up while those before them end (`dependent`), and products ask for their
    weights even before that: nothing in it writes any. What was traced before it, by other functions, stays as it is."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        before = _overlapped.set(True)
        try:
            return function(*args, **kwargs)
        finally:
            _overlapped.reset(before)

    return traced


def overlapping() -> bool:
    return _overlapped.get()


def dependent(body: Callable, *, waits: bool = False, **kwargs) -> Callable:
    """`plgpu.kernel`; where kernels overlap its blocks come up while the kernel before it ends, and wait for all that it wrote:
    programmatic dependent launch (CUDA programming guide, "Programmatic Dependent Launch and Synchronization"). In a CUDA graph
    of XLA nothing comes of it but its instructions.

    waits: the body calls `griddepcontrol_wait` itself, before it reads others' results and before it writes.
    """
    if not overlapping():
        return plgpu.kernel(body, **kwargs)

    @functools.wraps(body)
    def begun(*refs, **scratch):
        plgpu.griddepcontrol_launch_dependents()
        if not waits:
            plgpu.griddepcontrol_wait()
        return body(*refs, **scratch)

    return plgpu.kernel(begun, **kwargs)
