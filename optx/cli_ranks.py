"""`optx ranks`: ranks of MLA by layer, read off calibration text."""

import dataclasses
import json as json_text
from pathlib import Path

from optx import api, mla_ranks, quality
from optx.cli_flags import Flag, Verb
from optx.errors import UsageError
from optx.passes.mla import Mla
from optx.recipe import Recipe


def run(model: str, *, recipe, calibration, energy, out, overwrite, dtype, json) -> None:
    path = Path(out)
    if path.exists() and not overwrite:  # before the work, not after
        raise UsageError(f"--out: {out} is there already; take another name, or --overwrite")
    source, rules = api.load(model, "dense", dtype), Recipe.from_yaml(recipe)
    if not any(isinstance(options, Mla) for options in rules.attention):
        raise UsageError(
            f"--recipe: {rules.name} has no pass 'mla' in its stage 'attention', so there are no ranks to choose"
        )
    text = quality.windows(Path(calibration), source, rules.calibration)
    found = mla_ranks.resolved(source.load(), rules, text, energy=energy)
    before, after = (api.plan(source, each).tree.cache_plan().unit_bytes for each in (None, found))
    path.write_text(found.to_yaml(), encoding="utf-8")
    ranks = {options.match: options.rank for options in found.attention if isinstance(options, Mla)}
    if json:
        print(json_text.dumps({"recipe": str(path), "ranks": ranks, "kv_bytes": [before, after]}))
    else:
        lines = "\n".join(f"  {where}: {rank}" for where, rank in ranks.items())
        print(f"ranks:\n{lines}\nKV a token: {before:,.0f} B -> {after:,.0f} B\nwritten: {path}; try:")
        print(f"optx compile {model} --recipe {path} --calibration {calibration} --out compiled")


def verb(recipe: Flag, calibration: Flag, overwrite: Flag, dtype: Flag, json: Flag) -> Verb:
    return Verb(
        name="ranks",
        line="give each layer of a recipe's pass 'mla' a rank of its own, by what its latent holds of a text",
        arguments=("MODEL",),
        flags=(
            dataclasses.replace(recipe, required=True),
            dataclasses.replace(calibration, required=True, help="text that is looked at"),
            Flag(
                name="energy",
                kind=float,
                least=0,
                value="X",
                help="share of what a layer holds that its rank must keep (by "
                "default all layers share out the bytes that the recipe's kv_cut leaves)",
            ),
            Flag(name="out", value="FILE", required=True, help="YAML file of the recipe with these ranks"),
            overwrite,
            dtype,
            json,
        ),
        examples=(
            "optx ranks model.gguf --recipe mla_50 --calibration text.txt --out mine.yaml",
            "optx ranks model.gguf --recipe mla_50 --calibration text.txt --energy 0.99 --out mine.yaml",
        ),
        notes="Needs memory for the dense model. What a layer holds is not what the answer feels of it: compare with equal ranks "
        "(optx eval). The recipe that is written is planned by shapes alone, as any other.",
        run=run,
    )
