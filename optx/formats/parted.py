"""One axis in two parts whose numbers differ in size, each with scales of its own."""

import dataclasses

import jax
import jax.numpy as jnp

from optx.errors import FormatError
from optx.formats.base import Format, Parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parted(Format):
    """The first `cut` numbers of the axis in `inner`, then the others: an MLA latent, which a norm keeps near 1, and its rotated
    key, which nothing does (DeepSeek-V2, arXiv:2405.04434)."""

    inner: Format
    cut: int

    def __post_init__(self):
        if self.inner.block_rows > 1 or self.cut < 1:
            raise FormatError(
                f"parted format: {self.inner} cut at {self.cut}; allowed: scales a row, a cut of at least 1"
            )

    @property
    def width(self) -> int:
        """Bits of a code; 8 where codes are no integers."""
        return getattr(self.inner, "width", 8)

    @property
    def has_zero(self):
        return self.inner.has_zero

    def __str__(self):
        return f"{self.inner}_cut{self.cut}"

    def check(self, length):
        if length <= self.cut:
            return f"{self}: axis of {length}; allowed: more than {self.cut}"
        return self.inner.check(self.cut) or self.inner.check(length - self.cut)

    def packed(self, length):
        return self.inner.packed(self.cut) + self.inner.packed(length - self.cut)

    def grouped(self, length):
        sizes = [self.inner.grouped(size) for size in (self.cut, length - self.cut)]
        return None if None in sizes else sum(sizes)

    def encode(self, x):
        parts = [self.inner.encode(part) for part in jnp.split(x, [self.cut], axis=-1)]
        return jax.tree.map(lambda *both: jnp.concatenate(both, axis=-1), *parts)

    def decode(self, parts, length, dtype):
        ends = (self.inner.packed(self.cut), self.inner.grouped(self.cut), self.inner.grouped(self.cut))
        names = ("data", "scale", "zero")
        stored = {name: getattr(parts, name) for name in names}
        halves = {
            n: (None, None) if p is None else jnp.split(p, [end], -1) for (n, p), end in zip(stored.items(), ends)
        }
        sizes = (self.cut, length - self.cut)
        each = [Parts(**{name: half[i] for name, half in halves.items()}) for i in range(2)]
        return jnp.concatenate(
            [self.inner.decode(p, size, dtype) for p, size in zip(each, sizes, strict=True)], axis=-1
        )
