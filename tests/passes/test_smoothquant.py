"""smoothquant and the places at which scales move: the same logits on every family, smaller outliers, clear refusals."""

from pathlib import Path

import calibrated
import families
import jax.numpy as jnp
import numpy as np
import pytest

import optx
from optx import ir, pipeline, tensor
from optx.checkpoint.source import from_module
from optx.errors import LegalityError, PassError, RecipeError
from optx.formats import Int
from optx.nn import Block, RMSNorm
from optx.passes import folding
from optx.passes.smoothquant import SmoothQuant
from optx.recipe import Recipe

GOLDENS = Path(__file__).parent.parent / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/answers.npz"))
EVERYWHERE = folding.Smoothing(qk_norm=True)


def recipe(**options) -> Recipe:
    return Recipe(fold=(SmoothQuant(match="layers/.*", **options),))


def moved(tree, seed=0):
    """The tree with random scales moved at every place there is, and how many those were."""
    rng, out, count = np.random.default_rng(seed), ir.shallow(tree), 0
    for i, block in enumerate(tree.layers):
        for fold in folding.folds(block, EVERYWHERE)[0]:
            weight = ir.get(block, fold.source).weight.get_value()
            shape = (*weight.shape[:-2], weight.shape[-1] - fold.start)
            block = folding.move(block, fold, jnp.asarray(np.exp(rng.uniform(-1.5, 1.5, shape)), jnp.float32))
            count += 1
        ir.put(out, f"layers/{i}", block)
    return out, count


@pytest.mark.parametrize("name", NAMES)
def test_moving_scales_changes_no_logits(name):
    tree = optx.load(str(GOLDENS / name), dtype="float32").load()
    tokens = jnp.asarray(np.load(GOLDENS / name / "answers.npz")["tokens"][:1], jnp.int32)
    out, count = moved(tree)
    assert count and families.relative(out(tokens), tree(tokens)) < 1e-5
    changed = [p for p, v in ir.params(out).items() if v.get_value() is not ir.get(tree, p).get_value()]
    assert len(changed) > count


@pytest.mark.parametrize("family", families.FAMILIES)
def test_exact_with_real_statistics(family):
    tree = families.concrete(family, num_hidden_layers=1)
    out, (record,) = calibrated.through(tree, recipe(qk_norm=True))
    tokens = jnp.asarray([families.prompt(20)], jnp.int32)
    assert record.exact and families.relative(out(tokens), tree(tokens)) < 1e-5
    assert families.relative(out.layers[0].mlp.up.weight.get_value(), tree.layers[0].mlp.up.weight.get_value()) > 0.1


def test_the_scales_are_those_of_the_paper():
    """Before and after by hand: s = max|x|^a / max|W|^(1 - a) over all that reads the norm."""
    tree = families.concrete("llama", num_hidden_layers=1)
    text = calibrated.windows(tree)
    out, _ = calibrated.through(tree, recipe(alpha=0.7, down=False, values=False), text)
    block = tree.layers[0]
    x = jnp.concatenate([block.norm(tree.embed(w[0])) for w in text])
    tops = [jnp.abs(getattr(block.mixer, name).weight.get_value()).max(axis=1) for name in "qkv"]
    s = jnp.abs(x).max(axis=0) ** 0.7 / jnp.max(jnp.stack(tops), axis=0) ** 0.3
    np.testing.assert_allclose(out.layers[0].norm.weight.get_value(), block.norm.weight.get_value() / s, rtol=1e-5)
    for name in "qkv":
        want = getattr(block.mixer, name).weight.get_value() * s[:, None]
        np.testing.assert_allclose(getattr(out.layers[0].mixer, name).weight.get_value(), want, rtol=1e-5)
    np.testing.assert_array_equal(out.layers[0].mixer.o.weight.get_value(), block.mixer.o.weight.get_value())


def test_normed_heads_are_left_out_unless_asked():
    found, refused = folding.folds(families.abstract("qwen3").layers[0], folding.Smoothing())
    assert "norm" not in [fold.source for fold in found] and "heads of q and k are normed" in refused["norm"]
    found, refused = folding.folds(families.abstract("qwen3").layers[0], EVERYWHERE)
    assert [fold.source for fold in found] == ["norm", "mixer/v", "mlp_norm", "mlp/up"] and not refused


@pytest.mark.parametrize(
    "name, source, reason",
    [
        ("minimax", "mlp_norm", "the stream goes on from norm"),
        ("gpt_oss", "mlp/experts", "up is clamped or shifted"),
        ("nemotron_h", "mlp", "without a gate"),
    ],
)
def test_places_that_cannot_take_a_scale_say_why(name, source, reason):
    layers = optx.load_config(GOLDENS / name / "config.json").tree.layers
    refused = {k: v for block in layers for k, v in folding.folds(block, EVERYWHERE)[1].items()}
    assert reason in refused[source]


def test_a_norm_of_two_parts_and_a_part_that_is_not_known():
    norm, plain = RMSNorm(32), families.abstract("llama").layers[0]
    shared = ir.replace(plain, norm=norm, mlp_norm=norm)
    assert folding.folds(shared, EVERYWHERE)[1]["norm"] == "one norm serves mixer and mlp"
    strange = Block(norm=RMSNorm(32), mixer=None, mlp_norm=RMSNorm(32), mlp=RMSNorm(32))
    assert folding.folds(strange, EVERYWHERE)[1] == {"mlp_norm": "not known what RMSNorm reads"}


def test_values_that_another_layer_reads_stay():
    tree = ir.abstract(families.hybrid())
    with pytest.raises(LegalityError, match="layers/4/mixer.*set values: false.*values_read_elsewhere"):
        optx.plan(from_module(tree), recipe())
    assert optx.plan(from_module(tree), recipe(values=False)).records[0].sites == 5


def test_bad_input():
    tree = families.concrete("llama", num_hidden_layers=1)
    with pytest.raises(RecipeError, match="smoothquant reads its inputs .absmax. on calibration text"):
        optx.compile(from_module(tree), recipe())
    with pytest.raises(PassError, match="alpha 1.5; allowed: 0 to 1"):
        pipeline.run(ir.abstract(tree), recipe(alpha=1.5))
    gate = tree.layers[0].mlp.gate
    packed = ir.shallow(tree)
    ir.put(packed, "layers/0/mlp/gate", ir.replace(gate, weight=tensor.quantize(gate.weight.get_value(), Int(width=8))))
    with pytest.raises(PassError, match="mlp/gate: no scale moves into or out of a packed weight"):
        pipeline.run(ir.abstract(packed), recipe())
    broken = ir.shallow(tree)
    up = tree.layers[0].mlp.up
    ir.put(broken, "layers/0/mlp/up", ir.replace(up, weight=up.weight.get_value().at[3, 5].set(jnp.nan)))
    with pytest.raises(PassError, match="layers/0/.*(NaN|not finite)"):
        calibrated.through(broken, recipe())
