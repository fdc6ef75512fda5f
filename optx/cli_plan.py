"""`optx plan`: recipes on shapes, for one target or several, and why a recipe is refused."""

import contextlib
import dataclasses
import functools
import gc
import json as json_text
import sys
from collections.abc import Iterator, Mapping, Sequence

from flax import nnx

from optx import api, legality
from optx import target as targets
from optx.checkpoint.source import Source
from optx.cli_flags import Flag, Verb
from optx.cost_mesh import Mesh
from optx.errors import OptxError
from optx.plan_table import side_by_side, why_dict, why_text
from optx.recipe import Recipe
from optx.target import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A recipe run on shapes as far as it came."""

    model: str
    recipe: Recipe
    trees: Sequence[nnx.Module]  # the model and what passes made of it
    plan: api.Plan | None  # None: it did not come through
    error: OptxError | None  # what stopped it, or refuses it

    @property
    def name(self) -> str:
        return self.plan.name if self.plan else f"{self.model} + {self.recipe.name}"

    @functools.cached_property
    def read(self) -> tuple[Mapping, Sequence[legality.Judgement]]:
        """Facts of the last tree and all refusals."""
        recipe = self.recipe
        if self.plan and (made := self.plan.source.recipe):  # an export: its passes have run
            recipe = Recipe(name=made.name, allow=made.allow)
        return legality.readings(self.trees[-1]), legality.judge(recipe, self.trees)


def plan(model: str, *, weights, dtype, recipe, target, batch, context, tensor, expert, why, json) -> None:
    mesh = Mesh(tensor=tensor, expert=expert)
    places = [targets.get(name) for name in target or ("auto",)]
    recipes = [Recipe.from_yaml(name) for name in recipe] or [Recipe(name="none")]
    with _uncollected():
        source = api.load(model, weights, dtype)
        attempts = [_attempt(source, each, places[0]) for each in recipes]
    if failed := next((each for each in attempts if each.error), None):
        if why:
            _print_why(attempts, json)
        about = f"{failed.recipe.name}: " if len(recipes) > 1 else ""
        raise type(failed.error)(f"{about}{failed.error}") from None
    longest = attempts[0].plan.tree.context
    if context is not None and context > longest:
        beyond = f"a context of {context:,} tokens is beyond the model's {longest:,}"
        print(f"note: {beyond}; the bytes are as if it were not", file=sys.stderr, flush=True)
    plans = [(one, dataclasses.replace(one.plan, target=place)) for one in attempts for place in places]
    if json:
        data = [each.to_dict(batch, context, mesh) | (_legality(one) if why else {}) for one, each in plans]
        _print_json(data[0] if len(data) == 1 else {"plans": data})
        return
    if len(plans) == 1:
        print(plans[0][1].text(batch, context, mesh))
    else:
        print(side_by_side([each for _, each in plans], batch, context, mesh))
    if why:
        print()
        _print_why(attempts, json)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Trees and traces live to the end of the plan: looking for garbage among them takes a tenth of its time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _attempt(source: Source, recipe: Recipe, target: Target) -> Attempt:
    guard, planned, error = legality.Guard(recipe), None, None
    try:
        planned = api.on_shapes(source, recipe, target, [guard])
        legality.check_stack(recipe)
        legality.check_facts(recipe, *planned.trees)
    except OptxError as stopped:
        error = stopped
    trees = planned.trees if planned else guard.trees or [source.tree]
    return Attempt(model=source.origin.name, recipe=recipe, trees=trees, plan=planned, error=error)


def _legality(attempt: Attempt) -> dict:
    return {"legality": why_dict(*attempt.read)}


def _print_why(attempts: Sequence[Attempt], json: bool) -> None:
    """Facts and refusals of each recipe."""
    if not json:
        print("\n\n".join(why_text(one.name, *one.read) for one in attempts))
        return
    data = [{"model": one.model, "recipe": one.recipe.to_dict(), **_legality(one)} for one in attempts]
    _print_json(data[0] if len(data) == 1 else {"plans": data})


def _print_json(value: dict) -> None:
    print(json_text.dumps(value, indent=2, ensure_ascii=False))


def verb(model_flags: tuple[Flag, ...], recipe: Flag, target: Flag, json: Flag) -> Verb:
    several = {"repeated": True, "default": None}
    return Verb(
        name="plan",
        line="run recipes on shapes: bytes before and after each pass, bounds on time and price, what is refused and why",
        arguments=("MODEL|CONFIG",),
        flags=(
            dataclasses.replace(recipe, **several),
            dataclasses.replace(target, **several),
            Flag(name="batch", kind=int, default=1, least=1, value="N", help="sequences decoded at once"),
            Flag(
                name="context",
                kind=int,
                least=1,
                value="N",
                help="tokens of each sequence (default: the model's context)",
            ),
            Flag(name="tensor", kind=int, default=1, least=1, value="N", help="devices that every layer is split over"),
            Flag(
                name="expert",
                kind=int,
                default=1,
                least=1,
                value="N",
                help="groups of those; experts are split over them",
            ),
            Flag(name="why", kind=bool, default=False, help="print the facts that legality reads, and every refusal"),
            *model_flags,
            json,
        ),
        examples=(
            "optx plan config.json --recipe int4_kv8 --target h100 --batch 8 --context 4096",
            "optx plan qwen3-8b --recipe int4_kv8 --recipe fp8_kv8 --target h100 --target rtx-5090",
            "optx plan qwen3-8b --recipe sliding --why",
        ),
        notes="Reads no weights, needs no accelerator: a bare config.json will do, or the name of one that ships with "
        "optx. What fails here fails in compile. Times are bounds that no program beats. Several recipes or targets are put "
        "side by side, a row for each pair; without a target it is this machine. Targets of yours are YAML files in "
        "~/.config/optx/targets.",
        run=plan,
    )
