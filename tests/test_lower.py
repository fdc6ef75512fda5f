"""Lowering: weights in the order of a kernel, and back; programs of other devices are refused."""

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

import optx
from optx import formats, ir, lower, tensor
from optx.errors import LoweringError
from optx.nn.core import Embed
from optx.recipe import Recipe
from optx.target import TARGETS

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "head_dim": 64,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same int4 model compiled for this machine and for a Hopper GPU (which takes no GPU)."""
    path = tiny.checkpoint(tmp_path_factory.mktemp("tiny"), **WIDE)
    recipe = Recipe.from_dict(
        {"name": "int4", "weights": [{"pass": "quantize_weights", "format": "int4", "group": 64}]}
    )
    return {
        target: optx.compile(optx.load(path, dtype="bfloat16"), recipe, target=target) for target in ("cpu", "h100")
    }


def leaves(tree):
    return {path: jax.tree.leaves(variable.get_value()) for path, variable in ir.params(tree).items()}


def test_weights_lie_as_their_kernel_reads_them_and_come_back(models):
    here, there = models["cpu"].tree, models["h100"].tree
    arranged = [v for v in ir.params(there).values() if isinstance(v.get_value(), tensor.Arranged)]
    assert len(arranged) == 2 * 7, "every matrix of two layers"
    for v in arranged:
        assert v.get_value().ndim == 2 and tensor.is_packed(v.get_value())
    back, canonical = leaves(lower.canonical(there)), leaves(here)
    assert back.keys() == canonical.keys()
    for path, parts in canonical.items():
        for one, two in zip(parts, back[path], strict=True):
            np.testing.assert_array_equal(one, two, err_msg=path)


def test_the_report_says_so(models):
    said = models["h100"].explain()
    assert "quant_matmul (14 sites, first layers/0/mixer/q): mosaic_gpu/sm90, weights re-laid once" in said
    assert "re-laid" not in models["cpu"].explain()
    assert models["h100"].report.weight_bytes == pytest.approx(models["cpu"].report.weight_bytes, rel=0.05)


def test_exports_hold_the_canonical_form(models, tmp_path):
    for target, model in models.items():
        model.export(tmp_path / target)
    here, there = (optx.compile(optx.load(tmp_path / target), target="cpu") for target in models)
    tokens = np.arange(12, dtype=np.int32)[None]
    np.testing.assert_array_equal(here.logits(tokens), there.logits(tokens))
    np.testing.assert_array_equal(here.logits(tokens), models["cpu"].logits(tokens))


def test_a_program_of_another_device_is_refused(models):
    for run in (lambda m: m.logits(np.zeros((1, 4), np.int32)), lambda m: m.engine(rows=1, context=64)):
        with pytest.raises(LoweringError, match="was lowered to mosaic_gpu/sm90, and this machine runs on cpu"):
            run(models["h100"])


def test_a_tied_head_keeps_its_table():
    embed = Embed(320, 256, dtype="bfloat16", rngs=nnx.Rngs(0))
    table = tensor.quantize(embed.table.get_value(), formats.parse("int8"), axis=-1)
    embed = ir.replace(embed, table=table)
    lowered = lower.lower(embed, TARGETS["h100"])
    assert isinstance(lowered.head.get_value(), tensor.Arranged) and embed.head is None
    np.testing.assert_array_equal(lowered.table.get_value().dequantize(), table.dequantize())
    np.testing.assert_array_equal(lowered.head.get_value().qtensor().dequantize(), table.T.dequantize())
    assert lower.canonical(lowered).head is None
