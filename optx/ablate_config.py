"""What an ablation runs: models, a text, and recipes that are listed, spanned by a grid or made by leaving rules out. In YAML,
read as strictly as a recipe, paths relative to the file's folder:

models: [{model: model.gguf, dtype: float32}, {model: wide.gguf, set: {group: 128}}]
text: wikitext2_test.txt
context: 512
base: int4_kv8
grid:                                   # fields of the base by dotted path; every combination is a variant
  weights.0.format: [int8, int4]
  cache.0: {KV as it is: null, KV int8: {pass: quantize_kv}}      # whole rules with labels; null leaves the rule out

In place of `grid`: `leave_one_out: true` (the base, and the base without each of its rules), or `recipes` (names, paths or inline
recipes; the base too where one is given).
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

import optx.configs
from optx import registry, strict
from optx.errors import RecipeError, did_you_mean
from optx.recipe import Recipe
from optx.registry import Stage
from optx.target import Target

WHERE = "ablation"
STAGES = tuple(Stage)
GRID_FIELDS = tuple(f.name for f in dataclasses.fields(Recipe) if f.name not in ("name", "description"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A model, loaded as `optx.load` does."""

    model: str  # what `optx.load` takes; a path relative to the file's folder comes first
    weights: Literal["dense", "packed"] = "dense"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: the checkpoint's own
    name: str | None = None  # in tables; None: the checkpoint's
    set: Any = None  # options by name that take other values in every rule that gives them, {group: 128}; None: none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation:
    """An ablation as it is written."""

    name: str = ""  # "": the file's
    description: str = ""
    models: tuple[ModelRow | str, ...] = ()
    text: str | None = None  # a file of UTF-8 text that is scored
    calibration: str | None = None  # a file of UTF-8 text for calibrated passes and budgets, and for `measured`
    measured: bool = False  # what each lossy pass cost too, on the calibration text: it takes longer
    context: int = 1024  # tokens of a window
    stride: int | None = None  # tokens between windows; None: they do not overlap
    max_windows: int | None = None  # None: the whole text
    target: str = "h100"  # of the time a token
    decode_context: int = 4096  # tokens of the sequence whose next token's bytes and time are counted
    x: Literal["layer_bits", "bits", "bytes_per_token", "kv_bytes_per_token", "ms_bound"] = (
        "layer_bits"  # against which KL is drawn
    )
    base: Any = None  # a recipe: name, path or inline
    recipes: tuple[Any, ...] | None = None
    grid: Any = None
    leave_one_out: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """An ablation ready to run: what `optx.ablate.run` takes."""

    name: str
    description: str
    models: tuple[ModelRow, ...]
    variants: tuple[Recipe, ...]
    text: str
    calibration: str | None
    measured: bool
    context: int
    stride: int | None
    max_windows: int | None
    target: Target
    decode_context: int
    x: str


def read(path: str | Path) -> tuple[Ablation, Path]:
    """An ablation from a file, or one that ships with optx by its name, and the folder that its paths start from.

    Raises: RecipeError naming the key, what was got and the nearest allowed name.
    """
    path = _find(Path(path))
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), strict.UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    found = strict.load(Ablation, {} if data is None else data, WHERE)
    for name in ("context", "stride", "max_windows", "decode_context"):
        value, least = getattr(found, name), 2 if name == "context" else 1
        if value is not None and value < least:
            raise RecipeError(f"{WHERE}.{name}: got {value}; allowed: {least} or more")
    return dataclasses.replace(found, name=found.name or path.stem), path.parent


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    shipped = {p.stem: p for p in (Path(next(iter(optx.configs.__path__))) / "ablations").glob("*.yaml")}
    if path.stem in shipped and len(path.parts) == 1:
        return shipped[path.stem]
    raise RecipeError(f"{path}: no such ablation file{did_you_mean(path.stem, shipped)}")


def models(ablation: Ablation, folder: Path) -> tuple[ModelRow, ...]:
    """The models, paths resolved. Raises RecipeError for none, or one twice."""
    rows = [ModelRow(model=row) if isinstance(row, str) else row for row in ablation.models]
    rows = [dataclasses.replace(row, model=near(row.model, folder)) for row in rows]
    if not rows:
        raise RecipeError(f"{WHERE}.models: none; list what optx.load takes there, or give --model MODEL")
    for row in rows:
        _check_set(row)
    for first, second in itertools.combinations(rows, 2):
        if dataclasses.replace(first, name=None) == dataclasses.replace(second, name=None):
            raise RecipeError(f"{WHERE}.models: {first.model} is listed twice with the same weights and dtype")
    return tuple(rows)


def near(path: str, folder: Path) -> str:
    """A path from the folder of the ablation where something stands there, else as it is; ~ is the user's home."""
    return str(folder / path) if (folder / path).exists() else os.path.expanduser(path)


def for_model(row: ModelRow, recipe: Recipe) -> Recipe:
    """The recipe with what the model's row sets."""
    if not row.set or not recipe.steps():
        return recipe
    data = recipe.to_dict()
    for stage in set(STAGES) & set(data):
        data[stage] = [rule | {k: v for k, v in row.set.items() if rule.get(k) is not None} for rule in data[stage]]
    return Recipe.from_dict(data, f"{WHERE}.models: {row.model}: recipe")


def _check_set(row: ModelRow) -> None:
    known = {f.name for pass_ in registry.PASSES.values() for f in dataclasses.fields(pass_.options)}
    if row.set is not None and not isinstance(row.set, dict):
        raise RecipeError(f"{WHERE}.models: {row.model}: set: got {row.set!r}; allowed: a mapping of options of passes")
    for name in row.set or ():
        if name not in known or name == "match":
            raise RecipeError(f"{WHERE}.models: {row.model}: set: no option {name!r}{did_you_mean(str(name), known)}")


def variants(ablation: Ablation, folder: Path) -> tuple[Recipe, ...]:
    """The recipes that are compiled, in the ablation's order. One without passes is left out: it is the uncompiled model, which
    has a row anyway.

    Raises: RecipeError naming the key for a wrong value, two variants that are the same, or none at all.
    """
    ways = {"recipes": ablation.recipes is not None, "grid": ablation.grid is not None}
    given = [name for name, there in (ways | {"leave_one_out": ablation.leave_one_out}).items() if there]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise RecipeError(f"{WHERE}: variants come from one of recipes, grid, leave_one_out: true; got {got}")
    base = None if ablation.base is None else _recipe(ablation.base, folder, f"{WHERE}.base", "base")
    if base is None and given[0] != "recipes":
        raise RecipeError(f"{WHERE}.base: missing; {given[0]} needs a recipe to start from")
    found = tuple(_WAYS[given[0]](ablation, base, folder))
    _check_distinct(found)
    if not any(recipe.steps() for recipe in found):
        raise RecipeError(f"{WHERE}.{given[0]}: no variant has a pass")
    return tuple(recipe for recipe in found if recipe.steps())


def _recipe(value: Any, folder: Path, where: str, name: str | None = None) -> Recipe:
    """name: of an inline recipe that has none; None: that is an error."""
    if isinstance(value, str):
        return Recipe.from_yaml(near(value, folder))
    if isinstance(value, dict) and name is None and "name" not in value:
        raise RecipeError(f"{where}: has no name; add one, it stands in tables and plots")
    recipe = Recipe.from_dict(value, where)
    return recipe if "name" in value else dataclasses.replace(recipe, name=name)


def _listed(ablation: Ablation, base: Recipe | None, folder: Path) -> Iterator[Recipe]:
    if base is not None:
        yield base
    for i, value in enumerate(ablation.recipes):
        yield _recipe(value, folder, f"{WHERE}.recipes[{i}]")


def _left_out(ablation: Ablation, base: Recipe, folder: Path) -> Iterator[Recipe]:
    """The base, then the base without each rule: named by its pass, by its place too where the pass has several rules."""
    yield base
    rules = [(stage, i, registry.by_options(o, stage).name) for stage in STAGES for i, o in _rules(base, stage)]
    passes = [name for _, _, name in rules]
    for stage, i, name in rules:
        place = f"{stage}[{i}] " if passes.count(name) > 1 else ""
        kept = tuple(options for j, options in _rules(base, stage) if j != i)
        yield dataclasses.replace(base, **{stage: kept}, name=f"without {place}{name}", description="")


def _rules(recipe: Recipe, stage: str) -> list[tuple[int, registry.PassOptions]]:
    return list(enumerate(getattr(recipe, stage)))


def _grid(ablation: Ablation, base: Recipe, folder: Path) -> Iterator[Recipe]:
    """The product of the axes, the last changing fastest."""
    where = f"{WHERE}.grid"
    if not isinstance(ablation.grid, dict) or not ablation.grid:
        raise RecipeError(f"{where}: got {ablation.grid!r}; allowed: a mapping of dotted paths to lists of values")
    paths = [str(path) for path in ablation.grid]
    for path in paths:
        _check_path(path, base, f"{where}.{path}")
    for outer, inner in itertools.permutations(paths, 2):
        if inner.startswith(f"{outer}."):
            raise RecipeError(f"{where}.{inner}: lies in {outer}, which the grid sets too; keep one of them")
    short = _short(paths)
    axes = [_axis(values, short[path], f"{where}.{path}") for path, values in zip(paths, ablation.grid.values())]
    for point in itertools.product(*axes):
        name = " ".join(label for label, _ in point if label) or base.name
        data = _with(base.to_dict(), {path: value for path, (_, value) in zip(paths, point)})
        data = {key: value for key, value in data.items() if key not in ("name", "description")}
        yield dataclasses.replace(Recipe.from_dict(data, f"{where} at {name!r}: recipe"), name=name)


def _check_path(path: str, base: Recipe, where: str) -> None:
    """Raises RecipeError for what the base does not have."""
    field, *rest = path.split(".")
    if field not in GRID_FIELDS:
        raise RecipeError(f"{where}: no field {field!r} that a grid can set{did_you_mean(field, GRID_FIELDS)}")
    if field not in STAGES:
        if rest:
            raise RecipeError(f"{where}: {field} has no parts; set {field} itself")
        return
    rules = _rules(base, field)
    if not rest or rest[0] not in {f"{i}" for i, _ in rules}:
        have = ", ".join(f"{field}.{i} ({registry.by_options(o, field).name})" for i, o in rules)
        raise RecipeError(f"{where}: no such rule in the recipe {base.name!r}, which has {have or f'none at {field}'}")
    options = type(rules[int(rest[0])][1])
    name, fields = ".".join(rest[1:]), [f.name for f in dataclasses.fields(options)]
    if name and name not in fields:
        raise RecipeError(f"{where}: unknown field of {options.__name__}{did_you_mean(name, fields)}")


def _short(paths: Sequence[str]) -> dict[str, str]:
    """What stands for each path in names: its last word where that is no other's, else more of it."""
    words = {path: [part for part in path.split(".") if not part.isdigit()] for path in paths}
    forms = {path: (words[path][-1], ".".join(words[path]), path) for path in paths}
    taken = [[forms[path][level] for path in paths] for level in range(3)]
    return {p: next(form for level, form in enumerate(forms[p]) if taken[level].count(form) == 1) for p in paths}


def _axis(values: Any, short: str, where: str) -> list[tuple[str, Any]]:
    """(label, value) along one axis."""
    if isinstance(values, dict) and values:
        return [(str(label), value) for label, value in values.items()]
    if isinstance(values, list) and values:
        return [(f"{short}={_label(value)}", value) for value in values]
    raise RecipeError(f"{where}: got {values!r}; allowed: a list of values, or a mapping of labels to values")


def _label(value: Any) -> str:
    """A value in a variant's name: a rule by the options that it sets."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        options = [f"{k}:{_label(v)}" for k, v in value.items() if k not in ("pass", "match")]
        return ",".join(options) or str(value.get("pass"))
    return ",".join(map(_label, value)) if isinstance(value, list) else str(value)


def _with(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain form with values set by path; rules set to None are left out, once all paths are through."""
    out = {key: list(value) if isinstance(value, list) else value for key, value in data.items()}
    for path, value in changes.items():
        field, *rest = path.split(".")
        if not rest:
            out[field] = value
            continue
        i = int(rest[0])
        out[field][i] = {**out[field][i], rest[1]: value} if rest[1:] else value
    return {key: [r for r in value if r is not None] if key in STAGES else value for key, value in out.items()}


def content(recipe: Recipe) -> dict:
    """What of a recipe decides its result: all but its name."""
    return {key: value for key, value in recipe.to_dict().items() if key not in ("name", "description")}


def _check_distinct(found: Sequence[Recipe]) -> None:
    names: set[str] = set()
    by_content: dict[str, str] = {}
    for recipe in found:
        text = json.dumps(content(recipe), sort_keys=True)
        if text in by_content:
            raise RecipeError(f"{WHERE}: the variants {by_content[text]!r} and {recipe.name!r} are the same recipe")
        if recipe.name in names:
            raise RecipeError(f"{WHERE}: two variants are called {recipe.name!r}; give one another name")
        names.add(recipe.name)
        by_content[text] = recipe.name


_WAYS = {"recipes": _listed, "grid": _grid, "leave_one_out": _left_out}
