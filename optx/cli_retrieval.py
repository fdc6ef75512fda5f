"""`optx bench retrieval`: recipes over generated prompts whose answer stands somewhere in them; goes on where it was stopped."""

import dataclasses
import json as json_text
from pathlib import Path

from optx.bench import retrieval, retrieval_plot
from optx.bench.retrieval import Grid
from optx.bench.retrieval_table import Outcome
from optx.bench.retrieval_tasks import TASKS, Setting
from optx.cli_flags import Flag, Verb
from optx.cli_verbs import read_text, say
from optx.recipe import Recipe

FILES = ("table.md", "results.json", "retrieval.png")


def retrieve(
    model: str,
    *,
    recipe,
    task,
    length,
    depths,
    samples,
    keys,
    text,
    seed,
    rows,
    calibration,
    out,
    fresh,
    weights,
    dtype,
    json,
) -> None:
    setting = Setting(task=task, keys=keys, seed=seed, text=None if text is None else read_text(text))
    spread = tuple(i / (depths - 1) for i in range(depths)) if depths > 1 else (0.5,)
    grid = Grid(setting=setting, lengths=tuple(sorted(set(length))), depths=spread, samples=samples, rows=rows)
    recipes = [Recipe.from_yaml(path) for path in recipe]
    sample = None if calibration is None else read_text(calibration, "--calibration")
    found = retrieval.run(
        model, recipes, grid, Path(out), weights=weights, dtype=dtype, calibration=sample, fresh=fresh, say=say
    )
    filler = "generated sentences" if text is None else Path(text).name
    protocol = {"task": task, "keys": keys, "seed": seed, "text": filler, "samples": samples, "rows": rows}
    outcome = Outcome(
        model=Path(model).name, protocol=protocol | {"depths": spread, "lengths": grid.lengths}, rows=tuple(found)
    )
    data = json_text.dumps(outcome.to_dict(), indent=1, ensure_ascii=False)
    for name, content in zip(FILES, (outcome.markdown(), f"{data}\n")):
        (Path(out) / name).write_text(content, encoding="utf-8")
    retrieval_plot.draw(outcome, Path(out) / FILES[-1])
    say(f"written to {out}: {', '.join(FILES)}")
    print(data if json else outcome.text(), flush=True)


def verb(model_flags: tuple[Flag, ...], recipe: Flag, calibration: Flag, json: Flag) -> Verb:
    return Verb(
        name="bench retrieval",
        line="what a model finds again in a long prompt under each recipe: tables and heat maps; resumable",
        arguments=("MODEL",),
        flags=(
            dataclasses.replace(recipe, repeated=True, help=f"{recipe.help}; the uncompiled model comes first in any case"),
            Flag(name="task", allowed=TASKS, default="needle", help="one number in the text, or one asked for among many"),
            Flag(name="length", kind=int, least=1, value="N", repeated=True, required=True, help="tokens of a prompt, exactly"),
            Flag(name="depths", kind=int, least=1, default=5, value="N", help="places of the needle, evenly from start to end"),
            Flag(name="samples", kind=int, least=1, default=4, value="N", help="prompts for each length and depth"),
            Flag(name="keys", kind=int, least=2, default=8, value="N", help="multikey: sentences with numbers in a prompt"),
            Flag(name="text", value="FILE", help="UTF-8 text that prompts are filled with (default: generated sentences)"),
            Flag(name="seed", kind=int, least=0, default=0, value="N", help="of the prompts, which are the same for all recipes"),
            Flag(name="rows", kind=int, least=2, default=8, value="N", help="of the engine; a prompt takes two"),
            dataclasses.replace(calibration, help="text for recipes with calibrated passes"),
            Flag(name="out", value="DIR", required=True, help="folder of the results; cells kept there are used again"),
            Flag(name="fresh", kind=bool, default=False, help="compute every cell again, for a changed optx"),
            *model_flags,
            json,
        ),
        examples=(
            "optx bench retrieval model.gguf --recipe kv_int8 --recipe kv_int4 --length 1024 --length 4096 --out needle",
            "optx bench retrieval model.gguf --task multikey --text test.txt --length 8192 --samples 8 --out multikey",
        ),
        notes="Each prompt is computed once, by the paged engine with several at once, for two answers: the model's own, which "
        "is right or wrong digit for digit, and the right one, whose log-probability a digit it gives. Each cell of the grid is "
        f"kept in DIR/results: a run that was stopped goes on. Written: {', '.join(FILES)}.",
        run=retrieve,
    )  # fmt: skip
