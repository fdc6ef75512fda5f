"""`optx plan`: recipes on shapes, for one target or several, and why a recipe is refused."""

import dataclasses
import json as json_text
import sys
from collections.abc import Mapping, Sequence

from optx import api, legality
from optx import target as targets
from optx.checkpoint.source import Source
from optx.cli_flags import Flag, Verb
from optx.cost_mesh import Mesh
from optx.errors import OptxError
from optx.plan_table import side_by_side, why_dict, why_text
from optx.recipe import Recipe
from optx.target import Target


def plan(model: str, *, weights, dtype, recipe, target, batch, context, tensor, expert, why, json) -> None:
    mesh = Mesh(tensor=tensor, expert=expert)
    places = [targets.get(name) for name in target or ("auto",)]
    recipes = [Recipe.from_yaml(name) for name in recipe] or [Recipe(name="none")]
    source = api.load(model, weights, dtype)
    planned = [_on_shapes(source, each, places[0], len(recipes) > 1) for each in recipes]
    read = {id(one): _judged(one) for one in planned} if why else {}
    try:
        for one in planned:
            legality.check_stack(one.recipe)
            legality.check_facts(one.recipe, one.tree)
    except OptxError:
        _print_why(planned, read, json)
        raise
    longest = planned[0].tree.context
    if context is not None and context > longest:
        beyond = f"a context of {context:,} tokens is beyond the model's {longest:,}"
        print(f"note: {beyond}; the bytes are as if it were not", file=sys.stderr, flush=True)
    plans = [(one, dataclasses.replace(one, target=place)) for one in planned for place in places]
    if json:
        data = [each.to_dict(batch, context, mesh) | _legality(read.get(id(one))) for one, each in plans]
        _print_json(data[0] if len(data) == 1 else {"plans": data})
        return
    if len(plans) == 1:
        print(plans[0][1].text(batch, context, mesh))
    else:
        print(side_by_side([each for _, each in plans], batch, context, mesh))
    if why:
        print()
        _print_why(planned, read, json)


def _on_shapes(source: Source, recipe: Recipe, target: Target, several: bool) -> api.Plan:
    """several: an error says which of the recipes it is about."""
    try:
        return api.on_shapes(source, recipe, target)
    except OptxError as error:
        raise type(error)(f"{recipe.name}: {error}" if several else str(error)) from None


def _judged(plan: api.Plan) -> tuple[Mapping, Sequence[legality.Judgement]]:
    return legality.readings(plan.tree), legality.judge(plan.source.recipe or plan.recipe, plan.tree)


def _legality(read) -> dict:
    return {"legality": why_dict(*read)} if read else {}


def _print_why(planned: Sequence[api.Plan], read: Mapping, json: bool) -> None:
    """Facts and refusals of each recipe; nothing where they were not asked for."""
    if not read:
        return
    if not json:
        print("\n\n".join(why_text(one.name, *read[id(one)]) for one in planned))
        return
    data = [
        {"model": one.source.origin.name, "recipe": one.recipe.to_dict(), **_legality(read[id(one)])} for one in planned
    ]
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
