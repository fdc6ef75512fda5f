"""rotate_online: queries and keys, and inputs of down projections, turned while the model runs; the same logits."""

from pathlib import Path

import families
import jax.numpy as jnp
import numpy as np
import pytest

import optx
from optx import ir
from optx.errors import LegalityError, PassError
from optx.hadamard import Rotation
from optx.nn import MLP, Attention, Block, CausalLM, Embed, RMSNorm, Rope
from optx.nn.rotated import Rotated, RotatedHeads, RotatedNorm
from optx.pallas.rotate_append import mosaic_gpu_sm90
from optx.passes.fuse_projections import FuseProjections
from optx.passes.gptq import GPTQ
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.rotate import Rotate
from optx.passes.rotate_online import RotateOnline
from optx.recipe import Calibration, Recipe

GOLDENS = Path(__file__).parents[1] / "goldens"
FAMILIES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))

EXPECTED = """\
  layers/0-1: Block
    norm: RMSNorm f32[32] eps=1e-06 offset=0
    mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.353553 rope=(rope 10000/8, H 8 seed 0) cache=(paged float32)
      q: Linear f32[32, 32]
      k: Linear f32[32, 16]
      v: Linear f32[32, 16]
      o: Linear f32[32, 32]
    mlp_norm: RMSNorm f32[32] eps=1e-06 offset=0
    mlp: GatedMLP activation=silu
      gate: Linear f32[32, 96]
      up: Linear f32[32, 96]
      down: Rotated rotation=(H M3 x 32 seed 0)
        linear: Linear f32[96, 32]
"""


def logits(model, tokens, *options, **stages) -> np.ndarray:
    return np.asarray(optx.compile(model, Recipe(fold=options, **stages)).logits(np.asarray([tokens])))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_on_every_family(family):
    """All three at once. A stream that goes on from the norm (minimax) keeps its norms as they are."""
    shapes = optx.load_config(GOLDENS / family / "config.json", dtype="float32").tree
    model = ir.init_weights(shapes, seed=1)
    tokens = np.random.default_rng(0).integers(0, model.embed.table.get_value().shape[0], 20)
    compiled = optx.compile(model, Recipe(fold=[RotateOnline(inputs=True)]))
    assert families.relative(compiled.logits(tokens[None])[0], logits(model, tokens)) < 1e-4
    refused = set(compiled.plan.records[0].skipped.values())
    assert refused == ({"the stream goes on from the norm"} if family == "minimax" else set())


def test_a_model_without_heads_and_down_projections_has_no_other_site():
    shapes = optx.load_config(GOLDENS / "mamba2" / "config.json").tree
    with pytest.raises(PassError, match="rotate_online changed nothing: inputs: false"):
        optx.plan(shapes, Recipe(fold=[RotateOnline()]))


def test_before_expected():
    planned = optx.plan(families.abstract("llama", intermediate_size=96), Recipe(fold=[RotateOnline()]))
    lines = [line.partition("  #")[0] for line in ir.describe(planned.tree).splitlines()]
    assert "\n".join(lines[3:-2]) + "\n" == EXPECTED
    assert planned.records[0].weight_bytes[0] == planned.records[0].weight_bytes[1]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_exact_against_the_equations_over_caches(family):
    """The oracle knows nothing of rotations; what the cache holds are rotated keys."""
    model, tokens = families.concrete(family), families.prompt(12)
    compiled = optx.compile(model, Recipe(fold=[RotateOnline()]))
    got = families.incremental(compiled.tree, tokens, sizes=(5, 1))
    assert families.relative(got, families.oracle(model, tokens)) < 1e-5


def test_every_kind_of_cache_in_one_model():
    model, tokens = families.hybrid(), families.prompt(12)
    model.layers[2].mixer.cache = model.layers[2].mixer.cache.replace(format=None)
    compiled = optx.compile(model, Recipe(fold=[RotateOnline()]))
    want = families.incremental(model, tokens, sizes=(5, 1))
    assert families.relative(families.incremental(compiled.tree, tokens, sizes=(5, 1)), want) < 1e-5


def test_all_rotations_of_a_fused_model_together():
    model, tokens = families.concrete("llama", attention_bias=True, mlp_bias=True), families.prompt(12)
    got = logits(model, tokens, Rotate(), RotateOnline(), lower=[FuseProjections()])
    assert families.relative(got, logits(model, tokens)) < 1e-5


def test_heads_without_positions_are_rotated_too():
    mixer = Attention(16, heads=4, kv_heads=2, head_dim=8, rope=None)
    layer = Block(norm=RMSNorm(16), mixer=mixer, mlp_norm=RMSNorm(16), mlp=MLP(16, 24, activation="silu"))
    model = ir.init_weights(CausalLM(embed=Embed(264, 16), layers=[layer], norm=RMSNorm(16), head=None, context=64))
    compiled = optx.compile(model, Recipe(fold=[RotateOnline()]))
    assert compiled.tree.layers[0].mixer.rope == RotatedHeads(rope=None, rotation=Rotation(d=8, seed=0, mixed=True))
    tokens = families.prompt(12)
    assert families.relative(logits(model, tokens, RotateOnline()), logits(model, tokens)) < 1e-5


def test_each_half_alone():
    model = families.abstract("llama")
    keys = optx.plan(model, Recipe(fold=[RotateOnline(down=False)]))
    assert keys.records[0].skipped["layers/0/mlp"] == "down: false"
    assert isinstance(keys.tree.layers[0].mixer.rope, RotatedHeads)
    down = optx.plan(model, Recipe(fold=[RotateOnline(keys=False, size=16, seed=None)]))
    assert down.records[0].skipped["layers/0/mixer"] == "keys: false"
    assert down.tree.layers[0].mlp.down.rotation == Rotation(d=64, size=16)
    assert isinstance(down.tree.layers[0].mixer.rope, Rope)


def test_keys_with_an_outlier_channel_round_better():
    """int4 keys: what one channel takes of the scale the others lose."""
    model, tokens = families.concrete("llama", attention_bias=True), families.prompt(32)
    for layer in model.layers:
        bias = layer.mixer.k.bias
        bias.set_value(bias.get_value().at[jnp.asarray([7, 15])].set(30.0))
    want = families.incremental(model, tokens)

    def error(*fold):
        recipe = Recipe(fold=fold, cache=[QuantizeKV(format="int4")], allow=["k_bias_low_bit_kv"])
        return families.relative(families.incremental(optx.compile(model, recipe).tree, tokens), want)

    assert error(RotateOnline(down=False)) < 0.8 * error()


def test_down_inputs_with_outliers_round_better():
    model, tokens = families.concrete("llama"), families.prompt(24)
    for layer in model.layers:
        layer.mlp.down.weight.set_value(layer.mlp.down.weight.get_value().at[9].mul(40.0))
    quantize = QuantizeWeights(match="layers/.*/down.*", format="int4", group=32)
    want = logits(model, tokens)

    def error(*fold):
        return families.relative(logits(model, tokens, *fold, weights=[quantize]), want)

    assert error(RotateOnline(keys=False)) < 0.8 * error()


def test_calibrated_passes_see_the_rotated_inputs(tmp_path):
    """GPTQ of down solves for the inputs that the rotated weight meets: at 2 bits it stays below round to nearest."""
    source = optx.load(str(families.hf_dir(tmp_path / "model", "llama", add_bos=True)[0]))
    text = "The quick brown fox jumps over the lazy dog. " * 40
    only = {"match": "layers/.*/down/linear", "format": "int2", "group": 32}
    fold = [RotateOnline(keys=False)]
    recipe = Recipe(fold=fold, weights=[GPTQ(**only)], calibration=Calibration(windows=4, context=64))
    tokens = np.asarray([source.tokenizer.encode(text)[:100]])
    want = optx.compile(source).logits(tokens)
    rtn = optx.compile(source, Recipe(fold=fold, weights=[QuantizeWeights(**only)])).logits(tokens)
    gptq = optx.compile(source, recipe, calibration=text, measured=False).logits(tokens)
    assert families.relative(gptq, want) < 0.9 * families.relative(rtn, want)


def test_inputs_keep_the_norm_and_its_gain():
    """norm(x) diag(g) Q meets Q^T W: the gain stays before the rotation."""
    model = families.concrete("llama")
    opt = RotateOnline(keys=False, down=False, inputs=True)
    new, old = optx.compile(model, Recipe(fold=[opt])).tree.layers[0], model.layers[0]
    rotation = opt.rotation(32, "here")
    assert isinstance(new.norm, RotatedNorm) and new.norm.rotation == rotation
    assert new.norm.norm.weight.get_value() is old.norm.weight.get_value()
    for name in ("mixer/q", "mixer/v", "mlp/gate"):
        was, now = (np.asarray(ir.get(layer, name).weight.get_value()) for layer in (old, new))
        np.testing.assert_allclose(now, rotation.fold(np.eye(32), -1).T @ was, atol=1e-6)
    np.testing.assert_array_equal(new.mlp.down.weight.get_value(), old.mlp.down.weight.get_value())


def test_sizes_that_do_not_fit_are_refused():
    model = families.abstract("llama", intermediate_size=96)
    with pytest.raises(PassError, match="mlp/down, 96 numbers: size 64; allowed: a power of two that divides 96"):
        optx.plan(model, Recipe(fold=[RotateOnline(keys=False, size=64)]))
    with pytest.raises(PassError, match="size 12; allowed: a power of two"):
        optx.plan(model, Recipe(fold=[RotateOnline(keys=False, size=12)]))


def test_rotating_twice_is_refused():
    once = optx.plan(families.abstract("llama"), Recipe(fold=[RotateOnline()])).tree
    with pytest.raises(LegalityError, match="keys_rotated_twice"):
        optx.plan(once, Recipe(fold=[RotateOnline()]))
    with pytest.raises(PassError, match="rotated already"):
        optx.plan(once, Recipe(fold=[RotateOnline(keys=False)]))
    assert isinstance(once.layers[0].mlp.down, Rotated)


def test_keys_that_another_layer_reads_are_rotated_with_it():
    with pytest.raises(LegalityError, match="keys_rotated_apart") as error:
        optx.plan(ir.abstract(families.hybrid()), Recipe(fold=[RotateOnline(match="layers/0/mixer")]))
    assert "layers/4/mixer" in str(error.value)


def test_the_kernel_that_appends_takes_heads_that_xla_has_rotated():
    attn = optx.plan(families.abstract("llama", "bfloat16"), Recipe(fold=[RotateOnline()])).tree.layers[0].mixer
    site = next(site for site in attn.op_sites() if site.op == "rotate_append")
    assert str(site.args["rope"]) == "rope 10000/8, H 8 seed 0"
    assert mosaic_gpu_sm90.supports(site.args, optx.target.get("h100")) is None


def test_an_export_gives_the_same_logits(tmp_path):
    folder, _ = families.hf_dir(tmp_path / "model", "llama")
    compiled = optx.compile(optx.load(str(folder)), Recipe(fold=[RotateOnline()]))
    again = optx.load(str(compiled.export(tmp_path / "export")))
    tokens = np.asarray([families.prompt(9)])
    np.testing.assert_array_equal(optx.compile(again).logits(tokens), compiled.logits(tokens))
