"""Room and behaviour of an engine, fixed at start."""

import dataclasses

import jax

from optx.engine.speculation import Speculation
from optx.errors import RequestError

TICKS = 16


def default_chunks() -> tuple[int, ...]:
    """`EngineOptions.chunks` of the running device."""
    return (16, 64, 256, 512) if jax.default_backend() == "cpu" else (64, 256, 512, 1024, 2048)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Room and chunk sizes of an engine. Sizes are fixed at start: every tick runs a program compiled for one of them."""

    rows: int = 8  # requests decoded at once
    context: int | None = None  # longest prompt + answer, tokens; None: the model's
    page_size: int = 64  # tokens a cache page
    # Tokens of a tick, padded up to one of these, ascending; the last: its budget. None: up to 512 on a CPU, 2048 elsewhere.
    chunks: tuple[int, ...] | None = None
    # Prompt tokens of a tick in which nothing decodes and that they fill, more than the budget; None: never.
    long: int | None = None
    pages: int | None = None  # pages a token group; None: as `memory` says
    # For all caches: bytes, or up to 1 a fraction of free device memory; None: 0.8 of it, and where the device does not tell
    # (a CPU) enough for all rows at full context, which is the most that is taken anyway.
    memory: float | None = None
    ticks: int | None = None  # decode ticks a dispatch while nothing waits; None: 16, on a CPU 1
    mixed: bool | None = None  # chunks of prompts and decodes in one tick; None: on accelerators
    single: bool | None = (
        None  # decodes of one row run a program for one, however many rows there are; None: on accelerators
    )
    overlap: bool | None = None  # plan and dispatch the next tick while the device runs one; None: on accelerators
    # On NVIDIA GPUs ticks run as CUDA graphs. False: kernel by kernel, one tick a dispatch; on Hopper each comes up while the one
    # before it ends. Faster for steps of few large kernels, slower for many small ones: see the README.
    graphs: bool = True
    prefix_cache: bool = True  # keys and values stay while there is room, for prompts that begin alike
    max_waiting: int | None = None  # requests that may wait beyond those for which a row is free; None: any number
    speculate: Speculation | None = None  # drafts, several of them verified in a tick; answers stay the same
    # No bit of an answer depends on what runs beside it, in 16 bits either: prompts in chunks of one size apart from decodes, one
    # tick a dispatch, no shared prefixes, no preemption, attention of a sequence uncut. Slower.
    batch_invariant: bool = False
    debug: bool = False  # check page tables on the device in every tick; slower

    def __post_init__(self):
        for name in ("rows", "context", "page_size", "pages", "ticks", "max_waiting", "long"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"engine.{name}: got {value}; allowed: at least 1")
        if self.memory is not None and not self.memory > 0:
            raise RequestError(
                f"engine.memory: got {self.memory}; allowed: bytes, or a fraction up to 1 of what is free"
            )
        chunks = tuple(default_chunks() if self.chunks is None else self.chunks)
        if not chunks or chunks[0] < 1 or sorted(set(chunks)) != list(chunks):
            raise RequestError(f"engine.chunks: got {list(chunks)}; allowed: ascending sizes of at least 1")
        if self.long is not None and self.long <= chunks[-1]:
            raise RequestError(
                f"engine.long: got {self.long}; allowed: more than the {chunks[-1]} tokens of other ticks"
            )
        if self.mixed and self.rows >= chunks[-1]:
            raise RequestError(
                f"engine.mixed: {self.rows} rows leave no room for prompts in ticks of {chunks[-1]} tokens; allowed: fewer rows"
            )
        if self.batch_invariant:
            against = {
                "mixed": self.mixed, "speculate": self.speculate, "ticks": (self.ticks or 1) > 1, "long": self.long,
                "single": self.single,
            }  # fmt: skip
            if wrong := [name for name, value in against.items() if value]:
                raise RequestError(
                    f"engine.batch_invariant: {wrong[0]} makes answers depend on the batch; leave it out"
                )
            chunks = chunks[-1:]
        object.__setattr__(self, "chunks", chunks)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens that ticks with prompts are compiled for, ascending."""
        return self.chunks if self.long is None else (*self.chunks, self.long)
