"""Converted models as deepseek_v3 checkpoints: the same logits from files, and reasons where the form does not fit."""

import os
import subprocess
from pathlib import Path

import families
import numpy as np
import pytest

import optx
from optx.errors import CheckpointError
from optx.passes.mla import Mla
from optx.recipe import Recipe

PYTHON = os.environ.get("OPTX_GOLD_PYTHON")
LOGITS = Path(__file__).parent / "golden" / "transformers_logits.py"


def compiled(tmp_path, family="llama", pass_=None, **changes):
    path, _ = families.hf_dir(tmp_path / family, family, add_bos=True, **changes)
    options = pass_ or Mla(rope="pca", rope_dim=4, least="weights", rank=10)
    return optx.compile(path, Recipe(attention=[options]), target="cpu")


@pytest.mark.parametrize("changes", [{}, {"attention_bias": False, "tie_word_embeddings": True}], ids=str)
def test_the_files_give_the_same_logits(tmp_path, changes):
    model = compiled(tmp_path, **changes)
    folder = optx.export(model, tmp_path / "out", format="deepseek")
    again = optx.load(folder)
    assert again.origin.config["model_type"] == "deepseek_v3" and again.tree.layers[0].mixer.rank == 11
    tokens = [families.prompt(20)]
    want, got = (np.asarray(each.logits(tokens)) for each in (model, optx.compile(again, None, target="cpu")))
    assert families.relative(got, want) < 1e-4


@pytest.mark.parametrize("changes", [{}, {"attention_bias": False, "tie_word_embeddings": True}], ids=str)
def test_transformers_gives_the_same_logits(tmp_path, changes):
    if PYTHON is None:
        pytest.skip("OPTX_GOLD_PYTHON names no Python with torch and transformers")
    model, tokens = compiled(tmp_path, **changes), [families.prompt(20)]
    folder = optx.export(model, tmp_path / "out", format="deepseek")
    np.save(tmp_path / "tokens.npy", tokens)
    command = [PYTHON, LOGITS, folder, tmp_path / "tokens.npy", tmp_path / "logits.npy"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr[-2000:]}"
    assert "DeepseekV3ForCausalLM every parameter found" in ran.stdout
    assert families.relative(np.load(tmp_path / "logits.npy"), np.asarray(model.logits(tokens))) < 1e-4


@pytest.mark.parametrize(
    ("family", "pass_", "message"),
    [
        ("llama", Mla(), "2 rotated keys a token, one is possible; take rope: pca"),
        ("qwen3", Mla(rope="pca", least="weights"), "scales of logits under a norm of keys"),
        (
            "llama",
            Mla(rope="pca", rope_dim=4, least="weights", match="layers/0/.*"),
            "layers/1/mixer: Attention, which is not",
        ),
        ("llama", Mla(rope="pca", rope_dim=16, least="weights"), "rotates by"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, family, pass_, message):
    with pytest.raises(CheckpointError, match=message):
        optx.export(compiled(tmp_path, family, pass_), tmp_path / "out", format="deepseek")
    assert not (tmp_path / "out").exists()


def test_biased_queries_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="a bias of queries"):
        optx.export(compiled(tmp_path, attention_bias=True), tmp_path / "out", format="deepseek")
