"""MXFP4 checkpoints: blocks and scales of experts are loaded bit for bit, packed or dense, and never widened in between.

The checkpoint is the golden of gpt_oss with its experts quantized here, by the words of the OCP MX specification v1.0.
"""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import optx
from optx import ir
from optx.errors import CheckpointError, ConfigError
from optx.tensor import is_qtensor

GOLDEN = Path(__file__).parent / "goldens" / "gpt_oss"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # by code; code + 8 is the negative
QUANTIZED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
EXPERTS = "model.layers.1.mlp.experts."


def mx_quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32[..., D] -> blocks uint8[..., D / 32, 16], scales uint8[..., D / 32] (MX v1.0, 6.3 with e2m1 and e8m0).

    shared_exp = floor(log2(max |V|)) - emax_elem, X = 2^shared_exp, P = V / X to nearest, ties to even, saturated.
    """
    v = np.ascontiguousarray(x).reshape(*x.shape[:-1], -1, 32)
    shared = np.floor(np.log2(np.abs(v).max(axis=-1))) - 2  # emax of e2m1
    p = v / np.exp2(shared)[..., None]
    distance = np.abs(np.abs(p)[..., None] - E2M1)
    nearest = distance == distance.min(axis=-1, keepdims=True)
    even = nearest & (np.arange(8) % 2 == 0)
    code = np.where(even.any(axis=-1), even.argmax(axis=-1), nearest.argmax(axis=-1)).astype(np.uint8)
    code |= np.signbit(p).astype(np.uint8) << 3
    return code[..., ::2] | code[..., 1::2] << 4, (shared + 127).astype(np.uint8)


def mx_dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    values = np.where(codes >= 8, -1, 1) * E2M1[codes & 7] * np.exp2(scales.astype(np.float32) - 127)[..., None]
    return values.reshape(*scales.shape[:-1], -1).astype(np.float32)


def write(folder: Path, tensors: dict, **config) -> Path:
    folder.mkdir()
    shutil.copy(GOLDEN / "config.json", folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def tensors():
    """(of the MXFP4 checkpoint, of the dense one that holds what it stands for)."""
    packed, dense = {}, {}
    for name, value in load_file(GOLDEN / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = dense[name] = value
            continue
        blocks, scales = mx_quantize(np.swapaxes(value, 1, 2).astype(np.float32))  # [E, D, F] -> [E, F, D]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = np.swapaxes(mx_dequantize(blocks, scales), 1, 2)
        dense[name] = np.ascontiguousarray(values.astype(ml_dtypes.bfloat16))
        np.testing.assert_array_equal(dense[name].astype(np.float32), values)  # bfloat16 holds them
    return packed, dense


@pytest.fixture(scope="module")
def folders(tensors, tmp_path_factory):
    """(MXFP4, dense) directories."""
    root = tmp_path_factory.mktemp("mxfp4")
    return write(root / "mxfp4", tensors[0], quantization_config=QUANTIZED), write(root / "dense", tensors[1])


def parameters(source):
    return {path: variable.get_value() for path, variable in ir.params(source.load()).items()}


def logits(source_or_model):
    model = source_or_model if isinstance(source_or_model, optx.api.Compiled) else optx.compile(source_or_model)
    return np.asarray(model.logits(np.load(GOLDEN / "answers.npz")["tokens"]))


def test_dense_and_packed_loads_are_the_dequantized_checkpoint(folders):
    want = parameters(optx.load(folders[1]))
    dense, packed = optx.load(folders[0]), optx.load(folders[0], weights="packed")
    assert dense.origin.dtype == packed.origin.dtype == "bfloat16"
    assert ir.describe(dense.tree) == ir.describe(optx.load(folders[1]).tree)
    kept = [path for path, value in parameters(packed).items() if is_qtensor(value)]
    assert kept == list(packed.origin.formats) and set(packed.origin.formats.values()) == {"mxfp4"}
    assert kept == [f"layers/{i}/mlp/experts/{name}/weight" for i in range(3) for name in ("gate_up", "down")]
    for path, value in parameters(dense).items():
        np.testing.assert_array_equal(value, want[path], err_msg=path)
    for path, value in parameters(packed).items():
        np.testing.assert_array_equal(value.dequantize() if is_qtensor(value) else value, want[path], err_msg=path)


def test_packed_bytes_are_those_of_the_file(folders, tensors):
    """gate_up has gate and up by turns in the file, gate first in the tree; down is as it is."""
    loaded = parameters(optx.load(folders[0], weights="packed"))
    for name, rows in (("gate_up", np.r_[0:64:2, 1:64:2]), ("down", np.r_[0:64])):
        value = loaded[f"layers/1/mlp/experts/{name}/weight"]
        blocks, scales = (tensors[0][f"{EXPERTS}{name}_proj_{part}"] for part in ("blocks", "scales"))
        np.testing.assert_array_equal(value.data, blocks.reshape(*scales.shape[:2], -1)[:, rows])
        np.testing.assert_array_equal(value.scale, scales[:, rows])
        value.validate()


def test_a_compiled_model_stays_packed_and_answers_the_same(folders):
    want = logits(optx.load(folders[1], dtype="float32"))
    assert np.abs(logits(optx.load(folders[0], dtype="float32")) - want).max() == 0
    model = optx.compile(optx.load(folders[0], weights="packed", dtype="float32"))
    for layer in model.tree.layers:
        for part in (layer.mlp.experts.gate_up, layer.mlp.experts.down):
            assert is_qtensor(part.weight.get_value()) and str(part.weight.get_value().format) == "mxfp4"
    assert np.abs(logits(model) - want).max() < 1e-5


@pytest.mark.parametrize("weights", ["dense", "packed"])
def test_hf_export_is_the_dense_checkpoint(weights, folders, tensors, tmp_path):
    model = optx.compile(optx.load(folders[0], weights=weights))
    optx.export(model, tmp_path / "out", format="hf")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors[1].keys()
    for name, value in tensors[1].items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)


def test_an_optx_export_stays_packed(folders, tmp_path):
    model = optx.compile(optx.load(folders[0], weights="packed", dtype="float32"))
    optx.export(model, tmp_path / "out")
    again = optx.load(tmp_path / "out")
    assert ir.describe(again.tree) == ir.describe(model.tree)
    np.testing.assert_array_equal(logits(again), logits(model))
    with pytest.raises(CheckpointError, match="keeps its weights' formats"):
        optx.load(tmp_path / "out", weights="packed")


def test_a_config_alone_can_be_packed(folders):
    whole = optx.load(folders[0], weights="packed")
    alone = optx.load(folders[0] / "config.json", weights="packed")
    assert ir.describe(alone.tree) == ir.describe(whole.tree) and alone.origin.formats == whole.origin.formats


NO_NUMBER = "gate_up_proj_blocks uint8.*: 32 values are NaN or infinite, the first at"
WRONG = {
    "no scales": (lambda t: t.pop(f"{EXPERTS}down_proj_scales"), "missing: .*down_proj_scales .for layers/1"),
    "both forms": (lambda t: t.update({f"{EXPERTS}down_proj": np.ones((4, 32, 64), np.float32)}), "left over: .*down_proj "),
    "other blocks": (
        lambda t: t.update({f"{EXPERTS}down_proj_blocks": np.zeros((4, 64, 16), np.uint8)}),
        r"down_proj_blocks uint8\[4, 64, 16\]: layers/1/mlp/experts/down/weight needs uint8\[4, 64, 1, 16\]",
    ),
    "float scales": (
        lambda t: t.update({f"{EXPERTS}down_proj_scales": np.ones((4, 64, 1), np.float32)}),
        r"down_proj_scales float32\[4, 64, 1\]: layers/1/mlp/experts/down/weight needs uint8\[4, 64, 1\]",
    ),
    "bytes for numbers": (
        lambda t: t.update({"model.norm.weight": np.ones(64, np.uint8)}),
        r"model.norm.weight uint8\[64\]: norm/weight needs floating-point numbers",
    ),
    "no number": (lambda t: t[f"{EXPERTS}gate_up_proj_scales"].__setitem__((2, 5, 1), 255), NO_NUMBER),
}  # fmt: skip


@pytest.mark.parametrize("weights", ["dense", "packed"])
@pytest.mark.parametrize("case", WRONG)
def test_damaged_checkpoints(case, weights, tensors, tmp_path):
    change, told = WRONG[case]
    changed = {name: value.copy() for name, value in tensors[0].items()}
    change(changed)
    folder = write(tmp_path / "model", changed, quantization_config=QUANTIZED)
    with pytest.raises(CheckpointError, match=told):
        optx.load(folder, weights=weights).load()


@pytest.mark.parametrize(
    ("details", "told"),
    [
        ({"quant_method": "gptq"}, "'quant_method' is 'gptq'; supported: 'mxfp4'"),
        ({}, "'quant_method' is missing"),
        (QUANTIZED | {"bits": 4}, "bits=4"),
        (QUANTIZED | {"modules_to_not_convert": ["model.layers.0.mlp"]}, "names 'model.layers.0.mlp'; supported: model."),
    ],
)  # fmt: skip
def test_quantization_config_is_read_strictly(details, told, tensors, tmp_path):
    with pytest.raises(ConfigError, match=told):
        optx.load(write(tmp_path / "model", tensors[0], quantization_config=details))


def test_a_dense_checkpoint_cannot_be_loaded_packed(folders):
    with pytest.raises(CheckpointError, match="this one's tensors are dense"):
        optx.load(folders[1], weights="packed")
