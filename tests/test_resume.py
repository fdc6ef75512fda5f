"""A compile that was killed goes on from the blocks that it kept, to the same bits."""

import families
import jax
import numpy as np
import pytest
from flax import nnx
from test_calibrate import mixture
from test_quality import TEXT, source

import optx
from optx import pipeline
from optx.errors import CheckpointError
from optx.passes.gptq import GPTQ
from optx.recipe import Calibration, Recipe

RECIPE = Recipe(weights=[GPTQ(format="int4", match="layers/.*")], calibration=Calibration(windows=3, context=48))


class Killed(Exception):
    pass


def leaves(compiled) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(compiled.tree))]


def models():
    hybrid = families.hybrid()
    hybrid.context = 64
    return {"llama": families.concrete("llama", max_position_embeddings=64), "mixture": mixture(), "shared": hybrid}


def compiled(model, work, recipe=RECIPE):
    return optx.compile(source(model), recipe, "cpu", calibration=TEXT, measured=False, work=work)


def killed_at(prefix, model, work, monkeypatch, recipe=RECIPE):
    """A compile that dies when the block at `prefix` is under way."""
    real = pipeline.apply_block

    def dying(block, at, *rest):
        if at == prefix:
            raise Killed
        return real(block, at, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "apply_block", dying)
        with pytest.raises(Killed):
            compiled(model, work, recipe)


@pytest.mark.parametrize("name", ["llama", "mixture"])
@pytest.mark.parametrize("prefix", ["layers/1", "norm"])
def test_it_goes_on_to_the_same_bits(name, prefix, tmp_path, monkeypatch):
    model = models()[name]
    want = compiled(model, tmp_path / "whole")
    killed_at(prefix, model, tmp_path / "work", monkeypatch)
    assert (tmp_path / "work" / "state.json").is_file()
    begun, real = [], pipeline.apply_block
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "apply_block", lambda block, at, *rest: begun.append(at) or real(block, at, *rest))
        got = compiled(model, tmp_path / "work")
    assert begun[0] == prefix, "what is kept is not made again"
    for a, b in zip(leaves(got), leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    assert got.plan.records[0].errors == want.plan.records[0].errors
    assert not (tmp_path / "work").exists(), "its blocks are in the result"


def test_layers_that_read_earlier_caches_go_on_too(tmp_path, monkeypatch):
    model = models()["shared"]
    recipe = Recipe(weights=[GPTQ(format="int4", match=r"layers/\d+/mlp/.*")], calibration=RECIPE.calibration)
    want = compiled(model, tmp_path / "whole", recipe)
    killed_at(f"layers/{len(model.layers) - 1}", model, tmp_path / "work", monkeypatch, recipe)
    for a, b in zip(leaves(compiled(model, tmp_path / "work", recipe)), leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_folder_of_another_compile_is_left_alone(tmp_path, monkeypatch):
    model = models()["llama"]
    killed_at("layers/1", model, tmp_path / "work", monkeypatch)
    other = Recipe(weights=[GPTQ(format="int8", match="layers/.*")], calibration=RECIPE.calibration)
    with pytest.raises(
        CheckpointError, match="holds the blocks of another compile .*give another folder or remove this one"
    ):
        compiled(model, tmp_path / "work", other)
    assert (tmp_path / "work" / "state.json").is_file()


def test_a_file_that_is_cut_off_is_told(tmp_path, monkeypatch):
    model = models()["llama"]
    killed_at("norm", model, tmp_path / "work", monkeypatch)
    path = tmp_path / "work" / "0001.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="0001.bin has .* bytes; expected .*: remove the folder"):
        compiled(model, tmp_path / "work")
