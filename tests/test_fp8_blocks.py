"""fp8 with a float32 scale a block of rows and columns: the rule, slices along blocks, products, recipes, DeepSeek's files."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import optx
from optx import ir, tensor
from optx.checkpoint.export_hf import write_json
from optx.errors import CheckpointError, FormatError, PassError
from optx.formats import Float8, Float8Block, parse
from optx.formats.float8 import Float8Block as Block
from optx.nn.core import Linear
from optx.pallas.quant_matmul.reference import quant_matmul
from optx.passes.fuse_projections import join
from optx.registry import Skipped
from optx.tensor import QTensor

GOLDEN = Path(__file__).parent / "goldens" / "deepseek_v3"
SIDE = 8  # of a block in the tiny checkpoints
E4M3 = ml_dtypes.float8_e4m3fn


def quantize(x: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """[F, D] -> codes, scales: s = largest of the block / 448 (1 for zeros), block by block."""
    f, d = x.shape
    codes = np.zeros_like(x, E4M3)
    scales = np.ones((-(-f // side), -(-d // side)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = np.s_[i * side : (i + 1) * side, j * side : (j + 1) * side]
            largest = np.abs(x[here]).max()
            scales[i, j] = largest / np.float32(448) if largest else 1
            codes[here] = np.clip(x[here] / scales[i, j], -448, 448).astype(E4M3)
    return codes, scales


def dequantize(codes: np.ndarray, scales: np.ndarray, side: int) -> np.ndarray:
    steps = np.repeat(np.repeat(scales, side, 0), side, 1)[: codes.shape[0], : codes.shape[1]]
    return codes.astype(np.float32) * steps


@pytest.mark.parametrize("shape", [(256, 384), (300, 200), (1, 5), (129, 128)])
def test_the_rule_block_by_block(rng, shape):
    x = (rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1)))).astype(np.float32)
    codes, scales = quantize(x, 128)
    got = tensor.quantize(jnp.asarray(x.T), parse("fp8_block"))
    got.validate()
    np.testing.assert_allclose(got.scale, scales, rtol=2e-7)  # XLA multiplies by 1 / 448
    same = np.asarray(got.data) == codes
    assert same.mean() > 0.999  # a scale's last bit decides a tie
    np.testing.assert_allclose(np.asarray(got.dequantize()).T, dequantize(codes, scales, 128), rtol=2**-3, atol=1e-9)
    np.testing.assert_array_equal(np.asarray(got.rows()), dequantize(np.asarray(got.data), np.asarray(got.scale), 128))
    assert got.shape == shape[::-1] and got.nbytes == x.size + 4 * scales.size


def test_what_is_stored_is_what_is_said():
    format_ = parse("fp8_block")
    assert format_ == Float8Block(group=128) and str(format_) == "fp8_block" and str(Block(group=32)) == "fp8_block_g32"
    assert parse("fp8_block_g32") == Block(group=32)
    weight = tensor.quantize(jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16), format_)
    assert weight.scale.shape == (8, 32) and weight.bits_per_weight == format_.bits(4096) == 8 + 32 / 128**2
    experts = tensor.quantize(jax.ShapeDtypeStruct((4, 256, 192), jnp.bfloat16), format_)
    assert experts.data.shape == (4, 192, 256) and experts.scale.shape == (4, 2, 2)
    experts.validate()
    with pytest.raises(FormatError, match=r"needs scale\[4, 2, 2\], got \(4, 192, 2\)"):
        QTensor(
            data=experts.data, scale=jax.ShapeDtypeStruct((4, 192, 2), jnp.float32), format=format_, length=256
        ).validate()
    with pytest.raises(FormatError, match="a block is of rows"):
        format_.encode(jnp.zeros(128))
    with pytest.raises(FormatError, match="group 0"):
        Block(group=0)


def test_zeros_and_what_is_not_finite(rng):
    x = rng.normal(size=(32, 48)).astype(np.float32)
    x[:16, :16] = 0
    x[20, 40] = np.nan
    got = np.asarray(tensor.quantize(jnp.asarray(x.T), Block(group=16)).rows())
    assert not got[:16, :16].any() and np.isnan(got[16:, 32:]).all() and np.isfinite(got[:16]).all()


def test_slices_keep_to_blocks(rng):
    linear = Linear(40, 80, bias=True)
    weight = tensor.quantize(jnp.asarray(rng.normal(size=(40, 80)), jnp.float32), Block(group=16))
    linear = ir.replace(linear, weight=weight, bias=jnp.arange(80.0))
    parts = linear.split([32, 48])
    for part, cut in zip(parts, (slice(0, 32), slice(32, 80)), strict=True):
        packed = part.weight.get_value()
        packed.validate()
        np.testing.assert_array_equal(packed.dequantize(), weight.dequantize()[:, cut])
    again = join(*parts).weight.get_value()
    again.validate()
    np.testing.assert_array_equal(again.dequantize(), weight.dequantize())
    with pytest.raises(FormatError, match="outputs 0 to 20 share scales with others, 16 a block"):
        linear.split([20, 60])
    uneven = tensor.columns(weight, 64, 16), tensor.columns(weight, 0, 64)
    assert uneven[0].scale.shape == (1, 3)
    short = ir.replace(Linear(40, 20), weight=tensor.quantize(jnp.ones((40, 20)), Block(group=16)))
    refused = join(short, ir.replace(parts[0], bias=None))
    assert isinstance(refused, Skipped) and "do not fill their blocks of 16" in refused.reason


def test_rows_of_a_table(rng):
    table = tensor.quantize(jnp.asarray(rng.normal(size=(70, 40)), jnp.float32), Block(group=16), axis=-1)
    table.validate()
    ids = jnp.asarray([[0, 15, 16], [69, 33, 200]])
    want = table.dequantize()[jnp.minimum(ids, 69)]
    np.testing.assert_array_equal(tensor.take(table, ids), want)
    np.testing.assert_array_equal(jax.jit(tensor.take)(table, ids), want)


def test_a_product_with_activations_by_128(rng):
    """sum over blocks of s_x s_w sum(q_x q_w), as DeepSeek-V3 computes it."""
    x, w = rng.normal(size=(5, 256)).astype(np.float32), rng.normal(size=(192, 256)).astype(np.float32)
    packed = tensor.quantize(jnp.asarray(w.T), parse("fp8_block"))
    activations = Float8(kind="e4m3", group=128)
    got = quant_matmul(jnp.asarray(x), packed, activations)
    want = np.zeros((5, 192), np.float64)
    for k in range(2):
        block = x[:, 128 * k : 128 * (k + 1)]
        s = np.abs(block).max(-1, keepdims=True) / np.float32(448)
        q = np.clip(block / s, -448, 448).astype(E4M3).astype(np.float64)
        codes = np.asarray(packed.data)[:, 128 * k : 128 * (k + 1)].astype(np.float64)
        want += s * (q @ codes.T) * np.repeat(np.asarray(packed.scale)[:, k], 128)[:192]
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)
    assert np.linalg.norm(got - x @ w.T) < 0.06 * np.linalg.norm(x @ w.T)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("wide") / "tiny", hidden_size=512, intermediate_size=256)


def test_the_recipe_joins_and_comes_back(wide, tmp_path):
    source, tokens = optx.load(wide), np.arange(24, dtype=np.int32)[None] % 11
    fused = optx.compile(source, optx.Recipe.from_yaml("fp8_block"))
    text = ir.describe(fused.tree)
    assert "fp8_block[512, 1024]" in text and "fp8_block[512, 512]" in text, text  # q k v, gate up
    recipe = {"weights": [{"pass": "quantize_weights", "match": "layers/.*", "format": "fp8_block"}]}
    plain = optx.compile(source, optx.Recipe.from_dict(recipe))
    np.testing.assert_allclose(fused.logits(tokens), plain.logits(tokens), rtol=1e-4, atol=1e-4)
    dense = optx.compile(source, optx.Recipe.from_dict({})).logits(tokens)
    assert 0 < np.linalg.norm(plain.logits(tokens) - dense) < 0.1 * np.linalg.norm(dense)
    fused.export(tmp_path / "optx")
    np.testing.assert_array_equal(optx.compile(optx.load(tmp_path / "optx")).logits(tokens), fused.logits(tokens))
    for target in ("cpu", "h100", "tpu-v6e"):
        assert "fp8_block" in ir.describe(optx.plan(source, optx.Recipe.from_yaml("fp8_block"), target).tree)


@pytest.mark.parametrize("rule", [{"scales": "mse"}, {"pass": "gptq"}], ids=["searched", "gptq"])
def test_scales_of_blocks_are_not_searched(wide, rule):
    rule = {"pass": "quantize_weights", "match": "layers/.*", "format": "fp8_block"} | rule
    with pytest.raises(PassError, match="fp8_block has a scale for several output channels"):
        optx.plan(optx.load(wide), optx.Recipe.from_dict({"weights": [rule]}))


PLAIN = ("embed_tokens", "lm_head", "mlp.gate.weight", "eh_proj")  # matrices that DeepSeek keeps as they are


def save(folder: Path, tensors: dict[str, np.ndarray], **config) -> Path:
    folder.mkdir()
    names = {"float8_e4m3fn": "F8_E4M3", "float32": "F32", "bfloat16": "BF16"}
    header, blobs, at = {}, [], 0
    for name, value in tensors.items():
        blobs.append(np.ascontiguousarray(value).tobytes())
        offsets = [at, at := at + len(blobs[-1])]
        header[name] = {"dtype": names[value.dtype.name], "shape": list(value.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    write_json(folder / "config.json", json.loads((GOLDEN / "config.json").read_text()) | config)
    return folder


def quantization(side: int) -> dict:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [side, side]}


@pytest.fixture(scope="module")
def tensors():
    """(of the fp8 checkpoint, of the dense one that holds what it stands for)."""
    packed, dense = {}, {}
    for name, value in load_file(GOLDEN / "model.safetensors").items():
        if value.ndim != 2 or any(part in name for part in PLAIN):
            packed[name] = dense[name] = value
            continue
        codes, scales = quantize(value.astype(np.float32), SIDE)
        packed |= {name: codes, f"{name}_scale_inv": scales}
        dense[name] = dequantize(codes, scales, SIDE)
    return packed, dense


def test_experts_that_do_not_fill_their_blocks_are_read_dense_only(tmp_path):
    """24 outputs of gate and as many of up in one parameter: with blocks of 16, up would begin inside one."""
    mine = {}
    for name, value in load_file(GOLDEN / "model.safetensors").items():
        matrix = value.ndim == 2 and not any(part in name for part in PLAIN)
        codes, scales = quantize(value.astype(np.float32), 16) if matrix else (value, None)
        mine |= {name: codes} | ({f"{name}_scale_inv": scales} if matrix else {})
    folder = save(tmp_path / "fp8", mine, quantization_config=quantization(16))
    assert optx.load(folder).load() is not None
    with pytest.raises(CheckpointError, match=r"gate_up/weight joins it with .*up_proj.*weights='dense'"):
        optx.load(folder, weights="packed")


@pytest.fixture(scope="module")
def folders(tensors, tmp_path_factory):
    root = tmp_path_factory.mktemp("fp8")
    return save(root / "fp8", tensors[0], quantization_config=quantization(SIDE)), save(root / "dense", tensors[1])


def parameters(source) -> dict[str, np.ndarray]:
    return {path: np.asarray(tensor.dense(v.get_value()), np.float32) for path, v in ir.params(source.load()).items()}


@pytest.mark.parametrize("weights", ["dense", "packed"])
def test_deepseeks_files_are_read_bit_for_bit(folders, weights):
    packed, dense = (
        optx.load(folder, weights=how, dtype="float32") for folder, how in zip(folders, (weights, "dense"), strict=True)
    )
    got, want = parameters(packed), parameters(dense)
    assert got.keys() == want.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)
    formats = packed.origin.formats
    assert set(formats.values()) == ({"fp8_block_g8"} if weights == "packed" else set())
    if weights == "packed":
        assert {"layers/0/mixer/o/weight", "layers/1/mlp/experts/gate_up/weight"} <= formats.keys(), formats
        assert "embed/table" not in formats and not any("router" in path for path in formats)
    tokens = np.arange(20, dtype=np.int32)[None]
    logits = optx.compile(packed).logits(tokens)
    np.testing.assert_allclose(logits, optx.compile(dense).logits(tokens), rtol=1e-4, atol=1e-4)


def test_a_packed_checkpoint_runs_and_is_exported(folders, tmp_path):
    source = optx.load(folders[0], weights="packed", dtype="float32")
    compiled = optx.compile(source, optx.Recipe.from_dict({"lower": [{"pass": "fuse_projections"}]}))
    tokens = np.arange(20, dtype=np.int32)[None]
    compiled.export(tmp_path / "optx")
    np.testing.assert_array_equal(optx.compile(optx.load(tmp_path / "optx")).logits(tokens), compiled.logits(tokens))
    assert optx.load(folders[0]).origin.dtype == "bfloat16"  # what is beside the blocks
    assert optx.load_config(folders[0] / "config.json").tree is not None


def broken(tensors, change):
    mine = dict(tensors[0])
    change(mine)
    return mine


O = "model.layers.0.self_attn.o_proj.weight"
DAMAGED = {
    "no scales": (lambda t: t.pop(f"{O}_scale_inv"), quantization(SIDE), f"fp8 without its scales {O}_scale_inv"),
    "no weight": (lambda t: t.pop(O), quantization(SIDE), f"scales without their weight {O}"),
    "other block": (lambda t: None, quantization(32), "scales of .* need float32"),
    "not square": (lambda t: None, quantization(SIDE) | {"weight_block_size": [16, 32]}, "supported: a square block"),
    "e5m2": (lambda t: None, quantization(SIDE) | {"fmt": "e5m2"}, "'fmt' is 'e5m2'; supported: e4m3"),
    "unknown": (lambda t: None, quantization(SIDE) | {"static": True}, "static: not known of an fp8 checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_refused(tensors, tmp_path, name):
    change, config, message = DAMAGED[name]
    folder = save(tmp_path / "bad", broken(tensors, change), quantization_config=config)
    with pytest.raises(CheckpointError, match=message):
        optx.load(folder)


@pytest.mark.parametrize("weights", ["dense", "packed"])
def test_nan_is_refused(tensors, tmp_path, weights):
    def change(mine):
        codes = mine[O].copy()
        codes[3, 5] = np.nan
        mine[O] = codes

    folder = save(tmp_path / "bad", broken(tensors, change), quantization_config=quantization(SIDE))
    with pytest.raises(CheckpointError, match="1 values are NaN or infinite, the first at"):
        optx.load(folder, weights=weights).load()


def test_fp8_without_a_config_is_refused(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "bare")
    shutil.copy(GOLDEN / "config.json", tmp_path / "bare")
    with pytest.raises(CheckpointError, match="needs floating-point numbers|left over"):
        optx.load(tmp_path / "bare")
