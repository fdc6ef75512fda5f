"""`optx heal`: a recipe whose converted model is trained back, and exported."""

import dataclasses
import json as json_text
import shutil
import sys
from pathlib import Path

from optx import api
from optx.checkpoint.export import check_free
from optx.cli_flags import Flag, Verb
from optx.heal_state import CURVES, LOG
from optx.passes.distill import Distill
from optx.recipe import Recipe
from optx.report import healing_text

FILES = {LOG: "healing.jsonl", CURVES: "healing.png"}  # of the run, and what they are called beside the export
OPTIONS = (
    Flag(name="text", value="FILE", repeated=True, help="UTF-8 text, or a token shard (.npy), to train on"),
    Flag(name="sample", kind=int, least=0, value="N", help="sequences that the uncompiled model writes to train on"),
    Flag(name="prime", kind=int, least=0, value="N", help="tokens of the text that each of those begins with (0)"),
    Flag(name="steps", kind=int, least=1, value="N", help="of training, at most (300)"),
    Flag(name="minutes", kind=float, least=0, value="X", help="of training, compilation not counted, at most (all steps)"),
    Flag(name="batch", kind=int, least=1, value="N", help="sequences a step (16)"),
    Flag(name="accumulate", kind=int, least=1, value="N", help="parts of a batch that run one after the other (1)"),
    Flag(name="context", kind=int, least=2, value="N", help="tokens of a sequence (512)"),
    Flag(name="lr", kind=float, least=0, value="X", help="largest rate of AdamW (1e-4)"),
    Flag(name="others", kind=float, least=0, value="X", help="share of that rate for what was not converted (0.1)"),
    Flag(name="hidden", kind=float, least=0, value="X", help="weight of hidden-state matching (1)"),
    Flag(name="converted", kind=float, least=0, value="X", help="share of the run in which converted parts move alone (0.25)"),
    Flag(name="train", allowed=("all", "converted", "lora"), help="what moves after that (all)"),
    Flag(name="rank", kind=int, least=1, value="N", help="of the adapters of --train lora (16)"),
    Flag(name="every", kind=int, least=1, value="N", help="steps between checkpoints and measurements (100)"),
    Flag(name="held_out", kind=int, least=1, value="N", help="sequences to measure on, which are not trained on (16)"),
    Flag(name="devices", kind=int, least=1, value="N", help="that a batch is split over (1)"),
    Flag(name="seed", kind=int, least=0, value="N", help="of the order of sequences, samples and adapters (0)"),
)  # fmt: skip


def run(model: str, *, recipe, calibration, out, target, weights, dtype, overwrite, json, **options) -> None:
    check_free(Path(out), overwrite)  # before the work, not after
    chosen, given = (
        Recipe.from_yaml(recipe),
        {name: value for name, value in options.items() if value not in (None, ())},
    )
    step = dataclasses.replace(chosen.heal[0], **given) if chosen.heal else Distill(**given)
    chosen = dataclasses.replace(chosen, heal=(step,))
    source, text = api.load(model, weights, dtype), calibration and Path(calibration)
    compiled = api.compile(source, chosen, target, calibration=text, progress=sys.stderr.isatty())
    compiled.export(out, overwrite=overwrite)
    found = next(record.healing for record in compiled.plan.records if record.healing is not None)
    for name, called in FILES.items():
        shutil.copyfile(Path(found.folder) / name, Path(out) / called)
    if json:
        print(json_text.dumps(compiled.report.to_dict() | {"out": out}, indent=2, ensure_ascii=False))
    else:
        print(f"{healing_text(compiled.plan.records)}\nwritten to {out}, with {' and '.join(FILES.values())}")


def verb(
    model_flags: tuple[Flag, ...], recipe: Flag, target: Flag, calibration: Flag, overwrite: Flag, json: Flag
) -> Verb:
    return Verb(
        name="heal",
        line="compile a recipe that converts a model, training it back against the uncompiled one",
        arguments=("MODEL",),
        flags=(
            dataclasses.replace(recipe, required=True),
            *OPTIONS,
            Flag(
                name="out",
                value="DIR",
                required=True,
                help="folder of the export, with the log and the curve of the training",
            ),
            target,
            calibration,
            *model_flags,
            overwrite,
            json,
        ),
        examples=(
            "optx heal model.gguf --recipe sliding_3to1 --text corpus.txt --out healed",
            "optx heal model.gguf --recipe sliding_3to1 --sample 2000 --minutes 3 --batch 32 --context 1024 --out healed",
        ),
        notes="Flags of training take the place of what the recipe's step 'distill' says; in parentheses: without one. Goes on "
        "where it was killed; its state is kept in ~/.cache/optx/heal. Passes of later stages (weights, cache) run on what was "
        "healed.",
        run=run,
    )
