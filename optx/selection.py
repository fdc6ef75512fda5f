"""Which cached tokens a query reads, where it does not read all that it may see."""

import dataclasses


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
    share: float | None = (
        None  # of tokens that a kv head sees beside the window: all are read, under a mask; None: no such mask
    )

    def chosen(self, context: int) -> int:
        """Most tokens of a context of `context` that are read as they were left."""
        return context if self.share is not None else min(context, self.blocks * self.block + self.window)

    def tokens(self, context: int) -> float:
        if self.share is not None:
            return context
        compressed = context / self.stride if self.stride else 0
        return min(context, compressed + self.blocks * self.block + self.window)

    def ratio(self, context: int) -> float:
        """How many times fewer tokens than all."""
        return context / self.tokens(context)

    def __str__(self):
        if self.share is not None:
            return f"all under a mask of {self.share:.3g} by kv head and the {self.window} newest"
        unit = f" of {self.block}" if self.block > 1 else ""
        chosen = "" if self.like is None else f" chosen by layer {self.like}"
        return f"{self.blocks}{unit}{chosen}" + (f" and the {self.window} newest" if self.window else "")
