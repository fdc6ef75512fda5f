"""What moves when in a healing run, and how fast."""

import dataclasses
import math

from flax import nnx

from optx.errors import HealError
from optx.heal_loss import converted, routers, values_of
from optx.passes.distill import Distill

UNMOVED = "draft/"  # begins the names of parameters that the forward does not meet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the run in which the same parameters move."""

    name: str
    moving: tuple[str, ...]
    start: float  # share of the run
    stop: float
    gentle: frozenset[str] = frozenset()  # of `moving`, what moves at `others` of the rate

    def rate(self, progress: float, step: float, options: Distill) -> float:
        """At a place of the run, of which one step is `step`: it falls to 0 as half a cosine over the run (Loshchilov and Hutter
        2017, arXiv:1608.03983), and rises from 0 at the start of each phase, whose moments know nothing yet."""
        length = self.stop - self.start
        rise = ((progress - self.start) / length + step / length) / max(options.warmup, step / length)
        return options.lr * min(1.0, rise) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def phases(teacher: nnx.Module, student: nnx.Module, options: Distill) -> list[Phase]:
    """Converted parts alone, then what the options say. Selection biases of routers move by themselves.

    Raises: HealError where nothing was converted.
    """
    changed = converted(teacher, student)
    if not changed:
        raise HealError(
            "distill: nothing was converted, so there is nothing to heal; put a pass of stage 'structure' or 'attention' before"
        )
    every = [name for name in values_of(student) if name not in routers(student) and not name.startswith(UNMOVED)]
    adapters = tuple(name for name in every if "/adapter/" in name)
    first = tuple(name for name in every if name in changed and name not in adapters)
    then = {"all": tuple(every), "converted": first, "lora": (*first, *adapters)}[options.train]
    cut = 0.0 if set(then) == set(first) else options.converted
    found = (
        Phase(name="converted", moving=first, start=0.0, stop=cut),
        Phase(name=options.train, moving=then, start=cut, stop=1.0, gentle=frozenset(then) - {*first, *adapters}),
    )
    return [phase for phase in found if phase.start < phase.stop]
