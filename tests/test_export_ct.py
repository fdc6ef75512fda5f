"""Compressed-tensors checkpoints: the layout is the package's (it made the goldens), all modules are named, the rest is refused.

With OPTX_GOLD_PYTHON set to a Python that has torch, transformers and compressed-tensors, whole exports are read back by the
package itself and compared bit for bit (tests/golden/compare_compressed_tensors.py).
"""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import families
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors import deserialize

import optx
from optx import cli, ir, tensor
from optx.checkpoint.ct_schemes import SCHEMES, one_outer, values
from optx.checkpoint.export_ct import NOTES, write_compressed_tensors
from optx.checkpoint.hf import INDEX
from optx.errors import CheckpointError
from optx.formats import Float8, Int, fp4, parse
from optx.models import by_hf_type
from optx.nn.core import Linear
from optx.tensor import QTensor

GOLDEN = Path(__file__).parent / "golden"
PYTHON = os.environ.get("OPTX_GOLD_PYTHON")
INT4 = {"weights": [{"pass": "quantize_weights", "match": "layers/.*", "format": "int4", "group": 32}]}
FUSED = {"lower": [{"pass": "fuse_projections"}]}
DTYPES = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "U8": np.uint8, "I8": np.int8, "I32": np.int32,
    "I64": np.int64, "F8_E4M3": ml_dtypes.float8_e4m3fn,
}  # fmt: skip


def load(path: Path) -> dict[str, np.ndarray]:
    """safetensors' own reader of numpy arrays has no fp8."""
    return {
        name: np.frombuffer(info["data"], DTYPES[info["dtype"]]).reshape(info["shape"])
        for name, info in deserialize(path.read_bytes())
    }


def quantized(**rule):
    return {"weights": [{"pass": "quantize_weights", "match": "layers/.*", **rule}]}


def compiled(model, recipe):
    return optx.compile(optx.load(model), optx.Recipe.from_dict(recipe))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model") / "tiny", hidden_size=128)


@pytest.fixture(scope="module")
def golden():
    return load(GOLDEN / "compressed_tensors.safetensors")


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


@pytest.mark.parametrize(
    "name, activations",
    [(n, None) for n in ("int4_g32", "int4_g32_asym", "int8", "int8_asym", "fp8_e4m3", "fp8_block", "mxfp4")]
    + [("int8_w8a8", Int(width=8))],
)
def test_tensors_are_the_packages_bit_for_bit(golden, name, activations):
    """optx rounds the matrix: scales to a unit in the last place (mxfp4 has a rule of its own), under the package's the codes."""
    format_ = parse(name.removesuffix("_w8a8"))
    want = {key.partition(".")[2]: value for key, value in golden.items() if key.startswith(f"{name}.")}
    x, scale = jnp.asarray(golden["matrix"]), jnp.asarray(want["weight_scale"])
    weight = tensor.quantize(x.T, format_)
    if name != "mxfp4":
        np.testing.assert_allclose(np.asarray(weight.scale, np.float32), scale, rtol=2e-7)
    step, offset = format_.steps(scale.astype(weight.scale.dtype), weight.zero, x.shape[1])
    parts = format_.assemble(format_.code(x, step[: len(x)], offset[: len(x)]), scale, weight.zero)
    weight = dataclasses.replace(weight, data=parts.data, scale=scale.astype(weight.scale.dtype))
    got = SCHEMES[type(format_)](weight, activations).tensors(weight)
    np.testing.assert_array_equal(np.asarray(values(weight)), want.pop("dequantized"))
    assert got.keys() == want.keys()
    for last, value in want.items():
        assert (got[last].dtype, got[last].shape) == (value.dtype, value.shape), last
        np.testing.assert_array_equal(bits(got[last]), bits(value), err_msg=last)


def test_nvfp4_tensors_lie_as_the_packages(golden):
    packed, scale, whole, want = (
        golden[f"nvfp4.{last}"] for last in ("weight_packed", "weight_scale", "weight_global_scale", "dequantized")
    )
    outer = jnp.full((packed.shape[0], 1), 1 / whole[0], jnp.float32)
    weight = QTensor(
        data=jnp.asarray(packed), scale=fp4.nv_join(jnp.asarray(scale), outer), format=parse("nvfp4"), length=128
    )
    weight.validate()
    assert one_outer([weight]) == [weight]
    got = SCHEMES[type(weight.format)](weight, None).tensors(weight)
    np.testing.assert_array_equal(got["weight_packed"], packed)
    np.testing.assert_array_equal(bits(got["weight_scale"]), bits(scale))
    np.testing.assert_allclose(got["weight_global_scale"], whole, rtol=1e-7)
    assert got["weight_global_scale"].shape == whole.shape == (1,)
    # s / g and s (1 / g) round otherwise, which bfloat16 shows where they are near a tie: one unit in its last place
    np.testing.assert_allclose(np.asarray(values(weight).astype(jnp.bfloat16), np.float32), want, rtol=2**-7)
    assert (np.asarray(values(weight).astype(jnp.bfloat16), np.float32) == want).mean() > 0.8


def test_one_outer_scale_for_what_readers_join(rng):
    """Rows of very different sizes; a power of two, so that a product of scales is exact; zeros stay zero."""
    x = rng.normal(size=(2, 24, 64)) * np.exp(rng.normal(size=(2, 24, 1)))
    x[0, 3] = 0
    before = [tensor.quantize(jnp.asarray(part.T, jnp.float32), parse("nvfp4")) for part in x]
    after = one_outer(before)
    outers = np.concatenate([np.asarray(fp4.nv_split(w.scale)[1]).reshape(-1) for w in after])
    assert len(set(outers)) == 1 and np.frexp(outers[0])[0] == 0.5
    for old, new, part in zip(before, after, x, strict=True):
        new.validate()
        error = [np.linalg.norm(np.asarray(values(w)) - part) / np.linalg.norm(part) for w in (old, new)]
        assert error[1] < 1.15 * error[0], error
    assert not np.asarray(values(after[0]))[3].any()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_names_groups_and_ignored(model, tmp_path, fused):
    compiled(model, INT4 | (FUSED if fused else {})).export(tmp_path / "out", format="compressed-tensors")
    tensors, config = load(tmp_path / "out" / "model.safetensors"), config_of(tmp_path / "out")
    q = "model.layers.0.self_attn.q_proj"
    assert {name.removeprefix(f"{q}.") for name in tensors if name.startswith(q)} == {
        "weight_packed", "weight_scale", "weight_shape",
    }  # fmt: skip
    assert tensors[f"{q}.weight_packed"].shape == (128, 16) and list(tensors[f"{q}.weight_shape"]) == [128, 128]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head"] and list(config["config_groups"]) == ["group_0"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    np.testing.assert_array_equal(tensors["model.norm.weight"], load(model / "model.safetensors")["model.norm.weight"])
    assert json.loads((tmp_path / "out" / NOTES).read_text())["encoded_again"] == {}


def test_several_formats_are_several_groups_by_name(model, tmp_path):
    recipe = {
        "weights": [
            {"pass": "quantize_weights", "match": "layers/0/mixer/.*", "format": "fp8_e4m3"},
            {"pass": "quantize_weights", "match": "layers/.*/mlp/(gate|up)", "format": "int4", "group": 32},
        ]
    }
    compiled(model, recipe).export(tmp_path / "out", format="compressed-tensors")
    config = config_of(tmp_path / "out")
    groups = {g["format"]: sorted(g["targets"]) for g in config["config_groups"].values()}
    assert config["format"] == "mixed-precision"
    assert groups["float-quantized"] == [f"model.layers.0.self_attn.{p}_proj" for p in "koqv"]
    assert groups["pack-quantized"] == [f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up")]
    dense = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)] + [f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"]
    assert sorted(config["ignore"]) == sorted(["lm_head", *dense])


def test_rounded_activations_are_in_the_scheme(model, tmp_path):
    source = compiled(model, quantized(format="int8"))
    tree = ir.shallow(source.tree)
    packed = [p for _, p in ir.walk(tree) if isinstance(p, Linear) and tensor.is_qtensor(p.weight.get_value())]
    for part in packed:
        part.activations = Int(width=8)
    held = {path: v.get_value() for path, v in ir.params(tree).items()}
    changed = dataclasses.replace(source.plan.source, tree=ir.abstract(tree), read=held.__getitem__)
    write_compressed_tensors(changed, tmp_path / "out", by_hf_type)
    (group,) = config_of(tmp_path / "out")["config_groups"].values()
    assert group["format"] == "int-quantized"
    assert group["input_activations"] | {"strategy": "token", "dynamic": True} == group["input_activations"]
    assert load(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].dtype == np.int8
    for part in packed:
        part.activations = Float8(kind="e4m3")
    changed = dataclasses.replace(source.plan.source, tree=ir.abstract(tree), read=held.__getitem__)
    with pytest.raises(CheckpointError, match="layers/0/mixer/q/weight is int8.*with activations in fp8_e4m3"):
        write_compressed_tensors(changed, tmp_path / "other", by_hf_type)


REFUSED = {
    "int3": (quantized(format="int3", group=32), "layers/0/mixer/q/weight is int3_g32.*choose int4"),
    "fp8 groups": (quantized(format="fp8_e4m3", group=32), "no groups of fp8; drop 'group', or choose fp8_block"),
    "e5m2": (quantized(format="fp8_e5m2"), "choose fp8_e4m3"),
    "small blocks": (quantized(format="fp8_block", group=32), "blocks of 128 x 128"),
    "cache": (INT4 | {"cache": [{"pass": "quantize_kv"}]}, "layers/0/mixer keeps its cache in int8.*without the recipe's cache"),
    "dense": ({}, "no weight is packed; compile it with quantize_weights, or export the weights dense with format 'hf'"),
    "window": (INT4 | {"attention": [{"pass": "sliding_window", "window": 16}]}, "cannot express what the recipe changed"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_hold_is_refused(model, tmp_path, name):
    recipe, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        compiled(model, recipe).export(tmp_path / "out", format="compressed-tensors")
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_a_reader_cannot_round_activations_for_are_refused(tmp_path):
    narrow = tiny.checkpoint(tmp_path / "tiny")  # 64 inputs
    with pytest.raises(CheckpointError, match="64 inputs are no multiple of 128"):
        compiled(narrow, quantized(format="fp8_block")).export(tmp_path / "out", format="compressed-tensors")


def test_blocks_of_a_gguf_file_are_refused(tmp_path):
    path = families.write_llama_gguf(
        tmp_path / "model.gguf", families.concrete("llama"), lambda rows: ("Q8_0", families.q8_0(rows))
    )
    with pytest.raises(CheckpointError, match="embed/table is q8_0.*; compile from dense weights to one"):
        optx.export(optx.load(path, "packed"), tmp_path / "out", format="compressed-tensors")


def test_shards_with_an_index(model, tmp_path):
    source = compiled(model, INT4)
    source.export(tmp_path / "whole", format="compressed-tensors")
    held = {path: v.get_value() for path, v in ir.params(source.tree).items()}
    changed = dataclasses.replace(source.plan.source, tree=ir.abstract(source.tree), read=held.__getitem__)
    write_compressed_tensors(changed, tmp_path / "cut", by_hf_type, shard=50_000)
    table = json.loads((tmp_path / "cut" / INDEX).read_text())["weight_map"]
    files = {path.name: load(path) for path in (tmp_path / "cut").glob("*.safetensors")}
    assert len(files) > 3 and set(table.values()) == files.keys()
    whole = load(tmp_path / "whole" / "model.safetensors")
    assert table.keys() == whole.keys()
    for name, file in table.items():
        np.testing.assert_array_equal(bits(files[file][name]), bits(whole[name]))


def test_the_command(model, tmp_path, capsys):
    compiled(model, quantized(format="nvfp4")).export(tmp_path / "optx")
    args = ["export", str(tmp_path / "optx"), "--format", "compressed-tensors", "--out", str(tmp_path / "out")]
    assert cli.run(args) == 0
    said = capsys.readouterr().out
    assert "compressed-tensors safetensors" in said and "14 nvfp4 weights encoded again" in said
    changed = json.loads((tmp_path / "out" / NOTES).read_text())["encoded_again"]
    assert len(changed) == 14 and all(0 < x < 0.06 for x in changed.values())


def moe(folder: Path) -> Path:
    """A Qwen3 MoE with random weights as an HF folder."""
    config = json.loads((GOLDEN.parent / "goldens" / "qwen3_moe" / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    source = optx.load_config(folder / "config.json", "float32")
    held = {path: v.get_value() for path, v in ir.params(ir.init_weights(source.tree)).items()}
    optx.export(dataclasses.replace(source, read=held.__getitem__), folder, format="hf", overwrite=True)
    return folder


def test_experts_are_written_one_by_one(tmp_path):
    compiled(moe(tmp_path / "moe"), INT4).export(tmp_path / "out", format="compressed-tensors")
    tensors, config = load(tmp_path / "out" / "model.safetensors"), config_of(tmp_path / "out")
    experts = [name for name in tensors if "mlp.experts.0." in name and name.endswith("weight_packed")]
    assert any("gate_proj" in name for name in experts) and any("up_proj" in name for name in experts)
    routers = [name for name in config["ignore"] if name.endswith("mlp.gate")]
    assert routers and all(f"{name}.weight" in tensors for name in routers)


EXPORTED = {
    "int4": quantized(format="int4", group=32),
    "int4_asym": quantized(format="int4", group=32, symmetric=False) | FUSED,
    "int8_asym": quantized(format="int8", symmetric=False),
    "fp8": quantized(format="fp8_e4m3"),
    "fp8_block": quantized(format="fp8_block"),
    "mxfp4": quantized(format="mxfp4"),
}


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("name", EXPORTED)
def test_the_package_reads_the_same_numbers(model, tmp_path, kind, name):
    if PYTHON is None:
        pytest.skip("OPTX_GOLD_PYTHON names no Python with torch, transformers and compressed-tensors")
    if kind == "qwen3_moe" and name == "fp8_block":
        pytest.skip("the tiny experts have fewer than 128 inputs")
    result = compiled(model if kind == "llama" else moe(tmp_path / "moe"), EXPORTED[name])
    result.export(tmp_path / "ct", format="compressed-tensors")
    result.export(tmp_path / "hf", format="hf")
    compare(tmp_path / "ct", tmp_path / "hf")


def compare(export: Path, dense: Path) -> None:
    command = [PYTHON, GOLDEN / "compare_compressed_tensors.py", export, dense]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr[-2000:]}"
    print(ran.stdout)


def test_the_package_reads_nvfp4_under_one_outer_scale(model, tmp_path):
    """Weights that are so already are exported as they are; a power of two makes the package's bfloat16 numbers exact."""
    if PYTHON is None:
        pytest.skip("OPTX_GOLD_PYTHON names no Python with torch, transformers and compressed-tensors")
    source = compiled(model, quantized(format="nvfp4"))
    held = {path: v.get_value() for path, v in ir.params(source.tree).items()}
    packed = [path for path, value in held.items() if tensor.is_qtensor(value)]
    held |= dict(zip(packed, one_outer([held[path] for path in packed]), strict=True))
    source = dataclasses.replace(source.plan.source, tree=ir.abstract(source.tree), read=held.__getitem__)
    for format_ in ("compressed-tensors", "hf"):
        optx.export(source, tmp_path / format_, format=format_)
    assert json.loads((tmp_path / "compressed-tensors" / NOTES).read_text())["encoded_again"] == {}
    compare(tmp_path / "compressed-tensors", tmp_path / "hf")
