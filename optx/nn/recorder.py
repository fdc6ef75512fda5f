"""What parts of a model hand to who asks for it, beside their outputs: arrays of the trace that runs them."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax


class Recorder[T]:
    """`with recorder() as found:` collects, in the order of the layers, what parts that are traced inside give to `add`."""

    def __init__(self, name: str):
        self._found: contextvars.ContextVar[list[T] | None] = contextvars.ContextVar(name, default=None)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[list[T]]:
        found: list[T] = []
        before = self._found.set(found)
        try:
            yield found
        finally:
            self._found.reset(before)

    def add(self, make: Callable[[], T]) -> None:
        """Takes what `make` returns, which is not called where nobody asks."""
        if (found := self._found.get()) is not None:
            found.append(make())


# Losses of single layers, float32[], whose gradients reach parameters that a hard choice hides from the model's own loss.
auxiliary: Recorder[jax.Array] = Recorder("auxiliary losses")
