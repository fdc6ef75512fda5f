"""What stacks with what, and what is known to break. Data: a table over axes and facts read off the tree."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

from flax import nnx

from optx import ir
from optx.errors import LegalityError, did_you_mean
from optx.nn.attention import Attention
from optx.recipe import Recipe
from optx.registry import Axis, Pass

# Axes that bet on the same redundancy; every other pair stacks.
OVERLAP: frozenset[frozenset[Axis]] = frozenset({frozenset({Axis.READS, Axis.DROP})})
LOSSES = "their quality losses add up while their savings do not"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """A refusal by what the tree holds after the recipe ran on shapes; `allow: [name]` overrides it."""

    name: str
    why: str
    found: Callable[[nnx.Module], list[str]]  # the paths at which it holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """One refusal, judged for a recipe on a model."""

    name: str
    where: tuple[str, ...]  # paths in the tree, or pairs of passes; none: it does not hold
    why: str
    override: str  # what to write into the recipe
    allowed: bool  # the recipe says it

    @property
    def refused(self) -> bool:
        return bool(self.where) and not self.allowed


def _key_bias(module: nnx.Module) -> bool:
    linear = getattr(module, "qkv", None) or getattr(module, "k", None)
    return isinstance(module, Attention) and linear is not None and linear.bias is not None


def _low_bit_keys_under_bias(model: nnx.Module) -> list[str]:
    return [
        path for path, module in ir.walk(model) if _key_bias(module) and getattr(module.cache.format, "width", 8) < 8
    ]


FACTS: tuple[Fact, ...] = (
    Fact(
        name="k_bias_low_bit_kv",
        why="a key bias puts a constant as large as the signal under the scale, and keys below 8 bits lose the signal "
        "(Qwen2.5-7B at 3 bits: perplexity 7.5 -> 9,410); use int8 or fp8",
        found=_low_bit_keys_under_bias,
    ),
)


# What is read off each layer's mixer, as the text of its value.
READINGS: Mapping[str, Callable[[nnx.Module], str]] = {
    "mixer": lambda mixer: type(mixer).__name__,
    "cache": lambda mixer: str(mixer.cache),
    "key bias": lambda mixer: "yes" if _key_bias(mixer) else "no",
}


def readings(model: nnx.Module) -> dict[str, dict[str, list[str]]]:
    """The facts that refusals rest on: name -> value -> paths of the mixers at which it stands."""
    found: dict[str, dict[str, list[str]]] = {name: {} for name in READINGS}
    for i, layer in enumerate(model.layers):
        for name, read in READINGS.items() if layer.mixer is not None else ():
            found[name].setdefault(read(layer.mixer), []).append(f"layers/{i}/mixer")
    return found


def judge(recipe: Recipe, model: nnx.Module) -> tuple[Judgement, ...]:
    """Every refusal there is, whether it holds on the tree that the recipe made, and whether the recipe overrides it."""
    pairs = tuple(f"{one.name} ({one.axis}) and {two.name} ({two.axis})" for one, two in overlaps(recipe))
    axes = "; ".join(" with ".join(sorted(pair)) for pair in OVERLAP)
    stack = Judgement(
        name="overlap",
        where=pairs,
        why=f"two passes bet on the same redundancy ({axes}): {LOSSES}",
        override="allow_overlap: true",
        allowed=recipe.allow_overlap,
    )
    facts = (
        Judgement(
            name=fact.name,
            where=tuple(fact.found(model)),
            why=fact.why,
            override=f"allow: [{fact.name}]",
            allowed=fact.name in recipe.allow,
        )
        for fact in FACTS
    )
    return (stack, *facts)


def overlaps(recipe: Recipe) -> list[tuple[Pass, Pass]]:
    """Pairs of the recipe's passes that bet on the same redundancy."""
    steps = [pass_ for pass_, _ in recipe.steps()]
    return [pair for pair in itertools.combinations(steps, 2) if frozenset(pass_.axis for pass_ in pair) in OVERLAP]


def check_stack(recipe: Recipe) -> None:
    """Raises LegalityError when two passes bet on the same redundancy and the recipe does not say `allow_overlap`."""
    for first, second in overlaps(recipe) if not recipe.allow_overlap else ():
        raise LegalityError(
            f"{first.name} ({first.axis}) and {second.name} ({second.axis}) bet on the same redundancy: {LOSSES}; "
            "set allow_overlap: true to stack them"
        )


def check_facts(recipe: Recipe, model: nnx.Module) -> None:
    """Raises LegalityError for a fact that holds and is not allowed, or for an unknown name in `allow`."""
    names = [fact.name for fact in FACTS]
    for name in recipe.allow:
        if name not in names:
            raise LegalityError(f"recipe.allow: {name!r} is no refusal{did_you_mean(name, names)}")
    for fact in FACTS:
        paths = fact.found(model)
        if paths and fact.name not in recipe.allow:
            raise LegalityError(f"{paths[0]}: {fact.why}; or override with allow: [{fact.name}]")
