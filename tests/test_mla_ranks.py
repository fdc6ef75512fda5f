"""Ranks by layer: numbers go where text has most in them, the budget is kept, and the recipe that comes out plans on shapes."""

import json

import calibrated
import families
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import optx
from optx import cli, ir
from optx.errors import RecipeError
from optx.mla_ranks import resolved
from optx.passes.gqa import Gqa
from optx.passes.mla import Mla
from optx.recipe import Recipe

CUT = Recipe(attention=[Mla(kv_cut=0.5, rope="pca", rope_dim=4)])


def uneven():
    """Values and keys of the second layer have three directions."""
    model, rng = ir.shallow(families.concrete("llama")), np.random.default_rng(0)
    attn = model.layers[1].mixer
    narrow = rng.normal(size=(32, 3))
    weights = {name: jnp.asarray(narrow @ rng.normal(size=(3, 16)) / 8, jnp.float32) for name in ("k", "v")}
    parts = {name: ir.replace(getattr(attn, name), weight=weight) for name, weight in weights.items()}
    model.layers[1].mixer = ir.replace(attn, **parts)
    return model


def ranks(recipe):
    return [options.rank for options in recipe.attention]


def test_a_budget_goes_where_text_has_most():
    model, tokens = uneven(), families.prompt(24)
    text = calibrated.windows(model, 8, 32)
    recipe = resolved(model, CUT, text)
    assert [options.match for options in recipe.attention] == ["layers/0/mixer", "layers/1/mixer"]
    assert sum(ranks(recipe)) == 24 and ranks(recipe)[0] > ranks(recipe)[1]
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    planned = optx.plan(ir.abstract(model), recipe)
    assert planned.tree.cache_plan().unit_bytes == model.cache_plan().unit_bytes / 2
    frame = Recipe(attention=[Mla(rope="pca", rope_dim=4)])
    want, even, own = (
        families.forward(calibrated.through(model, each, text)[0], tokens) for each in (frame, CUT, recipe)
    )
    assert families.relative(own, want) < families.relative(even, want)


def test_an_energy_is_held_by_the_least_ranks():
    model = uneven()
    text = calibrated.windows(model, 8, 32)
    most, all_ = (ranks(resolved(model, CUT, text, energy=share)) for share in (0.999, 1.0))
    assert most[1] <= 7 < most[0] <= all_[0] == 28  # two heads of 8 + 8, without the 4 rotated


def test_refusals():
    model = families.concrete("llama")
    with pytest.raises(RecipeError, match="energy 1.5; allowed"):
        resolved(model, CUT, calibrated.windows(model), energy=1.5)
    with pytest.raises(RecipeError, match="recipe.structure"):
        resolved(model, Recipe(structure=[Gqa(kv_heads=1)], attention=CUT.attention), calibrated.windows(model))


def test_the_command_line_writes_a_recipe_that_compiles(tmp_path, capsys):
    recipe, text, out = (tmp_path / name for name in ("cut.yaml", "text.txt", "mine.yaml"))
    recipe.write_text(Recipe(name="cut", attention=[Mla(kv_cut=0.5, rope="pca")]).to_yaml(), encoding="utf-8")
    text.write_text(tiny.TEXT, encoding="utf-8")
    model = tiny.checkpoint(tmp_path / "tiny")
    args = [*map(str, ("ranks", model, "--recipe", recipe, "--calibration", text, "--out", out))]
    assert cli.run([*args, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = Recipe.from_yaml(out)
    assert told["ranks"] == {options.match: options.rank for options in found.attention}
    assert told["kv_bytes"][1] <= told["kv_bytes"][0] / 2
    compiled = optx.compile(optx.load(model), found, calibration=text)
    assert compiled.program.plan.unit_bytes == told["kv_bytes"][1]
    assert cli.run(args) == 2 and "mine.yaml is there already" in capsys.readouterr().err
    assert cli.run([*args, "--overwrite"]) == 0 and "try:\noptx compile" in capsys.readouterr().out
    recipe.write_text(Recipe(name="none").to_yaml(), encoding="utf-8")
    assert cli.run([*args, "--overwrite"]) == 2 and "none has no pass 'mla'" in capsys.readouterr().err
