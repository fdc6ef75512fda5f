"""Packed weights as the Hopper kernel of `grouped_matmul` reads them, and back."""

import dataclasses

import jax

from optx.formats import Float8, Int
from optx.pallas.quant_matmul import mosaic_gpu_sm90_fragments as fragments
from optx.tensor import Arranged, QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts(Arranged):
    """Packed weights [E, D, F] in the order of `wgmma` fragments. Made by `relayout`, never exported."""

    rows: fragments.Fragments  # of the weight [D, E * F]
    experts: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int]:
        d, f = self.rows.shape
        return self.experts, d, f // self.experts

    @property
    def ndim(self) -> int:
        return 3

    @property
    def size(self) -> int:
        return self.rows.size

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    @property
    def dtype(self):
        return self.rows.dtype

    @property
    def format(self):
        return self.rows.format

    def qtensor(self) -> QTensor:
        """The inverse of `relayout`."""
        return jax.tree.map(lambda part: part.reshape(self.experts, -1, part.shape[-1]), self.rows.qtensor())


def relayout(w: QTensor) -> Experts:
    """The same weights [E, D, F] as `Experts`; w: what `supports` takes."""
    flat = jax.tree.map(lambda part: part.reshape(-1, part.shape[-1]), w)
    return Experts(rows=fragments.relayout(flat), experts=w.shape[0])


def declines(format_, d: int) -> str | None:
    """Why weights of this format with D contracted numbers are not taken, or None."""
    integer, float8 = isinstance(format_, Int), isinstance(format_, Float8)
    if not (integer and format_.width in (4, 8)) and not (float8 and format_.kind == "e4m3"):
        return f"weights of {format_}; allowed: int8, int4, fp8_e4m3"
    group = format_.group or d
    if group != d and group not in (32, 64, 128):
        return f"weights of {format_}; allowed groups: 32, 64, 128, one of all D"
    return None
