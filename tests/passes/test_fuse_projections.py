"""fuse_projections: one weight for projections of one input, the same numbers out."""

import families
import numpy as np
import pytest

import optx
from optx import ir
from optx.errors import PassError
from optx.nn import Attention, Block, CausalLM, Embed, FusedAttention, FusedGatedMLP, GatedMLP, RMSNorm, Rope
from optx.passes.fuse_projections import FuseProjections
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.quantize_weights import QuantizeWeights
from optx.recipe import Recipe

BEFORE = """\
# 35,488 params, 142.0 kB, KV 256 B/token
CausalLM context=128
  embed: Embed f32[264, 32] scale=1  # 33.8 kB
  layers/0-1: Block
    norm: RMSNorm f32[32] eps=1e-06 offset=0
    mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.353553 rope=(rope 10000/8) cache=(paged float32)
      q: Linear f32[32, 32]  # 8.2 kB
      k: Linear f32[32, 16]  # 4.1 kB
      v: Linear f32[32, 16]  # 4.1 kB
      o: Linear f32[32, 32]  # 8.2 kB
    mlp_norm: RMSNorm f32[32] eps=1e-06 offset=0
    mlp: GatedMLP activation=silu
      gate: Linear f32[32, 64]  # 16.4 kB
      up: Linear f32[32, 64]  # 16.4 kB
      down: Linear f32[64, 32]  # 16.4 kB
  norm: RMSNorm f32[32] eps=1e-06 offset=0
  output: Linear f32[32, 264]  # 33.8 kB
"""

EXPECTED = """\
# 35,488 params, 142.0 kB, KV 256 B/token
CausalLM context=128
  embed: Embed f32[264, 32] scale=1  # 33.8 kB
  layers/0-1: Block
    norm: RMSNorm f32[32] eps=1e-06 offset=0
    mixer: FusedAttention heads=4 kv_heads=2 head_dim=8 scale=0.353553 rope=(rope 10000/8) cache=(paged float32)
      o: Linear f32[32, 32]  # 8.2 kB
      qkv: Linear f32[32, 64]  # 16.4 kB
    mlp_norm: RMSNorm f32[32] eps=1e-06 offset=0
    mlp: FusedGatedMLP activation=silu
      gate_up: Linear f32[32, 128]  # 32.8 kB
      down: Linear f32[64, 32]  # 16.4 kB
  norm: RMSNorm f32[32] eps=1e-06 offset=0
  output: Linear f32[32, 264]  # 33.8 kB
"""

FUSE = Recipe(name="fuse", lower=[FuseProjections()])


def test_before_expected():
    planned = optx.plan(families.abstract("llama"), FUSE)
    assert ir.describe(planned.trees[0]) == BEFORE
    assert ir.describe(planned.tree) == EXPECTED


CASES = {
    **{family: (family, {}) for family in families.FAMILIES},
    "biases and one kv head": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "as many kv heads": ("llama", {"num_key_value_heads": 4, "num_hidden_layers": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_exact(case):
    """Declared exact: float32 logits equal within 1e-4 relative, decoding over caches."""
    family, changes = CASES[case]
    model = families.concrete(family, **changes)
    tokens = families.prompt(12)
    compiled = optx.compile(model, FUSE)
    assert compiled.plan.records[0].exact
    assert all(isinstance(layer.mixer, FusedAttention) for layer in compiled.tree.layers)
    assert all(isinstance(layer.mlp, FusedGatedMLP) for layer in compiled.tree.layers)
    want = families.oracle(model, tokens)
    assert families.relative(families.incremental(compiled.tree, tokens), want) < 1e-5


@pytest.mark.parametrize("format", ["int4", "int3", "fp8_e4m3"])
def test_packed_weights_keep_their_scales(format):
    """Columns keep the codes and scales that they had apart, so joining changes nothing but the order of sums."""
    model = families.concrete("qwen3", num_hidden_layers=1)
    quantize = [QuantizeWeights(match="layers/.*", format=format, group=8, symmetric=True)]
    apart = optx.compile(model, Recipe(weights=quantize))
    joined = optx.compile(model, Recipe(weights=quantize, lower=[FuseProjections()]))
    old, new = apart.tree.layers[0], joined.tree.layers[0]
    for parts, whole in (
        ((old.mixer.q, old.mixer.k, old.mixer.v), new.mixer.qkv),
        ((old.mlp.gate, old.mlp.up), new.mlp.gate_up),
    ):
        apart = np.concatenate([part.weight.get_value().dequantize() for part in parts], axis=1)
        np.testing.assert_array_equal(whole.weight.get_value().dequantize(), apart)


def test_projections_stored_differently_stay_apart():
    planned = optx.plan(
        families.abstract("llama"),
        Recipe(
            weights=[
                QuantizeWeights(match="layers/0/mixer/v", format="int8"),
                QuantizeWeights(match="layers/0/mlp/up", format="int4", group=8),
            ],
            lower=[FuseProjections()],
        ),
    )
    record = planned.records[-1]
    assert record.sites == 2 and isinstance(planned.tree.layers[1].mixer, FusedAttention)
    assert record.skipped == {
        "layers/0/mixer": "stored differently: f32[32, 32], f32[32, 16], int8[32, 16]",
        "layers/0/mlp": "stored differently: f32[32, 64], int4_g8[32, 64]",
    }
    assert isinstance(planned.tree.layers[0].mixer.q, type(planned.tree.output)) and planned.tree.layers[0].mlp.up


@pytest.mark.parametrize("sinks", [False, True])
def test_gates_and_sinks_come_along(sinks):
    """Of a gated attention q brings a query and a gate a head: twice as many outputs."""
    rope = Rope(theta=1e4, dim=4)
    mixer = Attention(16, heads=4, kv_heads=2, head_dim=6, rope=rope, gated=True, bias=True, sinks=sinks)
    layer = Block(norm=RMSNorm(16), mixer=mixer, mlp_norm=RMSNorm(16), mlp=GatedMLP(16, 24))
    shapes = CausalLM(embed=Embed(264, 16), layers=[layer], norm=RMSNorm(16), head=None, context=64)
    model, tokens = ir.init_weights(shapes), families.prompt(12)
    compiled = optx.compile(model, FUSE)
    joined = compiled.tree.layers[0].mixer
    assert joined.qkv.weight.get_value().shape == (16, 2 * 24 + 2 * 12)
    want = optx.compile(model).logits(np.asarray(tokens)[None])[0]
    assert families.relative(families.incremental(compiled.tree, tokens), want) < 1e-5
    assert ir.describe(joined.unfused()) == ir.describe(model.layers[0].mixer)


def test_attention_over_anothers_cache_has_nothing_to_join():
    rope = Rope(theta=1e4, dim=8)
    layers = [
        Block(
            norm=RMSNorm(32),
            mixer=Attention(32, heads=4, kv_heads=2, head_dim=8, rope=rope, share=share),
            mlp_norm=RMSNorm(32),
            mlp=GatedMLP(32, 64),
        )
        for share in (None, 0)
    ]
    model = CausalLM(embed=Embed(64, 32), layers=layers, norm=RMSNorm(32), head=None, context=64)
    planned = optx.plan(model, FUSE)
    assert planned.records[0].skipped == {"layers/1/mixer": "has no k and v projections"}
    assert planned.records[0].sites == 3


def test_fusing_twice_changes_nothing():
    once = optx.plan(families.abstract("llama"), FUSE).tree
    with pytest.raises(PassError, match="fuse_projections changed nothing: fused already"):
        optx.plan(once, FUSE)


def test_bytes_stay_and_the_cache_too():
    planned = optx.plan(
        families.abstract("gemma3"), Recipe(cache=[QuantizeKV(format="int4")], lower=[FuseProjections()])
    )
    record = planned.records[-1]
    assert record.weight_bytes[0] == record.weight_bytes[1] and record.cache_bytes[0] == record.cache_bytes[1]
    assert [layer.mixer.cache for layer in planned.tree.layers] == [
        layer.mixer.cache for layer in planned.trees[1].layers
    ]
