"""Learned rotations: orthogonal, exact, and better for the rounding they were learned for than the random ones at the start."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import optx
from optx import cli
from optx.errors import PassError, RecipeError
from optx.learn_rotation import Learned, cayley, learn_rotation
from optx.passes.quantize_activations import QuantizeActivations
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.rotate import Rotate
from optx.recipe import Recipe

ROUNDED = (
    QuantizeWeights(format="int4", group=16, match="layers/.*"),
    QuantizeActivations(format="int4", match="layers/.*"),
)
RECIPE = Recipe(name="w4a4", fold=(Rotate(),), weights=ROUNDED)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return optx.load(tiny.checkpoint(tmp_path_factory.mktemp("learn") / "tiny", num_hidden_layers=2))


@pytest.fixture(scope="module")
def learned(source) -> Learned:
    return learn_rotation(source, RECIPE, tiny.TEXT, steps=40)


def test_cayley_is_orthogonal_and_starts_at_the_identity(rng):
    q = np.asarray(cayley(jnp.asarray(rng.standard_normal((12, 12)), jnp.float32)), np.float64)
    assert np.abs(q @ q.T - np.eye(12)).max() < 1e-5
    assert np.array_equal(cayley(jnp.zeros((5, 5))), np.eye(5))


def test_every_matrix_is_orthogonal_and_moved(source, learned):
    assert set(learned.matrices) == {"stream", "values/0", "values/1"}
    for name, q in learned.matrices.items():
        start = Rotate().rotation(len(q)).fold(np.eye(len(q)), -1)
        assert np.abs(q @ q.T - np.eye(len(q))).max() < 1e-12 and np.abs(q - start).max() > 1e-3, name


def test_the_loss_is_that_of_the_compiled_recipe_and_falls(source, learned, tmp_path):
    """The first step's loss is the KL of the recipe with random rotations, the same rounding done by the passes."""
    text = optx.quality.windows(tiny.TEXT, source)
    rounded = optx.compile(source, RECIPE)
    plain = optx.compile(source, Recipe())

    def divergence(compiled):
        pairs = [(np.asarray(plain.logits(t))[0], np.asarray(compiled.logits(t))[0], t) for t in text]
        found = [
            float(optx.quality.divergence(jnp.asarray(a), jnp.asarray(b), t)[0]) / (t.shape[1] - 1) for a, b, t in pairs
        ]
        return found[0], np.mean(found)

    first, mean = divergence(rounded)
    assert learned.kl[0] == pytest.approx(first, rel=0.02)
    path = learned.save(tmp_path / "rotation.npz")
    better = dataclasses.replace(RECIPE, fold=(Rotate(matrices=str(path)),))
    assert divergence(optx.compile(source, better))[1] < 0.95 * mean


@pytest.mark.parametrize("options", [{}, {"stream": False}, {"values": False}])
def test_exact_without_rounding(source, learned, tmp_path, options):
    path = str(learned.save(tmp_path / "rotation.npz"))
    tokens = np.asarray([families.prompt(20)])
    wanted = optx.compile(source, Recipe()).logits(tokens)
    found = optx.compile(source, Recipe(fold=(Rotate(matrices=path, **options),)))
    assert families.relative(found.logits(tokens), wanted) < 1e-4
    optx.export(found, tmp_path / "out")
    (tmp_path / "rotation.npz").unlink()  # what is exported needs it no more
    again = optx.compile(optx.load(tmp_path / "out"), Recipe())
    assert np.array_equal(again.logits(tokens), found.logits(tokens))


def test_bad_input(source, learned, tmp_path):
    with pytest.raises(RecipeError, match="has no rule of pass 'rotate'"):
        learn_rotation(source, Recipe(weights=ROUNDED), tiny.TEXT)
    with pytest.raises(RecipeError, match="rounds no weight"):
        learn_rotation(source, Recipe(fold=(Rotate(),)), tiny.TEXT)

    def compiled(path):
        return optx.compile(source, Recipe(fold=(Rotate(matrices=str(path)),)))

    with pytest.raises(PassError, match="nowhere.npz.*optx rotate"):
        compiled(tmp_path / "nowhere.npz")
    for bad, told in (
        ({"values/0": learned.matrices["values/0"]}, "'stream'.* not there"),
        (dict(learned.matrices) | {"stream": np.eye(8)}, "needs 'stream' of"),
        (dict(learned.matrices) | {"stream": 2 * learned.matrices["stream"]}, "not orthogonal"),
    ):
        with pytest.raises(PassError, match=told):
            compiled(Learned(matrices=bad, kl=()).save(tmp_path / "bad.npz"))
    assert jax.tree.leaves(source.tree)


def test_the_command_line_writes_a_recipe_that_compiles(source, tmp_path, capsys):
    recipe, text = tmp_path / "mine.yaml", tmp_path / "fox.txt"
    recipe.write_text(RECIPE.to_yaml(), encoding="utf-8")
    text.write_text(tiny.TEXT, encoding="utf-8")
    model = tiny.checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    flags = ("--recipe", recipe, "--calibration", text, "--out", tmp_path / "out", "--steps", 2)
    assert cli.run(["rotate", *map(str, (model, *flags))]) == 0
    assert "KL a token of the rounded model" in capsys.readouterr().out
    found = optx.Recipe.from_yaml(tmp_path / "out" / "w4a4.yaml")
    assert found.fold[0].matrices == str(tmp_path / "out" / "rotation.npz")
    assert optx.compile(optx.load(model), found).logits([[1, 2]]).shape[:2] == (1, 2)
