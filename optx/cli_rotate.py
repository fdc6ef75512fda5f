"""`optx rotate`: rotations learned for the rounding of a recipe."""

import dataclasses
import json as json_text
import sys
from pathlib import Path

from optx import api
from optx.cli_flags import Flag, Verb
from optx.learn_rotation import RATE, learn_rotation
from optx.passes.rotate import Rotate
from optx.recipe import Recipe

FILE = "rotation.npz"


def run(model: str, *, recipe, calibration, out, steps, rate, dtype, json) -> None:
    source, rules = api.load(model, "dense", dtype), Recipe.from_yaml(recipe)
    found = learn_rotation(source, rules, Path(calibration), steps=steps, rate=rate, progress=sys.stderr.isatty())
    path = found.save(Path(out) / FILE)
    fold = tuple(dataclasses.replace(o, matrices=str(path)) if isinstance(o, Rotate) else o for o in rules.fold)
    written = Path(out) / f"{rules.name}.yaml"
    written.write_text(dataclasses.replace(rules, fold=fold).to_yaml(), encoding="utf-8")
    if json:
        print(json_text.dumps({"matrices": str(path), "recipe": str(written), "kl": found.kl}))
    else:
        tenth = max(1, steps // 10)
        first, last = (sum(part) / len(part) for part in (found.kl[:tenth], found.kl[-tenth:]))
        print(
            f"KL a token of the rounded model, mean of the first and of the last {tenth} of {steps} steps: "
            f"{first:.4f} -> {last:.4f}\nwritten: {path}, {written}; try: optx compile {model} --recipe {written} "
            f"--calibration {calibration} --out compiled"
        )


def verb(recipe: Flag, calibration: Flag, dtype: Flag, json: Flag) -> Verb:
    return Verb(
        name="rotate",
        line="learn the rotations of a recipe's pass 'rotate' for the formats that the recipe rounds to",
        arguments=("MODEL",),
        flags=(
            dataclasses.replace(recipe, required=True),
            dataclasses.replace(calibration, required=True, help="text on which they are learned"),
            Flag(
                name="out", value="DIR", required=True, help="folder of the rotations and of the recipe that uses them"
            ),
            Flag(name="steps", kind=int, default=100, least=1, value="N", help="of gradient descent, a window each"),
            Flag(name="rate", kind=float, default=RATE, least=0, value="X", help="of Adam at the first step"),
            dtype,
            json,
        ),
        examples=("optx rotate model.gguf --recipe mine.yaml --calibration text.txt --out rotated",),
        notes="Needs memory for the dense model and its gradients. It starts from the random rotations of the recipe's seed.",
        run=run,
    )
