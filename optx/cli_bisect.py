"""`optx compile --bisect`: which pass and which sites cost the quality, and a recipe that keeps its budget."""

import json as json_text
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import optx
from optx.bisect import Bisection, bisect
from optx.checkpoint.source import Source
from optx.cli_flags import Flag
from optx.errors import UsageError
from optx.recipe import Recipe
from optx.report import table

FLAG = Flag(
    name="bisect",
    kind=bool,
    default=False,
    help="with --calibration: find the pass and the sites that cost the quality, propose a recipe within max_kl; writes nothing",
)
SHOWN = 10  # sites that are listed


def run(
    source: Source,
    recipe: Recipe,
    target: str,
    calibration: Path | None,
    unwanted: Mapping[str, Any],
    *,
    json,
    progress,
) -> None:
    """unwanted: flags of compile that say nothing here."""
    if calibration is None:
        raise UsageError("compile --bisect: --calibration FILE is missing: the cost is measured on a text")
    if given := [name for name, value in unwanted.items() if value]:
        raise UsageError(f"compile --bisect: --{given[0]} says nothing here, as nothing is written; leave it out")
    optx.plan(source, recipe, target)  # what it would refuse, before any weight is read
    found = bisect(source, recipe, calibration, progress)
    if json:
        print(json_text.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        print(text(found))


def text(found: Bisection) -> str:
    """The ranking, and the edit where there is one."""
    state = "no max_kl in the recipe" if found.budget is None else f"max_kl {found.budget:g} is kept"
    if found.edit:
        state = f"max_kl {found.budget:g} is broken"
    title = f"{found.model} + {found.recipe.name}: KL {found.kl:.6f} nats a token on {found.tokens:,} tokens; {state}"
    passes = [[each.name, f"{each.sites}", f"{found.kl:.6f}", f"{each.without:.6f}"] for each in found.passes]
    sites = [[path, f"{found.first:.6f}", f"{without:.6f}"] for path, without in found.sites[:SHOWN]]
    more = f"\n{len(found.sites) - SHOWN} more sites" if len(found.sites) > SHOWN else ""
    return "\n\n".join(
        [
            title,
            table(("pass", "sites", "KL with it", "KL without"), passes),
            f"sites of {found.culprit}, on the first window\n{table(('site', 'KL with it', 'KL without'), sites)}{more}",
            *_proposal(found),
        ]
    )


def _proposal(found: Bisection) -> list[str]:
    edit = found.edit
    if edit is None:
        return ["give the recipe a max_kl to have an edit proposed"] if found.budget is None else []
    sites = f"{len(edit.sites)} of the {edit.of} sites of {found.culprit}: {', '.join(edit.sites)}"
    left_out = [*edit.passes, found.culprit if len(edit.sites) == edit.of else sites]
    yaml_text = yaml.safe_dump(edit.recipe.to_dict(), sort_keys=False, width=4096).rstrip()
    return [f"leave out {' and '.join(left_out)}\nmeasured so: KL {edit.kl:.6f}", yaml_text]
