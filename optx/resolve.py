"""What options leave to be measured on the whole model, before a recipe is planned: then shapes and weights agree on it."""

import dataclasses
from pathlib import Path

from optx import quality
from optx.checkpoint.source import Source
from optx.errors import RecipeError
from optx.recipe import Recipe
from optx.registry import Stage, by_options


def resolved(source: Source, recipe: Recipe | None, calibration: str | Path | None) -> tuple[Source, Recipe | None]:
    """The source, and the recipe with such options filled in as measured on the uncompiled model, which is then in memory.

    calibration: as `optx.compile` takes it. Raises: RecipeError where it is missing, PassError from the pass.
    """
    asked = [options for stage in Stage for options in getattr(recipe, stage) if options.unresolved] if recipe else []
    if not asked:
        return source, recipe
    if calibration is None:
        name = by_options(asked[0], "recipe").name
        raise RecipeError(
            f"{name}: what it leaves to be measured needs a text; give calibration=TEXT or a path (--calibration FILE)"
        )
    model, text = source.load(), quality.windows(calibration, source, recipe.calibration)
    done = {
        stage: tuple(
            options.resolved(model, text) if options.unresolved else options for options in getattr(recipe, stage)
        )
        for stage in map(str, Stage)
    }
    return source, dataclasses.replace(recipe, **done)
