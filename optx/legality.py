"""What stacks with what, and what is known to break: judged before each pass and on the tree that a recipe made.

The facts are data (legality_facts.py); the table of what stacks is here. A refusal names pass, site, reason, fix and source.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from flax import nnx

from optx.errors import LegalityError, did_you_mean
from optx.legality_eviction import EVICTION_STEPS, EVICTION_TREES
from optx.legality_facts import STEP_FACTS, TREE_FACTS, Fact, Finding, Intent, key_bias
from optx.legality_heads import HEAD_FACTS
from optx.legality_scales import SCALE_FACTS
from optx.legality_selection import SELECTION_FACTS
from optx.legality_structure import STRUCTURE_FACTS
from optx.pipeline import Instrument, Rules
from optx.recipe import Recipe
from optx.registry import Axis, Pass

# Axes that bet on the same redundancy; every other pair stacks.
OVERLAP: frozenset[frozenset[Axis]] = frozenset({frozenset({Axis.READS, Axis.DROP})})
STACK = Fact(
    name="overlap",
    why="their quality losses add up while their savings do not",
    fix="keep the one that costs less, which `optx eval --against` tells",
    source="arithmetic: both leave out the tokens that attention hardly reads, and a token that is gone is not skipped again",
)
OF_STEPS = (*SELECTION_FACTS, *STEP_FACTS, *SCALE_FACTS, *HEAD_FACTS, *STRUCTURE_FACTS, *EVICTION_STEPS)
OF_TREES = (*TREE_FACTS, *EVICTION_TREES)
FACTS: tuple[Fact, ...] = (*OF_STEPS, *OF_TREES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """One refusal, judged for a recipe on a model."""

    name: str
    passes: tuple[str, ...]  # that it refuses; none where the loaded model itself has it, or it does not hold
    where: tuple[str, ...]  # paths in the tree, or pairs of passes; none: it does not hold
    got: tuple[str, ...]  # what stands there, each text once
    why: str
    fix: str
    source: str
    override: str | None  # what to write into the recipe; None: nothing helps but the fix
    allowed: bool  # the recipe says it

    @property
    def refused(self) -> bool:
        return bool(self.where) and not self.allowed

    def __str__(self):
        more = f" and {len(self.where) - 1} more" if len(self.where) > 1 else ""
        place = f"{' and '.join(self.passes)} at " if self.passes else ""
        or_else = f"; or override with {self.override}" if self.override else ""
        return (
            f"{place}{self.where[0]}{more}: {self.why} (got {self.got[0]}); {self.fix} "
            f"[{self.name}; {self.source}]{or_else}"
        )


# What is read off each layer's mixer, as the text of its value.
READINGS: Mapping[str, Callable[[nnx.Module], str]] = {
    "mixer": lambda mixer: type(mixer).__name__,
    "cache": lambda mixer: str(mixer.cache),
    "key bias": lambda mixer: "yes" if key_bias(mixer) else "no",
}


def readings(model: nnx.Module) -> dict[str, dict[str, list[str]]]:
    """The facts that refusals rest on: name -> value -> paths of the mixers at which it stands."""
    found: dict[str, dict[str, list[str]]] = {name: {} for name in READINGS}
    for i, layer in enumerate(model.layers):
        for name, read in READINGS.items() if layer.mixer is not None else ():
            found[name].setdefault(read(layer.mixer), []).append(f"layers/{i}/mixer")
    return found


def judge(recipe: Recipe, trees: Sequence[nnx.Module]) -> tuple[Judgement, ...]:
    """Every refusal there is, whether it holds, and whether the recipe overrides it.

    trees: the model and what each pass made of it, abstract; fewer where a pass could not run.
    """
    return (_stack(recipe), *_of_steps(recipe, trees), *_of_tree(recipe, trees))


def _stack(recipe: Recipe) -> Judgement:
    pairs = overlaps(recipe)
    axes = "; ".join(" with ".join(sorted(pair)) for pair in OVERLAP)
    return Judgement(
        name=STACK.name,
        passes=tuple(dict.fromkeys(pass_.name for pair in pairs for pass_ in pair)),
        where=tuple(f"{one.name} ({one.axis}) and {two.name} ({two.axis})" for one, two in pairs),
        got=tuple(f"{one.axis} and {two.axis}" for one, two in pairs),
        why=f"two passes bet on the same redundancy ({axes}): {STACK.why}",
        fix=STACK.fix,
        source=STACK.source,
        override="allow_overlap: true",
        allowed=recipe.allow_overlap,
    )


def _of_steps(recipe: Recipe, trees: Sequence[nnx.Module]) -> Iterator[Judgement]:
    intents = [Intent(pass_=p, rules=rules, tree=tree) for (p, rules), tree in zip(recipe.steps(), trees)]
    for fact in OF_STEPS:
        found = [(x.pass_.name, fact.found(x)) for x in intents if issubclass(x.pass_.options, fact.of)]
        passes = tuple(name for name, findings in found if findings)
        yield _judgement(recipe, fact, passes, [each for _, findings in found for each in findings])


def _of_tree(recipe: Recipe, trees: Sequence[nnx.Module]) -> Iterator[Judgement]:
    names = [pass_.name for pass_, _ in recipe.steps()]
    for fact in OF_TREES:
        findings = fact.found(trees[-1])
        first = next(i for i, tree in enumerate(trees) if len(trees) == i + 1 or fact.found(tree)) if findings else 0
        yield _judgement(recipe, fact, tuple(names[first - 1 : first]) if first else (), findings)


def _judgement(recipe: Recipe, fact: Fact, passes: tuple[str, ...], findings: Sequence[Finding]) -> Judgement:
    return Judgement(
        name=fact.name,
        passes=passes,
        where=tuple(dict.fromkeys(each.path for each in findings)),
        got=tuple(dict.fromkeys(each.got for each in findings)),
        why=fact.why,
        fix=fact.fix,
        source=fact.source,
        override=f"allow: [{fact.name}]" if fact.override else None,
        allowed=fact.override and fact.name in recipe.allow,
    )


def overlaps(recipe: Recipe) -> list[tuple[Pass, Pass]]:
    """Pairs of the recipe's passes that bet on the same redundancy."""
    steps = [pass_ for pass_, _ in recipe.steps()]
    return [pair for pair in itertools.combinations(steps, 2) if frozenset(pass_.axis for pass_ in pair) in OVERLAP]


def check_stack(recipe: Recipe) -> None:
    """Raises LegalityError when two passes bet on the same redundancy and the recipe does not say `allow_overlap`, and for a
    name in `allow` that is none of a refusal that can be overridden."""
    for first, second in overlaps(recipe) if not recipe.allow_overlap else ():
        raise LegalityError(
            f"{first.name} ({first.axis}) and {second.name} ({second.axis}) bet on the same redundancy: {STACK.why}; "
            f"{STACK.fix} [{STACK.name}; {STACK.source}]; or set allow_overlap: true to stack them",
            name=STACK.name,
        )
    facts = {fact.name: fact for fact in FACTS}
    for name in recipe.allow:
        if name not in facts:
            raise LegalityError(f"recipe.allow: {name!r} is no refusal{did_you_mean(name, facts)}")
        if not facts[name].override:
            raise LegalityError(f"recipe.allow: {name} cannot be overridden, the pass could not run; {facts[name].fix}")


def check_step(recipe: Recipe, pass_: Pass, rules: Rules, tree: nnx.Module) -> None:
    """Raises LegalityError for what the pass must not do to the tree. rules: its own, as `Recipe.steps` gives them."""
    intent = Intent(pass_=pass_, rules=rules, tree=tree)
    for fact in OF_STEPS:
        if issubclass(pass_.options, fact.of) and (findings := fact.found(intent)):
            _refuse(_judgement(recipe, fact, (pass_.name,), findings))


def check_facts(recipe: Recipe, *trees: nnx.Module) -> None:
    """Raises LegalityError for a fact that holds on the last of the trees (a model and what each pass made of it) and is not
    allowed."""
    for judgement in _of_tree(recipe, trees):
        _refuse(judgement)


def _refuse(judgement: Judgement) -> None:
    if judgement.refused:
        raise LegalityError(str(judgement), name=judgement.name)


class Guard(Instrument):
    """Stops a plan before a pass that must not run; `trees` are those that passes met so far."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.trees: list[nnx.Module] = []

    def before_pass(self, pass_, rules, before):
        self.trees.append(before)
        check_step(self.recipe, pass_, rules, before)
