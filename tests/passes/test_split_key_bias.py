"""split_key_bias: the same logits with keys cached without their bias, and keys of few bits that survive a large one."""

from pathlib import Path

import families
import jax.numpy as jnp
import numpy as np
import pytest

import optx
from optx import ir, legality_facts
from optx.errors import LegalityError, PassError
from optx.nn import Rope
from optx.pallas.attention import paged_tpu
from optx.pallas.attention.reference import with_bias
from optx.pallas.paged_decode import mosaic_gpu_sm90 as decode_sm90
from optx.pallas.ragged_paged_attention import mosaic_gpu_sm90 as ragged_sm90
from optx.passes.fuse_projections import FuseProjections
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.rotate_online import RotateOnline
from optx.passes.split_key_bias import SplitKeyBias
from optx.recipe import Recipe

GOLDENS = Path(__file__).parent.parent / "goldens"
BIASED = (
    "bamba",
    "gpt_oss",
    "granitemoehybrid",
    "llama",
    "qwen2",
    "smollm3",
)  # families whose keys have a bias and no norm
LOW = QuantizeKV(format="int4", symmetric=False)


def biased(norm: float | None = None, **changes):
    """The tiny llama with biases; norm: of each kv head's k bias, in the pair that positions turn least (1e-6 a position), as
    the large ones of Qwen2 are: it shifts all logits of a query alike, and the signal is in the other channels."""
    model = families.concrete("llama", attention_bias=True, rope_theta=1e8, **changes)
    for layer in model.layers if norm is not None else ():
        bias = layer.mixer.k.bias.get_value().reshape(2, 8).at[:, [3, 7]].set(norm / np.sqrt(2))
        layer.mixer.k.bias.set_value(bias.reshape(-1))
    return model


def split(model, *fold, **stages):
    return optx.compile(model, Recipe(fold=[SplitKeyBias(), *fold], **stages)).tree


@pytest.mark.parametrize("family", BIASED)
def test_exact_on_every_family_with_a_key_bias(family):
    """In one piece and over pages, positions 0 to 23, with windows and sinks of the family."""
    model = ir.init_weights(optx.load_config(GOLDENS / family / "config.json", dtype="float32").tree, seed=1)
    tree = split(model)
    tokens = np.random.default_rng(0).integers(0, model.embed.table.get_value().shape[0], 24)
    want = families.forward(model, tokens)
    assert families.relative(families.forward(tree, tokens), want) < 1e-4
    assert families.relative(families.incremental(tree, tokens, sizes=(12,)), want) < 1e-4
    assert not any(legality_facts.key_bias(layer.mixer) for layer in tree.layers)


def test_families_are_those_that_have_one():
    found = []
    for folder in sorted(path.parent for path in GOLDENS.glob("*/config.json")):
        mixers = [layer.mixer for layer in optx.load_config(folder / "config.json").tree.layers]
        attention = [m for m in mixers if hasattr(m, "k_norm") and m.k is not None and m.k.bias is not None]
        found += [folder.name] if any(m.k_norm is None for m in attention) else []
    assert tuple(found) == BIASED


def test_exact_against_the_equations():
    """The oracle adds the bias before positions; the tree that is compared never stores it."""
    model, tokens = biased(), families.prompt(12)
    want = families.oracle(model, tokens)
    assert families.relative(families.incremental(split(model), tokens, sizes=(5, 1)), want) < 1e-5
    again = ir.shallow(split(model))
    for layer in again.layers:
        layer.mixer = ir.replace(layer.mixer, key_bias=None)
    assert families.relative(families.incremental(again, tokens, sizes=(5, 1)), want) > 1e-2


BEFORE_EXPECTED = """\
-layers/0-1/mixer: Attention SHAPE
+layers/0-1/mixer: Attention key_bias=f32[16] SHAPE
-layers/0-1/mixer/k: Linear f32[32, 16] bias=f32[16]
+layers/0-1/mixer/k: Linear f32[32, 16]
"""


def test_before_expected():
    model = families.abstract("llama", attention_bias=True, rope_theta=1e8)
    (record,) = optx.plan(model, Recipe(fold=[SplitKeyBias()])).records
    shape = "heads=4 kv_heads=2 head_dim=8 scale=0.353553 rope=(rope 1e+08/8) cache=(paged float32)"
    assert record.diff == BEFORE_EXPECTED.replace("SHAPE", shape)
    assert record.weight_bytes[0] == record.weight_bytes[1] and record.cache_bytes[0] == record.cache_bytes[1]


def test_low_bit_keys_under_a_bias_of_norm_600():
    """What the pass is for: int4 keys lose everything to the bias, and without it lose what those of a model without a bias do.
    Relative error of the logits, measured: 0.206 with the bias in the cache, 0.019 without; 0.021 where there is none."""
    model, tokens = biased(600.0), families.prompt(32)
    want = families.oracle(model, tokens)

    def error(*fold):
        recipe = Recipe(fold=fold, cache=[LOW], allow=[] if fold else ["k_bias_low_bit_kv"])
        return families.relative(families.forward(optx.compile(model, recipe).tree, tokens), want)

    broken, whole = error(), error(SplitKeyBias())
    small = biased(0.0)
    none = optx.compile(small, Recipe(cache=[LOW], allow=["k_bias_low_bit_kv"])).tree
    without = families.relative(families.forward(none, tokens), families.oracle(small, tokens))
    assert broken > 5 * whole
    assert whole < 1.3 * without


def test_legality_lets_low_bits_pass_once_it_is_split():
    model = families.abstract("llama", attention_bias=True)
    with pytest.raises(LegalityError, match="k_bias_low_bit_kv") as error:
        optx.plan(model, Recipe(cache=[LOW]))
    assert "split_key_bias" in str(error.value)
    optx.plan(model, Recipe(fold=[SplitKeyBias()], cache=[LOW], lower=[FuseProjections()]))


def test_with_rotated_heads_and_one_projection():
    """The bias goes through the same rotation as keys; q, k and v still become one product, with zeros for k's bias."""
    model, tokens = biased(), families.prompt(12)
    tree = split(model, RotateOnline(down=False), lower=[FuseProjections()])
    mixer = tree.layers[0].mixer
    assert type(mixer).__name__ == "FusedAttention"
    np.testing.assert_array_equal(mixer.qkv.bias.get_value()[32:48], 0)
    want = families.oracle(model, tokens)
    assert families.relative(families.incremental(tree, tokens, sizes=(5, 1)), want) < 1e-5
    assert families.relative(families.forward(tree, tokens), want) < 1e-5


def test_exact_tokens_beside_packed_ones_get_the_bias_too():
    model, tokens = biased(), families.prompt(16)
    near = QuantizeKV(format="int8", recent=4, first=2)
    tree = split(model, cache=[near])
    want = families.oracle(model, tokens)
    assert families.relative(families.forward(tree, tokens), want) < 0.02
    assert families.relative(families.incremental(tree, tokens, sizes=(8,)), want) < 0.02


@pytest.mark.parametrize("groups", [1, 3])
def test_positions_by_head(groups, rng):
    """Heads that keep different tokens have positions of their own: int32[K, B, S]."""
    rope = Rope(theta=100.0, dim=4)
    bias, k = rng.normal(size=(3, 6)).astype(np.float32), rng.normal(size=(2, 5, 3, 6)).astype(np.float32)
    at = rng.integers(0, 90, (groups, 2, 5)).astype(np.int32)
    got = with_bias(jnp.asarray(k), jnp.asarray(at), key_bias=jnp.asarray(bias), rope=rope)
    for b, s, h in np.ndindex(2, 5, 3):
        turned = rope(jnp.asarray(bias[h])[None, None], jnp.asarray(at[h % groups, b, s])[None])[0, 0]
        np.testing.assert_allclose(got[b, s, h], k[b, s, h] + np.asarray(turned), atol=1e-5)


@pytest.mark.parametrize(
    "family, changes, told",
    [("llama", {}, "keys have no bias"), ("qwen3", {"attention_bias": True}, "keys are normed")],
)
def test_refused_with_a_reason(family, changes, told):
    with pytest.raises(PassError, match=f"split_key_bias changed nothing: {told}"):
        optx.plan(families.abstract(family, **changes), Recipe(fold=[SplitKeyBias()]))


def test_keys_that_another_layer_reads_keep_their_bias():
    model = families.concrete("llama", attention_bias=True)
    mixer = model.layers[1].mixer
    ir.put(model, "layers/1/mixer", ir.replace(mixer, k=None, v=None, cache=mixer.cache.replace(share=0)))
    with pytest.raises(LegalityError, match="split_keys_read_by_others") as error:
        optx.plan(ir.abstract(model), Recipe(fold=[SplitKeyBias()]))
    assert "layers/1/mixer" in str(error.value)


@pytest.mark.parametrize("kernel, target", [(decode_sm90, "h100"), (ragged_sm90, "h100"), (paged_tpu, "tpu-v6e")])
def test_kernels_over_pages_decline(kernel, target):
    model = families.abstract("llama", attention_bias=True, head_dim=128, dtype="bfloat16")
    for tree, reason in ((model, None), (optx.plan(model, Recipe(fold=[SplitKeyBias()])).tree, "adds no bias to keys")):
        site = next(site for site in tree.layers[0].mixer.op_sites() if site.op == "paged_decode")
        assert kernel.supports(site.args, optx.target.get(target)) == reason


def test_an_export_gives_the_same_logits(tmp_path):
    folder, _ = families.hf_dir(tmp_path / "model", "llama", attention_bias=True)
    compiled = optx.compile(optx.load(str(folder)), Recipe(fold=[SplitKeyBias()], cache=[LOW]))
    again = optx.load(str(compiled.export(tmp_path / "export")))
    tokens = np.asarray([families.prompt(9)])
    np.testing.assert_array_equal(optx.compile(again).logits(tokens), compiled.logits(tokens))
