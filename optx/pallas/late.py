"""Modules of Mosaic GPU, imported when a kernel is traced: they take half a second, and a row's `supports` needs none."""

import importlib
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
