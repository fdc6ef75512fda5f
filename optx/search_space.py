"""What a search chooses among: groups of sites, the forms that each can take, and the recipe that a choice is.

A candidate is a pass with its options. One that comes later needs no code here: it goes into the ladder, or into a recipe file
whose rules are taken as candidates. What a candidate cannot rewrite (a group that does not divide an axis, a refusal of
legality) is found out on shapes.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence

from flax import nnx

from optx import ir, legality, pipeline, registry, strict
from optx.errors import LegalityError, PassError, RecipeError
from optx.passes.fuse_projections import FuseProjections
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.quantize_weights import QuantizeWeights
from optx.plan_table import folded
from optx.recipe import Recipe
from optx.registry import Noted, Pass, PassOptions, Seen, SeenBlock, Site, Skipped, Stage

GRANULARITIES = ("layer", "projection", "layer+projection")
JOINED = {
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "gate": "gate_up",
    "up": "gate_up",
}  # read the same input: stored alike, they fuse

DIGITS = "[0-9]+"

Choice = tuple[int, ...]  # a form for each group, 0 being as it is


def _ints(width: int, *groups: int | None) -> tuple[PassOptions, ...]:
    return tuple(QuantizeWeights(format=f"int{width}", group=group, symmetric=False) for group in groups)


# Rungs that no other rung of as many bytes always beats; what divides no axis of a model falls out by itself.
LADDER = Recipe(
    name="ladder",
    weights=(
        QuantizeWeights(format="int8"),
        QuantizeWeights(format="fp8_e4m3"),
        *_ints(4, 32, 64, 128),
        QuantizeWeights(format="int4", group=64),
        QuantizeWeights(format="nvfp4"),
        QuantizeWeights(format="mxfp4"),
        *_ints(3, 32, 64, 128),
        *_ints(2, 32, 64),
    ),
    cache=(
        QuantizeKV(format="int8"),
        QuantizeKV(format="fp8_e4m3"),
        QuantizeKV(format="int4", symmetric=False),
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A pass with its options; `options.match` narrows the sites that it is offered to."""

    options: PassOptions

    @functools.cached_property
    def pass_(self) -> Pass:
        return registry.by_options(self.options, "candidate")

    @functools.cached_property
    def label(self) -> str:
        """`quantize_weights int4 group=64 symmetric=False`."""
        facts = {"format": getattr(self.options, "format", None), **strict.dump(self.at(None))}
        named = (
            str(value) if name == "format" else f"{name}={value}" for name, value in facts.items() if value is not None
        )
        return " ".join([self.pass_.name, *named])

    def at(self, match: str | None) -> PassOptions:
        """The rule of a recipe that applies it where `match` does."""
        return dataclasses.replace(self.options, match=match)

    def apply(
        self, path: str, module: nnx.Module, layers: int, seen: Seen | SeenBlock | None = None
    ) -> nnx.Module | Skipped:
        """The module in this form, concrete or abstract. seen: of a calibrated pass on weights. Raises PassError."""
        new = self.pass_.apply(Site(path=path, layers=layers, seen=seen), module, self.options)
        return new.module if isinstance(new, Noted) else new


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Sites that take one form together."""

    name: str
    stage: Stage
    sites: tuple[str, ...]
    where: str  # the pattern that matches them
    forms: tuple[Candidate, ...]  # besides as it is

    def form(self, index: int) -> Candidate | None:
        return self.forms[index - 1] if index else None


def candidates_of(recipe: Recipe) -> tuple[Candidate, ...]:
    """The rules of a recipe, each as a candidate. Raises RecipeError where it has none, or one twice."""
    rules = [options for stage in Stage for options in getattr(recipe, stage)]
    found = tuple(Candidate(options=options) for options in rules)
    if not found:
        raise RecipeError(f"{recipe.name}: holds no pass; a search needs candidates to choose among")
    if len({candidate.options for candidate in found}) < len(found):
        raise RecipeError(f"{recipe.name}: a candidate stands twice")
    return found


def groups_of(tree: nnx.Module, candidates: Sequence[Candidate], sites: str = "layer+projection") -> tuple[Group, ...]:
    """Groups of sites, each with the candidates that take all its sites, in the order of the tree.

    tree: abstract. sites: one of GRANULARITIES: a group a layer; a group for each kind of projection, over all layers in
    which it is built alike; or a group for each kind in each layer. What lies outside the layers is a group of its own.
    Raises: RecipeError for candidates that no site takes, or of which two stages claim one site.
    """
    unread = {path for path, _ in ir.walk(tree.draft, "draft")} if tree.draft is not None else set()
    alike = layers_alike(tree)
    owners: dict[str, Stage] = {}
    members: dict[tuple[Stage, str], list[str]] = {}
    for path, module in ir.walk(tree):
        for stage in dict.fromkeys(c.pass_.stage for c in candidates if _takes(c, path, module) and path not in unread):
            if owners.setdefault(path, stage) != stage:
                raise RecipeError(
                    f"candidates: passes of stages {owners[path]} and {stage} both rewrite {path}; search one stage, and "
                    "compile its winner with the other"
                )
            members.setdefault((stage, _key(path, sites, alike)), []).append(path)
    forms: dict[tuple, tuple[Candidate, ...]] = {}  # by what groups of equal layers have in common
    groups = []
    for (stage, _), paths in members.items():
        common = stage, likeness(paths, alike)
        if common not in forms:
            few = list(dict(zip(reversed(common[1]), reversed(paths), strict=True)).values())  # one of those alike
            forms[common] = tuple(c for c in candidates if c.pass_.stage == stage and _fits(c, tree, paths, few))
        name = folded(list(dict.fromkeys(_name(path, sites) for path in paths)))
        where = pattern(paths, len(tree.layers))
        groups.append(Group(name=name, stage=stage, sites=tuple(paths), where=where, forms=forms[common]))
    groups = [group for group in groups if group.forms]
    if not groups:
        raise RecipeError("candidates: none of them fits a site of this model; give other formats or smaller groups")
    return tuple(sorted(groups, key=lambda group: list(Stage).index(group.stage)))


def layers_alike(tree: nnx.Module) -> tuple[int, ...]:
    """For each layer the first one that is built as it is."""
    first: dict[tuple, int] = {}
    return tuple(first.setdefault(ir.signature(layer), i) for i, layer in enumerate(tree.layers))


def likeness(paths: Sequence[str], alike: Sequence[int]) -> tuple[str, ...]:
    """Equal for groups that lie at the same places of equal layers."""
    return tuple(re.sub(r"^layers/(\d+)", lambda match: f"layers/{alike[int(match[1])]}", path) for path in paths)


def _takes(candidate: Candidate, path: str, module: nnx.Module) -> bool:
    match = candidate.options.match
    return isinstance(module, candidate.pass_.module) and (match is None or re.fullmatch(match, path) is not None)


def _kind(path: str) -> str:
    """`mixer/qkv` of `layers/3/mixer/k`: the projection without its layer."""
    inside = re.sub(r"^layers/\d+/", "", path)
    parent, _, last = inside.rpartition("/")
    return f"{parent}/{JOINED.get(last, last)}".lstrip("/")


def _key(path: str, sites: str, alike: Sequence[int]) -> str:
    layer = re.match(r"layers/(\d+)/", path)
    if layer is None or sites != "projection":
        return _name(path, sites)
    return f"{alike[int(layer[1])]} {_kind(path)}"


def _name(path: str, sites: str) -> str:
    """What stands for a site in its group's name."""
    layer = re.match(r"layers/\d+(?=/)", path)
    return path if layer is None else layer[0] if sites == "layer" else f"{layer[0]}/{_kind(path)}"


def _fits(candidate: Candidate, tree: nnx.Module, paths: Sequence[str], few: Sequence[str]) -> bool:
    """Whether all sites take the candidate, and legality lets it stand. few: of the sites, one of each that are alike."""
    if not all(_takes(candidate, path, ir.get(tree, path)) for path in paths):
        return False
    try:
        legality.check_facts(Recipe(), with_form(tree, few, candidate))
    except (PassError, LegalityError):
        return False
    return True


def with_form(tree: nnx.Module, paths: Iterable[str], candidate: Candidate) -> nnx.Module:
    """A copy of the tree with the candidate applied at `paths`. Raises PassError where one of them does not take it."""
    out = ir.shallow(tree)
    for path in paths:
        new = candidate.apply(path, ir.get(tree, path), len(tree.layers))
        if isinstance(new, Skipped):
            raise PassError(f"{candidate.pass_.name} at {path}: {new.reason}")
        ir.put(out, path, new)
    return out


def recipe_of(groups: Sequence[Group], choice: Choice, name: str, tree: nnx.Module, description: str = "") -> Recipe:
    """The recipe that gives every group its form: a rule for each candidate chosen, and projections joined where that
    changes something. tree: abstract, as it is."""
    chosen: dict[Candidate, list[str]] = {}
    for group, index in zip(groups, choice, strict=True):
        if index:
            chosen.setdefault(group.form(index), []).extend(group.sites)
    rules: dict[str, list[PassOptions]] = {}
    for candidate, paths in chosen.items():
        rules.setdefault(candidate.pass_.stage, []).append(candidate.at(pattern(paths, len(tree.layers))))
    recipe = Recipe(name=name, description=description, **rules)
    fused = dataclasses.replace(recipe, lower=(FuseProjections(),))
    return fused if _fuses(tree, fused) else recipe


def _fuses(tree: nnx.Module, recipe: Recipe) -> bool:
    """Whether the last pass rewrites any site of the tree that those before it make."""
    for pass_, rules in recipe.steps():
        tally = pipeline.Tally(hits={where: 0 for where, _ in rules})
        tree = pipeline.rewrite(tree, pass_, rules, prefix="", layers=len(tree.layers), tally=tally)
    return bool(tally.paths)


def pattern(paths: Sequence[str], count: int) -> str:
    """A regular expression that matches these paths and no others of `count` layers: `layers/(0|2)/mixer/o|output`."""
    layers: dict[str, list[str]] = {}  # what stands behind the layer -> its indices
    single = []
    for path in dict.fromkeys(paths):
        match = re.fullmatch(r"layers/(\d+)/(.+)", path)
        layers.setdefault(match[2], []).append(match[1]) if match else single.append(re.escape(path))
    alike: dict[tuple[str, ...], list[str]] = {}  # indices -> all that stands behind each of them
    for rest, indices in layers.items():
        alike.setdefault(tuple(indices), []).append(rest)
    parts = [
        f"layers/{_any(indices) if len(indices) < count else DIGITS}/{_any(rests)}" for indices, rests in alike.items()
    ]
    return "|".join([*parts, *single])


def _any(words: Sequence[str]) -> str:
    escaped = [re.escape(word) for word in words]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"
