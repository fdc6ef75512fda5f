"""`optx ablate`: recipes over models, as a table and a Pareto plot; goes on where it was stopped."""

import dataclasses
import json as json_text
import sys
from pathlib import Path

from optx import ablate, ablate_config, ablate_plot, heal_plot
from optx import target as targets
from optx.ablate_config import Ablation, ModelRow, Study
from optx.ablate_table import AXES, Outcome
from optx.cli_flags import Flag, Verb
from optx.cli_verbs import read_text, say
from optx.errors import RecipeError, UsageError

FILES = ("table.md", "table.csv", "results.json", "pareto.png")
HEALING = "healing.png"


def ablations(
    config: str, *, out, model, weights, dtype, text, calibration, context, max_windows, target, x, fresh, strict, json
) -> None:
    ablation, folder = ablate_config.read(config)
    given = {"context": context, "max_windows": max_windows, "target": target, "x": x} | _models(model, weights, dtype)
    ablation = dataclasses.replace(ablation, **{name: value for name, value in given.items() if value is not None})
    study, protocol = _study(ablation, folder, text, calibration)
    progress = sys.stderr.isatty()
    results = ablate.run(study, Path(out), fresh=fresh, progress=progress, say=say)
    outcome = Outcome(
        name=study.name, description=study.description, protocol=protocol, x=study.x, results=tuple(results)
    )
    data = json_text.dumps(outcome.to_dict(), indent=1, ensure_ascii=False)
    _write(outcome, data, Path(out))
    print(data if json else outcome.text(), flush=True)
    if strict:
        ablate.check_strict(results)


def _models(model, weights, dtype) -> dict:
    """--model in place of the file's."""
    for name, value in (("weights", weights), ("dtype", dtype)):
        if value is not None and not model:
            raise UsageError(f"ablate: --{name} {value} is for --model; the file says it of its own models")
    form = {"weights": weights or "dense", "dtype": dtype}
    return {"models": tuple(ModelRow(model=each, **form) for each in model) or None}


def _study(ablation: Ablation, folder: Path, text, calibration) -> tuple[Study, dict]:
    """Everything that can be wrong with the file is said before a model is read."""
    if ablation.text is None and text is None:
        raise RecipeError("ablation.text: missing; name a file of UTF-8 text there, or give --text FILE")
    variants, models = ablate_config.variants(ablation, folder), ablate_config.models(ablation, folder)
    words, where = _read("text", ablation.text, folder, text)
    sample, _ = _read("calibration", ablation.calibration, folder, calibration)
    if ablation.measured and sample is None:
        raise RecipeError(
            "ablation.measured: needs a text; name a file in ablation.calibration, or give --calibration FILE"
        )
    study = Study(
        name=ablation.name,
        description=ablation.description,
        models=models,
        variants=variants,
        text=words,
        calibration=sample,
        measured=ablation.measured,
        context=ablation.context,
        stride=ablation.stride,
        max_windows=ablation.max_windows,
        target=targets.get(ablation.target),
        decode_context=ablation.decode_context,
        x=ablation.x,
    )
    names = ("context", "stride", "max_windows", "decode_context")
    return study, {"text": where, **{name: getattr(study, name) for name in names}, "target": study.target.name}


def _read(name: str, own: str | None, folder: Path, flag: str | None) -> tuple[str | None, str | None]:
    """(content, name) of the file of a flag, else of the ablation's key."""
    if flag is None and own is None:
        return None, None
    path, where = (flag, f"--{name}") if flag is not None else (ablate_config.near(own, folder), f"ablation.{name}")
    return read_text(path, where), Path(path).name


def _write(outcome: Outcome, data: str, out: Path) -> None:
    texts = dict(zip(FILES, (outcome.markdown(), outcome.csv(), f"{data}\n")))
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    plot = out / FILES[-1]
    if not ablate_plot.draw(outcome, plot):
        plot.unlink(missing_ok=True)
        say(f"note: no variant has a KL, so {plot} is not drawn")
    else:
        say(f"written to {out}: {', '.join(FILES)}")
    several = len({r.model for r in outcome.results}) > 1
    healed = [(f"{r.model}, {r.variant}" if several else r.variant, r.healing) for r in outcome.results if r.healing]
    if heal_plot.compare({name: Path(found["folder"]) for name, found in healed}, out / HEALING):
        say(f"curves of healing: {out / HEALING}")


def verb(model_flags: tuple[Flag, ...], calibration: Flag, json: Flag) -> Verb:
    own = tuple(dataclasses.replace(flag, default=None, help=f"of --model: {flag.help}") for flag in model_flags)
    return Verb(
        name="ablate",
        line="compile and evaluate a grid of recipes over models: one table and a Pareto plot; resumable",
        arguments=("CONFIG",),
        flags=(
            Flag(
                name="out", value="DIR", required=True, help="folder of the tables; results kept there are used again"
            ),
            Flag(name="model", value="MODEL", repeated=True, help="in place of the file's models"),
            *own,
            Flag(name="text", value="FILE", help="UTF-8 text that is scored (default: the file's)"),
            dataclasses.replace(calibration, help="text for calibrated passes and budgets (default: the file's)"),
            Flag(
                name="context", kind=int, least=2, value="N", help="tokens of a window (default: the file's, or 1024)"
            ),
            Flag(name="max_windows", kind=int, least=1, value="N", help="stop after as many (default: the file's)"),
            Flag(name="target", value="NAME", help="whose time a token is predicted (default: the file's, or h100)"),
            Flag(name="x", allowed=tuple(AXES), help="what KL is drawn against (default: the file's, or layer_bits)"),
            Flag(name="fresh", kind=bool, default=False, help="compute every result again, for a changed optx"),
            Flag(name="strict", kind=bool, default=False, help="a refused variant is an error, after all have run"),
            json,
        ),
        examples=(
            "optx ablate formats --model model.gguf --text test.txt --context 512 --max_windows 4 --out ablation",
            "optx ablate mine.yaml --out ablation",
        ),
        notes="CONFIG is a YAML file, or the name of one that ships with optx: models, a text, and variants as a list of "
        "recipes, a grid of fields by dotted path over a base recipe, or the base without each of its rules (leave_one_out). "
        "Each result is kept in DIR/results under a hash of the model's files, recipe, text, protocol and versions: a run "
        "that was stopped goes on, a second one computes only what is new. A recipe that a model refuses is a row with the "
        f"reason. Written: {', '.join(FILES)}, and {HEALING} where recipes heal.",
        run=ablations,
    )
