"""Dense Hugging Face checkpoints: the same numbers under the family's names, whatever form the model was in."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import optx
from optx import ir, tensor
from optx.checkpoint.export_hf import write_hf
from optx.checkpoint.hf import INDEX
from optx.errors import CheckpointError
from optx.models import by_hf_type

FUSED = {"lower": [{"pass": "fuse_projections"}]}
INT4 = {"weights": [{"pass": "quantize_weights", "format": "int4", "group": 32}], "cache": [{"pass": "quantize_kv"}]}
SLIDING = {"attention": [{"pass": "sliding_window", "window": 16, "layers": [1]}]}
QWEN = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
GEMMA = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "head_dim": 16,
    "num_hidden_layers": 3,
    "sliding_window": 8,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 16,
    "tie_word_embeddings": True,
}
TOKENS = np.arange(24, dtype=np.int32)[None] % 11


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def compiled(source, recipe):
    return optx.compile(source, optx.Recipe.from_dict(recipe))


def numbers(source) -> dict[str, np.ndarray]:
    """Every parameter as dense float32."""
    loaded = ir.params(source.load() if not isinstance(source, optx.Compiled) else source.tree)
    return {path: np.asarray(tensor.dense(v.get_value()), np.float32) for path, v in loaded.items()}


def same(left: dict, right: dict):
    assert left.keys() == right.keys()
    for path, value in left.items():
        np.testing.assert_array_equal(value, right[path], err_msg=path)


@pytest.mark.parametrize("recipe", [{}, FUSED], ids=["plain", "fused"])
def test_a_dense_model_comes_back_bit_equal(model, tmp_path, recipe):
    before = compiled(model, recipe)
    assert optx.export(before, tmp_path / "hf", format="hf") == tmp_path / "hf"
    again = optx.load(tmp_path / "hf")
    assert again.origin.kind == "hf"
    same(numbers(again), numbers(optx.load(model)))
    np.testing.assert_array_equal(compiled(again, recipe).logits(TOKENS), before.logits(TOKENS))
    original, written = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "hf"))
    assert original.keys() == written.keys()
    assert all(np.array_equal(original[name], written[name]) for name in original)


def test_quantized_weights_come_back_as_what_they_stand_for(model, tmp_path):
    before = compiled(model, INT4 | FUSED)
    before.export(tmp_path / "hf", format="hf")
    again = optx.load(tmp_path / "hf")
    assert "int8" not in str(again) and "f32[64, 64]" in str(again)
    same(numbers(again), numbers(compiled(model, INT4)))
    cache = {"cache": INT4["cache"]}  # of the model's memory, not of its weights: HF files do not say it
    np.testing.assert_allclose(compiled(again, cache).logits(TOKENS), before.logits(TOKENS), rtol=2e-4, atol=2e-4)


def test_an_optx_export_is_written_without_compiling_it_again(model, tmp_path):
    compiled(model, INT4 | FUSED).export(tmp_path / "optx")
    optx.export(optx.load(tmp_path / "optx"), tmp_path / "hf", format="hf")
    same(numbers(optx.load(tmp_path / "hf")), numbers(compiled(model, INT4)))


@pytest.mark.parametrize("changes", [QWEN, GEMMA], ids=["qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family(tmp_path, changes, dtype):
    config = tiny.CONFIG | {"vocab_size": 313} | changes
    family = by_hf_type(config["model_type"], "test")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ir.init_weights(optx.load_config(tmp_path / "config.json", dtype).tree)
    values = {path: v.get_value() for path, v in ir.params(model).items()}
    source = _with_weights(optx.load_config(tmp_path / "config.json", dtype), values)
    optx.export(optx.compile(source, optx.Recipe.from_dict(FUSED)), tmp_path / "hf", format="hf")
    again = optx.load(tmp_path / "hf")
    assert again.origin.dtype == dtype
    assert ir.describe(again.tree) == ir.describe(source.tree)
    same(numbers(again), {path: np.asarray(value, np.float32) for path, value in values.items()})
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["architectures"] == [family.HF_TYPES[config["model_type"]]]


def _with_weights(source, values):
    return dataclasses.replace(source, read=values.__getitem__)


def test_the_config_is_one_that_transformers_reads(model, tmp_path):
    optx.export(optx.load(model, dtype="bfloat16"), tmp_path / "hf", format="hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    original = json.loads((model / "config.json").read_text())
    assert config == original | {"torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1}
    assert load_file(tmp_path / "hf" / "model.safetensors")["model.norm.weight"].dtype == jnp.bfloat16
    before, after = optx.load(model).tokenizer, optx.load(tmp_path / "hf").tokenizer
    assert before.encode("a quick fox") == after.encode("a quick fox")
    assert (before.eos_ids, before.chat_template) == (after.eos_ids, after.chat_template)


def test_a_gguf_header_becomes_a_config(smollm2_path, tmp_path):
    source = optx.load(smollm2_path, weights="packed")
    optx.export(source, tmp_path / "hf", format="hf")
    again, dense = optx.load(tmp_path / "hf"), optx.load(smollm2_path)
    assert again.origin.config["architectures"] == ["LlamaForCausalLM"]
    assert ir.describe(again.tree) == ir.describe(dense.tree)
    for prefix in ("embed", "layers/7", "norm"):  # the q and k rows of a GGUF stand in another order
        for path, value in ir.params(again.block(prefix)).items():
            np.testing.assert_array_equal(value.get_value(), ir.get(dense.block(prefix), path).get_value())
    assert again.tokenizer.eos_ids == dense.tokenizer.eos_ids


def test_shards_with_an_index(model, tmp_path):
    source = optx.load(model)
    write_hf(source, tmp_path / "hf", by_hf_type, shard=100_000)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == ir.weight_bytes(source.tree)
    for name in files:
        tensors = load_file(tmp_path / "hf" / name)
        assert {name for name, file in index["weight_map"].items() if file == name} <= tensors.keys()
        assert sum(array.nbytes for array in tensors.values()) <= 100_000
    same(numbers(optx.load(tmp_path / "hf")), numbers(source))


def test_what_the_config_cannot_express_is_refused(model, tmp_path):
    sliding = compiled(model, SLIDING)
    with pytest.raises(
        CheckpointError, match=r"cannot express what the recipe changed at layers/1/mixer: .* became .*window 16"
    ):
        sliding.export(tmp_path / "hf", format="hf")
    with pytest.raises(CheckpointError, match="a module built in memory has no config"):
        optx.export(optx.compile(optx.load(model).load()), tmp_path / "hf", format="hf")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_nothing(model, tmp_path):
    source = optx.load(model)

    def read(path):
        if path.startswith("norm"):
            raise CheckpointError("the disk is gone")
        return source.read(path)

    with pytest.raises(CheckpointError, match="the disk is gone"):
        optx.export(dataclasses.replace(source, read=read), tmp_path / "hf", format="hf")
    assert list(tmp_path.iterdir()) == []


def test_folders_and_formats(model, tmp_path):
    source = optx.load(model)
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        optx.export(source, tmp_path, format="hf")
    optx.export(source, tmp_path, format="hf", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with pytest.raises(CheckpointError, match="did you mean 'hf'?"):
        optx.export(source, tmp_path / "x", format="hff")
    with pytest.raises(CheckpointError, match="compile it before an optx export"):
        optx.export(source, tmp_path / "x")


@pytest.mark.parametrize(
    "changes", [{}, QWEN, {"attention_bias": True, "mlp_bias": True}], ids=["llama", "qwen3", "biases"]
)
@pytest.mark.parametrize("recipe", [FUSED, INT4 | FUSED], ids=["dense", "int4"])
def test_unfused_is_the_inverse_of_fusing(tmp_path, changes, recipe):
    """On shapes and on arrays, printed and by signature."""
    config = tiny.CONFIG | {"vocab_size": 313} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = optx.load_config(tmp_path / "config.json")
    unfused_recipe = {stage: rules for stage, rules in recipe.items() if stage != "lower"}
    for tree in (source.tree, ir.init_weights(source.tree)):
        fused = compiled_tree(tree, recipe)
        want = compiled_tree(tree, unfused_recipe)
        for i in range(2):
            for part in ("mixer", "mlp"):
                got, expected = ir.get(fused, f"layers/{i}/{part}").unfused(), ir.get(want, f"layers/{i}/{part}")
                assert ir.describe(got) == ir.describe(expected)
                if not ir.is_abstract(tree):
                    same(_arrays(got), _arrays(expected))


def compiled_tree(tree, recipe):
    if ir.is_abstract(tree):
        return optx.plan(tree, optx.Recipe.from_dict(recipe)).tree
    return optx.compile(tree, optx.Recipe.from_dict(recipe)).tree


def _arrays(module):
    return {path: np.asarray(tensor.dense(v.get_value())) for path, v in ir.params(module).items()}
