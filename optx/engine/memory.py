"""How many pages each pool gets from one budget of memory."""

import os
from collections.abc import Sequence

import jax

from optx.cache import CachePlan
from optx.engine.options import EngineOptions
from optx.errors import RequestError

SHARE = 0.8  # of free memory: what is left is for activations and logits of a tick
DEVICE = 0.92  # of a GPU's memory, for a process that serves: the rest is the driver's and the libraries'


def claim() -> None:
    """Lets this process have DEVICE of a GPU where the environment says nothing else; JAX's own default is 0.75. To be called
    before anything runs on the device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(DEVICE))


def pages_by_group(plan: CachePlan, widths: Sequence[int], options: EngineOptions) -> list[int]:
    """Pages of each token group: enough for all rows at full context (widths: pages of one such row), or in that proportion
    what the budget holds beside the states.

    Raises: RequestError when the budget has no room for a page a group, or is a fraction where the device does not tell.
    """
    if options.pages is not None:
        return [options.pages] * len(widths)
    wanted = [width * options.rows for width in widths]
    budget = _budget(options.memory)
    if budget is None or not wanted:
        return wanted
    sizes = [page_bytes(plan, group, options.page_size) for group in range(len(widths))]
    states = sum(s.unit_bytes for s in plan.specs if s is not None and not s.holds_tokens) * (options.rows + 1)
    left = budget - states - sum(sizes)  # every pool has a page for the writes of padding
    part = min(1.0, left / sum(size * count for size, count in zip(sizes, wanted, strict=True)))
    pages = [int(count * part) for count in wanted]
    if min(pages) < 1:
        raise RequestError(
            f"engine.memory: {budget / 1e6:.1f} MB have no room for states of {states / 1e6:.1f} MB and a page a group "
            f"({', '.join(f'{size / 1e6:.3f}' for size in sizes)} MB); give more, or fewer rows"
        )
    return pages


def page_bytes(plan: CachePlan, group: int, page_size: int) -> float:
    """Bytes of a page in all the layers of a group, positions among them."""
    return page_size * (4 + sum(spec.unit_bytes for spec in plan.members(group)))


def _budget(memory: float | None) -> float | None:
    if memory is not None and memory > 1:
        return memory
    free = _free()
    if memory is not None and free is None:
        kind = jax.local_devices()[0].device_kind
        raise RequestError(f"engine.memory: got {memory}, and a {kind} does not tell what is free; give bytes")
    return None if free is None else (SHARE if memory is None else memory) * free


def _free() -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats and "bytes_limit" in stats else None
