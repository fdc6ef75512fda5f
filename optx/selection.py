"""Which cached tokens a query reads, where it does not read all that it may see."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Tokens that a query of sparse attention reads: a compressed one every `stride`, `blocks` blocks of `block` that it chooses,
    its own among them, and the `window` newest. The branches of NSA (Yuan et al. 2025, arXiv:2502.11089)."""

    blocks: int
    block: int  # tokens
    window: int = 0  # tokens; 0: no such branch
    stride: int | None = None  # tokens; None: what blocks are chosen by is no token
    index: tuple[str, ...] = ()  # names of the streams that blocks are chosen by
    like: int | None = None  # the layer whose choice is taken; None: its own
    # Of all tokens those that a kv head keeps for every query, in blocks beside `blocks`; None: queries choose.
    share: float | None = None

    @property
    def masked(self) -> bool:
        """Single tokens are kept: all are read, under a mask."""
        return self.share is not None and self.block == 1

    def chosen(self, context: int) -> int:
        """Most tokens of a context of `context` that are read as they were left; of those that are kept, as many as expected."""
        if self.masked:
            return context
        kept = 0 if self.share is None else math.ceil(self.share * context)
        return min(context, kept + self.blocks * self.block + self.window)

    def tokens(self, context: int) -> float:
        return min(context, self.chosen(context) + (context / self.stride if self.stride else 0))

    def ratio(self, context: int) -> float:
        """How many times fewer tokens than all."""
        return context / self.tokens(context)

    def __str__(self):
        if self.masked:
            return f"all under a mask of {self.share:.3g} by kv head and the {self.window} newest"
        unit = f" of {self.block}" if self.block > 1 else ""
        unit += "" if self.share is None else f" and the {self.share:.3g} that a kv head keeps"
        chosen = "" if self.like is None else f" chosen by layer {self.like}"
        return f"{self.blocks}{unit}{chosen}" + (f" and the {self.window} newest" if self.window else "")
