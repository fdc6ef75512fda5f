"""Checkpoints: what a file holds is what runs, and every way in which a file can be wrong has its one clear error."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import families
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import optx
from optx import ir
from optx.checkpoint.mapping import permute, unpermute
from optx.errors import CheckpointError, ConfigError, OptxError
from optx.models import FAMILIES

INDEX = "model.safetensors.index.json"


def edit_config(folder, **changes):
    """Config fields changed, or taken out where the value is ...; returns the folder."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return folder


def edit_tensors(folder, change):
    """change(tensors) works on the dict in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A llama directory of one layer."""
    return families.hf_dir(tmp_path / "model", "llama", num_hidden_layers=1)[0]


def weights(source) -> dict[str, np.ndarray]:
    return families.parameters(source.load())


# What a file holds is what runs.


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_directory_gives_back_the_model(family, tmp_path):
    path, model = families.hf_dir(tmp_path / family, family)
    source = optx.load(path)
    assert ir.describe(source.tree) == ir.describe(model)
    for name, value in weights(source).items():
        np.testing.assert_array_equal(value, families.parameters(model)[name])
    tokens = families.prompt(10)
    assert families.relative(optx.compile(source).logits([tokens])[0], families.oracle(model, tokens)) < 1e-5
    assert source.origin.bytes == (path / "model.safetensors").stat().st_size and source.tokenizer is None


def test_shards(tmp_path):
    model = families.concrete("qwen3")
    config, tensors = families.CONFIGS["qwen3"], families.hf_tensors(model, "qwen3")
    families.write_hf(tmp_path, config, tensors, shards=3)
    source = optx.load(tmp_path)
    for name, value in weights(source).items():
        np.testing.assert_array_equal(value, families.parameters(model)[name])
    assert source.origin.bytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    (tmp_path / INDEX).unlink()
    assert weights(optx.load(tmp_path)).keys() == families.parameters(model).keys(), "shards without an index"


def test_a_directory_may_hold_an_index_of_one_file(folder):
    names = load_file(folder / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    (folder / "consolidated.safetensors").write_bytes(b"what the index does not name is not read")
    assert weights(optx.load(folder))


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16", "float16"])
def test_dtypes(stored, asked, tmp_path):
    model = families.concrete("llama", num_hidden_layers=1)
    tensors = {name: value.astype(stored) for name, value in families.hf_tensors(model, "llama").items()}
    families.write_hf(tmp_path, families.CONFIGS["llama"] | {"num_hidden_layers": 1}, tensors)
    source = optx.load(tmp_path, dtype=asked)
    want = asked or {"float64": "float32"}.get(stored, stored)
    assert source.origin.dtype == want and source.tree.layers[0].mixer.cache.dtype == want
    for name, value in weights(source).items():
        dense = families.parameters(model)[name]
        assert value.dtype == want
        np.testing.assert_array_equal(value, dense.astype(stored).astype(want))


def test_the_dtype_is_that_of_most_numbers(folder):
    def mix(tensors):
        for name, value in tensors.items():
            big = "embed" in name or "lm_head" in name
            tensors[name] = value.astype(ml_dtypes.bfloat16) if big else value

    source = optx.load(edit_tensors(folder, mix))
    assert source.origin.dtype == "bfloat16" and {str(v.dtype) for v in weights(source).values()} == {"bfloat16"}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FULL, SLIDING = "full_attention", "sliding_attention"
STYLES = {  # family: fields as transformers 4 writes them, as transformers 5 does, what both mean
    "plain": (
        "llama",
        {"rope_theta": 5000.0, "rope_scaling": None, "torch_dtype": "float32"},
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}, "dtype": "float32"},
    ),
    "llama3": (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": ..., "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    ),
    "linear, older name": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": ..., "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "qwen3 sliding": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "rope_theta": ...,
            "layer_types": [FULL, SLIDING],
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        },
    ),
    "gemma3": (
        "gemma3",
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "sliding_window_pattern": ...,
            "layer_types": [SLIDING, SLIDING, FULL],
            "use_bidirectional_attention": False,
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


@pytest.mark.parametrize("case", STYLES)
def test_configs_of_transformers_4_and_5_say_the_same(case, tmp_path):
    family, four, five = STYLES[case]
    path, _ = families.hf_dir(tmp_path, family)
    original = json.loads((path / "config.json").read_text())
    trees = []
    for style in (four, five):
        (path / "config.json").write_text(json.dumps(original))
        trees.append(ir.describe(optx.load(edit_config(path, **style)).tree))
    (path / "config.json").write_text(json.dumps(original))
    assert trees[0] == trees[1]
    assert trees[0] != ir.describe(optx.load(path).tree), "the fields are read"


def test_gemmas_own_defaults(tmp_path):
    """Every sixth layer is global unless the config says otherwise; the two kinds have a rope base each."""
    path = edit_config(
        families.hf_dir(tmp_path, "gemma3", num_hidden_layers=12)[0],
        sliding_window_pattern=...,
        _sliding_window_pattern=6,
    )
    for changes in ({}, {"_sliding_window_pattern": ...}):
        mixers = [layer.mixer for layer in optx.load(edit_config(path, **changes)).tree.layers]
        assert [mixer.cache.window for mixer in mixers] == ([6] * 5 + [None]) * 2
        assert [mixer.rope.theta for mixer in mixers] == ([1e4] * 5 + [1e6]) * 2


def test_a_tied_head_may_be_stored_all_the_same(tmp_path):
    path, model = families.hf_dir(tmp_path, "qwen3")
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert optx.load(path).tree.output is None
    edit_tensors(path, lambda t: t.update({"lm_head.bias": np.zeros(3, np.float32)}))
    with pytest.raises(CheckpointError, match=r"left over: lm_head.bias float32\[3\]"):
        optx.load(path)


def test_buffers_of_old_checkpoints_are_no_parameters(folder):
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    assert weights(optx.load(folder))


def test_biases_come_from_the_file(tmp_path):
    path, model = families.hf_dir(tmp_path, "llama", num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    got = weights(optx.load(path))
    assert "layers/0/mixer/q/bias" in got and "layers/0/mlp/down/bias" in got
    np.testing.assert_array_equal(got["layers/0/mlp/down/bias"], families.parameters(model)["layers/0/mlp/down/bias"])


def test_the_head_of_a_safetensors_file_may_begin_like_a_pickle(folder):
    """The file begins with the length of its header: 0x80 as its low byte is a pickle's first byte, and one in 32 files
    has it."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    for low in (b"\x80", b"PK"):
        length = next(n for n in range(size + 8, size + 70000, 8) if n.to_bytes(8, "little").startswith(low))
        header = data[8 : 8 + size].ljust(length, b" ")
        path.write_bytes(length.to_bytes(8, "little") + header + data[8 + size :])
        assert weights(optx.load(folder))


def test_an_end_of_text_id_comes_with_the_tokenizer(tmp_path):
    path, _ = families.hf_dir(tmp_path, "llama", num_hidden_layers=1, add_bos=True)
    tokenizer = optx.load(path).tokenizer
    assert tokenizer.eos_ids == {families.EOS} and tokenizer.encode("a")[0] == families.BOS


# Coverage both ways.


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def extra(count):
    return lambda t: t.update({f"model.layers.{i}.extra": np.zeros((i + 1, 2), np.float16) for i in range(count)})


def reshape(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((60, 32), np.float32)


Q = "model.layers.0.self_attn.q_proj.weight"
COVERAGE = {
    "missing": (drop(Q), [f"missing: {Q} (for layers/0/mixer/q/weight f32[32, 32])"]),
    "missing head": (drop("lm_head.weight"), ["missing: lm_head.weight (for output/weight f32[32, 264])"]),
    "left over": (extra(1), ["left over: model.layers.0.extra float16[1, 2]"]),
    "many left over": (extra(7), ["model.layers.4.extra float16[5, 2]; and 2 more"]),
    "wrong shape": (
        reshape,
        ["wrong shape: model.layers.0.mlp.up_proj.weight float32[60, 32]: layers/0/mlp/up/weight needs [64, 32]"],
    ),
    "all at once": (
        lambda t: [change(t) for change in (drop(Q), extra(1), reshape)],
        [f"missing: {Q}", ". wrong shape: model.layers.0.mlp.up", ". left over: model.layers.0.extra"],
    ),
}


@pytest.mark.parametrize("case", COVERAGE)
def test_tensors_that_do_not_fit_the_config(case, folder):
    change, told = COVERAGE[case]
    with pytest.raises(CheckpointError) as error:
        optx.load(edit_tensors(folder, change))
    text = str(error.value)
    assert text.startswith(f"{folder}: the tensors do not fit the config. ")
    assert all(part in text for part in told), text


def test_a_tensor_with_too_many_axes_is_a_wrong_shape(folder):
    def change(tensors):
        tensors[Q] = tensors[Q][None]

    with pytest.raises(
        CheckpointError, match=r"wrong shape: .*q_proj.weight float32\[1, 32, 32\]: .* needs \[32, 32\]"
    ):
        optx.load(edit_tensors(folder, change))


# Configs.


CONFIGS = {
    "unknown field": (
        {"attention_chunk_size": 8192},
        "neither handles nor knows to be harmless: attention_chunk_size=8192; they may change",
    ),
    "several": ({"new_b": 1, "new_a": [2]}, "harmless: new_a=[2], new_b=1;"),
    "unknown type": ({"model_type": "lama"}, "config.json: model_type 'lama' is not supported; did you mean 'llama'?"),
    "another type": (
        {"model_type": "bert"},
        f"model_type 'bert' is not supported; allowed: {', '.join(sorted(t for f in FAMILIES for t in f.HF_TYPES))}",
    ),
    "no type": ({"model_type": ...}, "model_type None is not supported"),
    "type of a type": ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
    "missing field": ({"hidden_size": ...}, "config.json: 'hidden_size' is missing"),
    "null": ({"intermediate_size": None}, "'intermediate_size' is missing"),
    "text for a number": ({"hidden_size": "32"}, "'hidden_size' is '32'; allowed: int"),
    "bool for a number": ({"num_attention_heads": True}, "'num_attention_heads' is True; allowed: int"),
    "fraction": ({"intermediate_size": 64.5}, "'intermediate_size' is 64.5; allowed: int"),
    "zero": ({"num_attention_heads": 0}, "'num_attention_heads' is 0; allowed: 1 to"),
    "negative": ({"vocab_size": -1}, "'vocab_size' is -1; allowed: 1 to"),
    "absurd width": ({"hidden_size": 10**15}, "'hidden_size' is 1000000000000000; not a believable size"),
    "absurd layers": ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000; allowed: 1 to 4096"),
    "absurd number": ({"rope_theta": 10**400}, "'rope_theta' is 1000"),
    "not a number": ({"rope_theta": float("nan")}, "'rope_theta' is nan; not a believable size"),
    "infinity": ({"rms_norm_eps": float("inf")}, "'rms_norm_eps' is inf; not a believable size"),
    "rope base of 0": ({"rope_theta": 0}, "'rope_theta' is 0.0; allowed: above 0"),
    "negative eps": ({"rms_norm_eps": -1e-6}, "'rms_norm_eps' is -1e-06; allowed: above 0"),
    "heads": ({"num_key_value_heads": 3}, "4 query heads do not divide into 3 kv heads"),
    "odd head": ({"head_dim": 7}, "rotary embedding of 7 numbers a head; allowed: an even number"),
    "head size": ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size 32 does not divide into 5 heads"),
    "activation": ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; supported: 'silu' or absent"),
    "rope type": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        "config.json: rope_scaling: rope_type 'dynamic'; supported: default, linear, llama3, yarn",
    ),
    "rope field": (
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "beta": 1}},
        "config.json: rope_scaling: fields that optx neither handles nor knows to be harmless: beta=1",
    ),
    "rope factor": ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "'factor' is 0.0; allowed: above 0"),
    "rope as a list": ({"rope_scaling": [1]}, "'rope_scaling' is [1]; allowed: dict"),
    "quantized": (
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "config.json: quantized checkpoint (awq); supported here: dense safetensors, and GGUF",
    ),
    "quantized somehow": ({"quantization_config": ["awq"]}, "quantized checkpoint (['awq'])"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_not_understood(case, folder):
    changes, told = CONFIGS[case]
    with pytest.raises(OptxError) as error:
        optx.load(edit_config(folder, **changes))
    assert told in str(error.value)
    kind = CheckpointError if "quantized" in case else ConfigError
    assert type(error.value) is kind


@pytest.mark.parametrize(
    "family, changes, told",
    [
        ("gemma3", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar' is 0.0; allowed: above 0"),
        ("gemma3", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True; supported: False"),
        ("gemma3", {"layer_types": ["full_attention"]}, "'layer_types' has 1 entries for 3 layers"),
        (
            "gemma3",
            {"layer_types": ["full_attention", {}, "x"]},
            "'layer_types' holds {}; supported: full_attention, sl",
        ),
        ("gemma3", {"rope_parameters": {"chunked": {}}}, "rope_parameters: fields that optx neither handles"),
        ("gemma3", {"sliding_window": ...}, "'sliding_window' is missing"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "chunked"]},
            "'layer_types' holds 'chunked'; supported: full_attention",
        ),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, "sliding layers but no sliding_window"),
        ("qwen3", {"sliding_window": 0}, "'sliding_window' is 0; allowed: 1 to"),
        ("qwen3", {"use_sliding_window": 1}, "'use_sliding_window' is 1; allowed: bool"),
    ],
)
def test_what_a_family_does_not_have(family, changes, told, tmp_path):
    path = edit_config(families.hf_dir(tmp_path, family)[0], **changes)
    with pytest.raises(ConfigError) as error:
        optx.load(path)
    assert told in str(error.value)


# Damaged, unsafe and missing files.


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["OPTX_TEST_TRAP"],))


def write_pickle(path):
    path.write_bytes(pickle.dumps(Trap()))


def write_zip_pickle(path):
    with zipfile.ZipFile(path, "w") as file:  # as torch.save writes
        file.writestr("archive/data.pkl", pickle.dumps(Trap()))


@pytest.mark.parametrize("write", [write_pickle, write_zip_pickle])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "model.pt", "model-00001-of-00001.safetensors"]
)
def test_a_pickle_is_refused_and_never_opened(write, name, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTX_TEST_TRAP", str(tmp_path / "sprung"))
    (folder / "model.safetensors").unlink()
    write(folder / name)
    if name.startswith("model-"):
        (folder / INDEX).write_text(json.dumps({"weight_map": {Q: name}}))
    with pytest.raises(CheckpointError, match="pickle.* run code and is never loaded"):
        optx.load(folder)
    assert not (tmp_path / "sprung").exists()
    if write is write_pickle:
        pickle.loads((folder / name).read_bytes())
        assert (tmp_path / "sprung").exists(), "the trap works"


def test_a_pickle_named_by_the_index_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTX_TEST_TRAP", str(tmp_path / "sprung"))
    (folder / "model.safetensors").unlink()
    write_zip_pickle(folder / "pytorch_model.bin")
    (folder / INDEX).write_text(json.dumps({"weight_map": {Q: "pytorch_model.bin"}}))
    with pytest.raises(CheckpointError, match="pytorch_model.bin: a pickle"):
        optx.load(folder)


def cut(count):
    def change(folder):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: count if count >= 0 else len(data) + count])

    return change


def overwrite(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def remove(name):
    return lambda folder: (folder / name).unlink()


def index(value):
    return lambda folder: (folder / INDEX).write_text(json.dumps(value))


def twice(folder):
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")


HEADER = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


def safetensors(header, data=bytes(8), length=None):
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


DAMAGED = {
    "no config": (remove("config.json"), "config.json: no such file; an HF directory needs config.json"),
    "config is no JSON": (overwrite("config.json", b"{"), "config.json: not JSON: "),
    "config is no UTF-8": (overwrite("config.json", b"\xff\xfe{}"), "config.json: not JSON: "),
    "config is a list": (overwrite("config.json", b"[]"), "config.json: got a list; allowed: an object"),
    "config is a bottomless list": (overwrite("config.json", b"[" * 10**6), "config.json: not JSON: "),
    "config with a number without end": (overwrite("config.json", b'{"a": 1' + b"0" * 5000 + b"}"), "not JSON: "),
    "no weights": (remove("model.safetensors"), "model: no *.safetensors file"),
    "empty file": (cut(0), "model.safetensors: not a whole safetensors file: "),
    "half a length": (cut(4), "model.safetensors: not a whole safetensors file: "),
    "half a header": (cut(100), "model.safetensors: not a whole safetensors file: "),
    "half the data": (cut(-1000), "model.safetensors: not a whole safetensors file: "),
    "one byte short": (cut(-1), "model.safetensors: not a whole safetensors file: "),
    "other bytes": (overwrite("model.safetensors", b"GGUF" * 100), "not a whole safetensors file: "),
    "absurd header": (
        overwrite("model.safetensors", safetensors(HEADER, length=2**63)),
        "not a whole safetensors file",
    ),
    "absurd shape": (
        overwrite("model.safetensors", safetensors(HEADER.replace(b"[2]", b"[9999999999999,9999999999]"))),
        "not a whole safetensors file: ",
    ),
    "offsets past the end": (
        overwrite("model.safetensors", safetensors(HEADER.replace(b"[0,8]", b"[8,16]"))),
        "not a whole safetensors file: ",
    ),
    "integers": (
        overwrite("model.safetensors", safetensors(HEADER.replace(b"F32", b"I32"))),
        "model.safetensors: tensor w has dtype I32; supported: F64, F32, F16, BF16",
    ),
    "tensors twice": (twice, "other.safetensors: tensor lm_head.weight is in"),
    "index is no JSON": (overwrite(INDEX, b"{"), f"{INDEX}: not JSON"),
    "index is a list": (index([]), f"{INDEX}: 'weight_map' must map tensor names to file names"),
    "index without map": (index({}), f"{INDEX}: 'weight_map' must map"),
    "index of numbers": (index({"weight_map": {Q: 1}}), f"{INDEX}: 'weight_map' must map"),
    "missing shard": (
        index({"weight_map": {Q: "model-00002-of-00002.safetensors", "w": "model.safetensors"}}),
        "the index names shards that are missing: model-00002-of-00002.safetensors",
    ),
    "empty map": (index({"weight_map": {}}), "holds no tensor"),
    **{
        f"index that leaves the directory by {name!r}": (index({"weight_map": {Q: name}}), "in the same directory")
        for name in ("../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "../", "a/../../b")
    },
    "a folder under a file's name": (
        lambda folder: (folder / "extra.safetensors").mkdir(),
        "extra.safetensors: cannot be read: Is a directory",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage(case, folder):
    change, told = DAMAGED[case]
    change(folder)
    with pytest.raises(CheckpointError) as error:
        optx.load(folder)
    assert told in str(error.value)


def test_weights_that_are_no_numbers(folder):
    def change(tensors):
        tensors[Q][3, 5] = np.nan
        tensors[Q][30, 1] = np.inf

    source = optx.load(edit_tensors(folder, change))
    with pytest.raises(CheckpointError) as error:
        optx.compile(source)
    assert str(error.value).startswith(
        f"{folder / 'model.safetensors'}: {Q} float32[32, 32]: 2 values are NaN or infinite, the first at [3, 5]"
    )


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_weights_that_are_no_numbers(stored, folder):
    def change(tensors):
        for name, value in tensors.items():
            tensors[name] = value.astype(stored)
        tensors["model.norm.weight"][7] = -np.inf

    with pytest.raises(
        CheckpointError, match=r"model.norm.weight .*\[32\]: 1 values are NaN or infinite, the first at \[7\]"
    ):
        optx.compile(optx.load(edit_tensors(folder, change)))


def test_large_weights_are_numbers(folder):
    """Their sum is not finite in float32, they are."""

    def change(tensors):
        tensors[Q][:] = 3e38

    assert weights(optx.load(edit_tensors(folder, change)))["layers/0/mixer/q/weight"].max() == np.float32(3e38)
    with pytest.raises(CheckpointError, match="q_proj.weight .* holds values up to 3e.38, beyond float16"):
        optx.load(folder, dtype="float16").load()


def test_a_file_that_got_shorter_after_it_was_opened(folder):
    source = optx.load(folder)
    cut(-5000)(folder)
    with pytest.raises(CheckpointError, match="model.safetensors: cannot read tensor"):
        source.load()


def test_a_file_that_went_away_after_it_was_opened(folder):
    source = optx.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors: cannot read tensor"):
        optx.compile(source)


@pytest.mark.parametrize(
    "name, told",
    [
        ("modle", r"modle: no such file or directory; did you mean '.*model'\?"),
        ("nowhere/at/all", "nowhere/at/all: no such file or directory"),
        ("model.gguf", "model.gguf: no such file or directory"),
        ("\0", "no such file or directory"),
        ("x" * 5000, "cannot be read: File name too long"),
    ],
    ids=["typo", "folder", "gguf", "null byte", "long"],
)
def test_a_path_that_leads_nowhere(name, told, folder):
    with pytest.raises(CheckpointError, match=told):
        optx.load(f"{folder.parent}/{name}")


def test_a_hub_id_while_offline(tmp_path):
    """The hub's library reads HF_HUB_OFFLINE when it is imported: a program of its own."""
    code = "import optx\ntry: optx.load('someone/some-model')\nexcept optx.OptxError as e: print(type(e).__name__, e)"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout.startswith("CheckpointError someone/some-model: no such path, and the hub gave no model"), done
    assert len(done.stdout.splitlines()) == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "options, told",
    [
        ({"weights": "dens"}, "weights='dens'; allowed: 'dense', 'packed'"),
        ({"dtype": "int8"}, "dtype='int8'; allowed: float32, bfloat16, float16"),
        ({"weights": "packed"}, "weights='packed' is for GGUF files"),
    ],
)
def test_wrong_options_of_load(options, told, folder):
    with pytest.raises(CheckpointError) as error:
        optx.load(folder, **options)
    assert told in str(error.value)


def test_a_safetensors_file_is_not_a_model(folder):
    with pytest.raises(CheckpointError, match="magic: got .*is this a GGUF file"):
        optx.load(folder / "model.safetensors")


# GGUF.


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("tail", [(), (6,), (3, 2)])
def test_permute_and_unpermute_are_inverse(heads, tail, rng):
    data = rng.normal(size=(heads * 8, *tail))
    np.testing.assert_array_equal(unpermute(permute(data, heads), heads), data)
    np.testing.assert_array_equal(permute(unpermute(data, heads), heads), data)
    assert not np.array_equal(permute(data, heads), data)


def test_permute_interleaves_the_halves_of_each_head():
    """convert_hf_to_gguf.py: [heads, 2, H / 2] -> [heads, H / 2, 2]."""
    assert permute(np.arange(8), 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert permute(np.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def encoder(kind):
    return None if kind == "F32" else lambda rows: (kind, families.BLOCK_WRITERS[kind](rows))


def test_a_gguf_equals_its_hf_directory(tmp_path):
    """q and k lie in llama.cpp's rope order in the one and in halves in the other."""
    path, model = families.hf_dir(tmp_path / "hf", "llama", add_bos=False)
    gguf = families.write_llama_gguf(tmp_path / "model.gguf", model)
    one, other = optx.load(path), optx.load(gguf)
    assert ir.describe(one.tree) == ir.describe(other.tree)
    for name, value in weights(one).items():
        np.testing.assert_array_equal(value, weights(other)[name])
    tokens = [families.prompt(9)]
    np.testing.assert_array_equal(optx.compile(one).logits(tokens), optx.compile(other).logits(tokens))
    assert one.tokenizer.encode("ä b") == other.tokenizer.encode("ä b")


@pytest.mark.parametrize("kind, error", [("Q8_0", 0.01), ("Q4_0", 0.12)])
def test_packed_and_dense_loads_agree(kind, error, tmp_path):
    model = families.concrete("llama", num_hidden_layers=1)
    path = families.write_llama_gguf(tmp_path / "m.gguf", model, encoder(kind), num_hidden_layers=1)
    dense, packed = optx.load(path), optx.load(path, weights="packed")
    matrices = [name for name, v in ir.params(packed.tree).items() if ir.tensor_text(v.get_value()).startswith("q")]
    assert len(matrices) == 7 + 2 and "embed/table" in matrices
    assert ir.weight_bytes(packed.tree) < 1.1 * path.stat().st_size < ir.weight_bytes(dense.tree)
    tokens = families.prompt(9)
    a, b = (optx.compile(source).logits([tokens])[0] for source in (dense, packed))
    assert families.relative(a, b) < 1e-5
    assert families.relative(a, families.oracle(dense.load(), tokens)) < 1e-5
    loaded, decoded = packed.load(), weights(dense)
    for name in matrices:
        np.testing.assert_array_equal(ir.get(loaded, name).get_value().dequantize(), decoded[name])
        assert 0 < families.relative(decoded[name], families.parameters(model)[name]) < error, name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_a_packed_scale_that_is_no_number(kind, form, tmp_path):
    model = families.concrete("llama", num_hidden_layers=1)

    def encode(rows):
        name, data = encoder(kind)(rows)
        if rows.shape == (64, 32):
            data[5, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
        return name, data

    source = optx.load(families.write_llama_gguf(tmp_path / "m.gguf", model, encode, num_hidden_layers=1), weights=form)
    with pytest.raises(
        CheckpointError, match=rf"blk.0.ffn_(gate|up).weight {kind.lower()}\[64, 32\]: 32 values are NaN"
    ):
        optx.compile(source)


@pytest.mark.parametrize(
    "metadata, told",
    [
        ({"general.architecture": "lama"}, "m.gguf: architecture 'lama' is not supported; did you mean 'llama'?"),
        ({"general.architecture": ["llama"]}, "architecture ['llama'] is not supported"),
        ({"llama.expert_count": 8}, "m.gguf: llama.expert_count = 8 is not handled; known: llama."),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4; supported: the head size, 8"),
        ({"llama.attention.head_count": [4]}, "'num_attention_heads' is [4]; allowed: int"),
        ({"llama.attention.head_count": 0}, "'num_attention_heads' is 0; allowed: 1 to"),
        ({"llama.rope.dimension_count": 8, "llama.attention.head_count": "4"}, "is '4'; allowed: int"),
        ({"llama.rope.dimension_count": 8, "llama.attention.head_count": 0}, "is 0; allowed: 1 to"),
        ({"llama.block_count": 4_000_000_000}, "'num_hidden_layers' is 4000000000; allowed: 1 to 4096"),
        ({"llama.block_count": 2}, "m.gguf: the tensors do not fit the config. missing: blk.1.attn_norm.weight"),
        ({"llama.feed_forward_length": 96}, "wrong shape: blk.0.ffn_gate.weight"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "'rms_norm_eps' is nan"),
    ],
    ids=str,
)
def test_a_gguf_header_that_is_not_understood(metadata, told, tmp_path):
    model = families.concrete("llama", num_hidden_layers=1)
    path = families.write_llama_gguf(tmp_path / "m.gguf", model, metadata=metadata, num_hidden_layers=1)
    with pytest.raises(OptxError) as error:
        optx.load(path)
    assert told in str(error.value)


def test_a_gguf_that_lost_its_end_is_refused(tmp_path):
    model = families.concrete("llama", num_hidden_layers=1)
    path = families.write_llama_gguf(tmp_path / "m.gguf", model, num_hidden_layers=1)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="m.gguf: "):
        optx.load(path)
