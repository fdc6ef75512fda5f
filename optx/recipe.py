"""A recipe: which passes run on which modules, by stage. Typed dataclasses; strict YAML both ways.

name: int4_kv8
weights:
  - {pass: quantize_weights, format: int4, group: 64, match: "layers/.*"}
cache:
  - {pass: quantize_kv, format: int8}
"""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from optx import passes, registry, strict
from optx.errors import RecipeError, did_you_mean
from optx.registry import Pass, PassOptions, Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """How much of the calibration text calibrated passes see; quality is measured on the first windows."""

    windows: int = 32
    context: int = 512  # tokens of a window

    def __post_init__(self):
        if self.windows < 1 or self.context < 2:
            raise RecipeError(
                f"recipe.calibration: {self.windows} windows of {self.context} tokens; allowed: at least 1 of at least 2"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Options objects of passes, listed under their stage. Stages run in order whatever the order here."""

    name: str = "recipe"
    description: str = ""
    structure: tuple[PassOptions, ...] = ()
    attention: tuple[PassOptions, ...] = ()
    heal: tuple[PassOptions, ...] = ()
    fold: tuple[PassOptions, ...] = ()
    weights: tuple[PassOptions, ...] = ()
    cache: tuple[PassOptions, ...] = ()
    lower: tuple[PassOptions, ...] = ()
    allow: tuple[str, ...] = ()  # names of refusals (legality.py) that this recipe overrides
    allow_overlap: bool = False  # lets `reads` and `drop` techniques, which bet on the same redundancy, stack
    require: str | None = None  # backend that every op must use where it has one; None: the best that takes the call
    calibration: Calibration = Calibration()
    max_kl: float | None = None  # nats a token that all passes may cost on calibration text; None: no budget

    def __post_init__(self):
        if self.max_kl is not None and not 0 < self.max_kl < float("inf"):
            raise RecipeError(f"recipe.max_kl: got {self.max_kl}; allowed: a number above 0, nats a token")
        for stage in Stage:
            rules = tuple(getattr(self, stage))
            object.__setattr__(self, stage, rules)
            for i, options in enumerate(rules):
                where = f"recipe.{stage}[{i}]"
                pass_ = registry.by_options(options, where)
                if pass_.stage != stage:
                    raise RecipeError(
                        f"{where}: {pass_.name} runs in stage '{pass_.stage}', not '{stage}'; "
                        f"list it under '{pass_.stage}:'"
                    )

    def steps(self) -> list[tuple[Pass, tuple[tuple[str, PassOptions], ...]]]:
        """Passes in the order in which they run, each with its rules as (place in the recipe, options)."""
        steps = []
        for stage in Stage:
            rules = [(f"recipe.{stage}[{i}]", options) for i, options in enumerate(getattr(self, stage))]
            for pass_ in passes.in_order(stage):
                mine = tuple((where, options) for where, options in rules if type(options) is pass_.options)
                if mine:
                    steps.append((pass_, mine))
        return steps

    @classmethod
    def from_dict(cls, data: Any, where: str = "recipe") -> "Recipe":
        """Raises RecipeError naming the key, what was got and the nearest allowed name."""
        if not isinstance(data, dict):
            raise RecipeError(f"{where}: got {type(data).__name__}; allowed: a mapping of stages to lists of passes")
        fields = [f.name for f in dataclasses.fields(cls)]
        plain = {}
        for key, value in data.items():
            if key in registry.PASSES:
                stage = registry.PASSES[key].stage
                raise RecipeError(f"{where}.{key}: is a pass; list it under '{stage}:' as '- pass: {key}'")
            if key not in fields:
                raise RecipeError(f"{where}.{key}: unknown field of Recipe{did_you_mean(str(key), fields)}")
            plain[key] = _rules(value, f"{where}.{key}") if key in list(Stage) else value
        for f in dataclasses.fields(cls):
            if f.name in plain and f.name not in list(Stage):
                plain[f.name] = strict.convert(plain[f.name], f.type, f"{where}.{f.name}")
        return cls(**plain)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        path = find_yaml(path)
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), strict.UniqueKeys)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise RecipeError(f"{path}: not YAML: {error}") from None
        recipe = cls.from_dict({} if data is None else data)
        return recipe if "name" in (data or {}) else dataclasses.replace(recipe, name=path.stem)

    def to_dict(self) -> dict:
        out = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in list(Stage):
                rules = [{"pass": registry.by_options(o, f.name).name, **strict.dump(o)} for o in value]
                if rules:
                    out[f.name] = rules
            elif value != f.default:
                out[f.name] = strict.dump(value)
        return out

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _rules(value: Any, where: str) -> tuple[PassOptions, ...]:
    if not isinstance(value, list):
        raise RecipeError(f"{where}: got {value!r}; allowed: a list of passes, each '- pass: NAME' with its options")
    rules = []
    for i, item in enumerate(value):
        at = f"{where}[{i}]"
        if not isinstance(item, dict) or "pass" not in item:
            raise RecipeError(f"{at}: got {item!r}; allowed: a mapping with the key 'pass' and the pass's options")
        pass_ = registry.by_name(item["pass"], f"{at}.pass")
        rules.append(strict.load(pass_.options, {k: v for k, v in item.items() if k != "pass"}, at))
    return tuple(rules)


def find_yaml(path: str | Path) -> Path:
    """A recipe file, or one of the recipes that ship with optx by its name. Raises RecipeError naming the nearest."""
    path = Path(path)
    if path.is_file():
        return path
    shipped = {p.stem: p for p in Path(_configs()).glob("*.yaml")}
    if path.stem in shipped and len(path.parts) <= 2:
        return shipped[path.stem]
    raise RecipeError(f"{path}: no such recipe file{did_you_mean(path.stem, shipped)}")


def _configs() -> str:
    import optx.configs

    return next(iter(optx.configs.__path__))
