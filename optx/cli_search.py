"""`optx search`: recipes under objectives."""

import dataclasses
import json as json_text
import sys
from pathlib import Path

from optx import api, search_text
from optx.cli_flags import Flag, Verb
from optx.errors import SearchError
from optx.recipe import Recipe
from optx.search import POINTS, WINDOWS, search
from optx.search_space import GRANULARITIES, LADDER
from optx.slo import KINDS, parse


def run(
    model: str, *, slo, target, calibration, candidates, sites, points, max_windows, measured, refine, dtype, out, json
) -> None:
    asked = parse(slo)
    chosen = LADDER if candidates is None else Recipe.from_yaml(candidates)
    source = api.load(model, "dense", dtype)
    found = search(
        source, asked, target, calibration=calibration and Path(calibration), out=out, candidates=chosen, sites=sites,
        points=points, windows=max_windows, measured=measured, refine=refine, progress=sys.stderr.isatty(),
    )  # fmt: skip
    files = search_text.write(found, Path(out)) if out else []
    if json:
        print(json_text.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        print(search_text.text(found))
    if found.winner is None:
        raise SearchError(search_text.missed(found))
    if not json:
        winner = found.winner.recipe.to_yaml()
        print(
            f"\nwritten to {out}; try: optx compile {model} --recipe {files[-1]} --out compiled"
            if out
            else f"\n{winner}"
        )


def verb(target: Flag, calibration: Flag, dtype: Flag, json: Flag) -> Verb:
    bounds = ", ".join(f"{name} {kind.op}" for name, kind in KINDS.items())
    return Verb(
        name="search",
        line="find the recipe of the least KL under bounds on time, bytes or memory, from measured sensitivities",
        arguments=("MODEL",),
        flags=(
            Flag(name="slo", value="SLO", required=True, help=f"objectives, separated by commas, of: {bounds}"),
            target,
            dataclasses.replace(calibration, help="text on which sensitivities are measured"),
            Flag(name="out", value="DIR", help="front, recipes and figures; an interrupted search goes on from there"),
            Flag(
                name="sites",
                allowed=GRANULARITIES,
                default="layer+projection",
                help="what takes one format: a layer, a kind of projection in all layers, or a kind in a layer",
            ),
            Flag(
                name="candidates",
                value="R",
                help="recipe whose rules are the candidates (default: a ladder of formats)",
            ),
            Flag(name="points", kind=int, default=POINTS, least=2, value="N", help="budgets along the front"),
            Flag(
                name="max_windows",
                kind=int,
                default=WINDOWS,
                least=1,
                value="N",
                help="of 512 tokens of the calibration text",
            ),
            Flag(
                name="measured",
                kind=int,
                least=1,
                value="N",
                help="forms a group that are run on the text, others following from their weight errors (default: all)",
            ),
            Flag(name="refine", kind=bool, default=True, help="measure around a winner whose KL is far from predicted"),
            dtype,
            json,
        ),
        examples=(
            "optx search model.gguf --target h100 --slo 'tpot<=5ms, ctx=8k, kl<=0.05' --calibration text.txt --out found",
            "optx search model.gguf --slo 'bits<=3.5' --calibration text.txt --sites projection --out found",
        ),
        notes="Measures each group of sites alone in each format that fits it: runs of the model as many as groups times formats "
        "times windows; --measured makes them fewer. 128k tokens are 131,072; GB are 10^9 bytes, GiB 2^30. DIR/winner.yaml is a "
        "recipe for compile. The target's memory is a bound as well.",
        run=run,
    )
