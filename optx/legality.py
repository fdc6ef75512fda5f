"""What stacks with what, and what is known to break. Data: a table over axes and facts read off the tree."""

import dataclasses
from collections.abc import Callable

from flax import nnx

from optx import ir
from optx.errors import LegalityError, did_you_mean
from optx.nn.attention import Attention
from optx.recipe import Recipe
from optx.registry import Axis

# Axes that bet on the same redundancy; every other pair stacks.
OVERLAP: frozenset[frozenset[Axis]] = frozenset({frozenset({Axis.READS, Axis.DROP})})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """A refusal by what the tree holds after the recipe ran on shapes; `allow: [name]` overrides it."""

    name: str
    why: str
    found: Callable[[nnx.Module], str | None]  # the path at which it holds


def _low_bit_keys_under_bias(model: nnx.Module) -> str | None:
    for path, module in ir.walk(model):
        if isinstance(module, Attention) and module.cache.format is not None:
            linear = getattr(module, "qkv", None) or module.k
            if linear is not None and linear.bias is not None and getattr(module.cache.format, "width", 8) < 8:
                return path
    return None


FACTS: tuple[Fact, ...] = (
    Fact(
        name="k_bias_low_bit_kv",
        why="a key bias puts a constant as large as the signal under the scale, and keys below 8 bits lose the signal "
        "(Qwen2.5-7B at 3 bits: perplexity 7.5 -> 9,410); use int8 or fp8",
        found=_low_bit_keys_under_bias,
    ),
)


def check_stack(recipe: Recipe) -> None:
    """Raises LegalityError when two passes bet on the same redundancy and the recipe does not say `allow_overlap`."""
    steps = [pass_ for pass_, _ in recipe.steps()]
    for i, first in enumerate(steps):
        for second in steps[i + 1 :]:
            if frozenset({first.axis, second.axis}) in OVERLAP and not recipe.allow_overlap:
                raise LegalityError(
                    f"{first.name} ({first.axis}) and {second.name} ({second.axis}) bet on the same redundancy: their "
                    "quality losses add up while their savings do not; set allow_overlap: true to stack them"
                )


def check_facts(recipe: Recipe, model: nnx.Module) -> None:
    """Raises LegalityError for a fact that holds and is not allowed, or for an unknown name in `allow`."""
    names = [fact.name for fact in FACTS]
    for name in recipe.allow:
        if name not in names:
            raise LegalityError(f"recipe.allow: {name!r} is no refusal{did_you_mean(name, names)}")
    for fact in FACTS:
        path = fact.found(model)
        if path and fact.name not in recipe.allow:
            raise LegalityError(f"{path}: {fact.why}; or override with allow: [{fact.name}]")
