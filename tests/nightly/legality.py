"""The matrix of legality: every pass, and every pair of passes in the order in which they run, on a tiny model of every family.

    python tests/nightly/legality.py            compile all of it on shapes, verify it, compare with legality_matrix.yaml
    python tests/nightly/legality.py --write    write that file anew, to be read before it is committed

Families are the checkpoints in tests/goldens; what passes are asked is passes.yaml.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from flax import nnx

import optx
from optx import legality, passes, pipeline, registry, verify
from optx.errors import LegalityError, OptxError
from optx.recipe import Recipe
from optx.registry import Stage

HERE = Path(__file__).resolve().parent
GOLDENS = HERE.parent / "goldens"
MATRIX, PASSES = HERE / "legality_matrix.yaml", HERE / "passes.yaml"
OK = "ok"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A recipe of one or two entries of passes.yaml."""

    names: tuple[str, ...]
    recipe: Recipe

    def __str__(self):
        return " + ".join(self.names)


def families() -> tuple[str, ...]:
    return tuple(sorted(path.parent.name for path in GOLDENS.glob("*/config.json")))


@functools.cache
def tree(family: str) -> nnx.Module:
    """The family's tiny model on shapes."""
    return optx.load_config(GOLDENS / family / "config.json").tree


@functools.cache
def entries() -> Mapping[str, Mapping]:
    return yaml.safe_load(PASSES.read_text(encoding="utf-8"))


def missing() -> list[str]:
    """Passes that ship with optx and stand in no pair of the matrix."""
    asked = {entry["rule"]["pass"] for entry in entries().values() if entry["pairs"]}
    ours = {pass_.name for stage in Stage for pass_ in passes.in_order(stage) if _ships(pass_)}
    return sorted(ours - asked)


def _ships(pass_: registry.Pass) -> bool:
    return pass_.apply.__module__.startswith("optx.")


def cells() -> Iterator[Cell]:
    """Every entry alone, every pair of entries of different passes, every pass twice."""
    rules = {name: entry["rule"] for name, entry in entries().items()}
    paired = [name for name, entry in entries().items() if entry["pairs"]]
    for name in rules:
        yield _cell(rules, name)
    for one, two in itertools.combinations(sorted(paired, key=lambda name: _rank(rules[name])), 2):
        if rules[one]["pass"] != rules[two]["pass"]:
            yield _cell(rules, one, two)
    for name in {rules[name]["pass"]: name for name in reversed(paired)}.values():
        yield _cell(rules, name, name)


def _rank(rule: Mapping) -> tuple[int, int]:
    pass_ = registry.PASSES[rule["pass"]]
    return list(Stage).index(pass_.stage), passes.in_order(pass_.stage).index(pass_)


def _cell(rules: Mapping[str, Mapping], *names: str) -> Cell:
    stages: dict[str, list] = {}
    for name in names:
        stages.setdefault(str(registry.PASSES[rules[name]["pass"]].stage), []).append(rules[name])
    return Cell(names=names, recipe=Recipe.from_dict({"name": " + ".join(names), **stages}))


def judged(model: nnx.Module, recipe: Recipe, checks: Sequence[verify.Rule] = ()) -> str:
    """`ok`, or the refusal's name and text. checks: what the verifier checks after each pass."""
    try:
        legality.check_stack(recipe)
        trees, _ = pipeline.run(model, recipe, [legality.Guard(recipe)], checks)
        legality.check_facts(recipe, *trees)
    except LegalityError as error:
        return f"{error.name}: {error}"
    except OptxError as error:
        return f"{type(error).__name__}: {error}"
    return OK


@functools.cache
def committed() -> Mapping[str, Mapping[str, str]]:
    """family -> recipe -> verdict; the file lists recipes by verdict, each text once a family."""
    rows = yaml.safe_load(MATRIX.read_text(encoding="utf-8"))
    return {family: {cell: said for said, named in row.items() for cell in named} for family, row in rows.items()}


def write(found: Mapping[str, Mapping[str, str]]) -> None:
    rows: dict[str, dict[str, list[str]]] = {}
    for family, row in found.items():
        for cell, verdict in row.items():
            rows.setdefault(family, {}).setdefault(verdict, []).append(cell)
    MATRIX.write_text(yaml.safe_dump(rows, sort_keys=False, width=4096), encoding="utf-8")


def matrix(checks: Sequence[verify.Rule] = ()) -> dict[str, dict[str, str]]:
    return {family: {str(cell): judged(tree(family), cell.recipe, checks) for cell in cells()} for family in families()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {MATRIX.name} anew")
    anew = parser.parse_args().write
    if absent := missing():
        print(f"{PASSES.name} has no entry with `pairs: true` for {', '.join(absent)}", file=sys.stderr)
        return 1
    found = matrix(() if anew else verify.RULES)
    if anew:
        write(found)
        return 0
    want, differ = committed(), 0
    for family, row in found.items():
        for cell, verdict in row.items():
            if (said := want.get(family, {}).get(cell)) != verdict:
                differ += 1
                print(f"{family}: {cell}: found {verdict}; committed: {said}")
    total = sum(map(len, found.values()))
    print(f"{total} recipes on {len(found)} models: {differ} differ from {MATRIX.name}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
