"""Exports: a compiled model comes back bit for bit, whole or not at all, and a changed one is refused."""

import functools
import json
import shutil

import families
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_gguf import random_blocks

import optx
from optx import ir
from optx.checkpoint import export as exports
from optx.errors import CheckpointError, OptxError, PassError
from optx.formats import GGML, NAMES
from optx.ggml import BLOCKS
from optx.passes.fuse_projections import FuseProjections
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.sliding_window import SlidingWindow
from optx.recipe import Recipe
from optx.tensor import is_qtensor

GREEDY = optx.Sampling(max_tokens=4, ignore_eos=True)
WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "num_hidden_layers": 1}  # K-quants: blocks of 256


def gguf(path, kind, rng):
    """A llama whose matrices are all of one block type, of random blocks with small scales."""
    changes = WIDE if BLOCKS[kind].elements == 256 else {"num_hidden_layers": 1}
    model = families.concrete("llama", **changes)

    def encode(rows):
        block = BLOCKS[kind]
        data = random_blocks(kind, rng, rows.shape[0], rows.shape[1] // block.elements)
        for at in block.halves:
            half = rng.uniform(-0.01, 0.01, data.shape[:-1]).astype(np.float16)
            data[..., at : at + 2] = half[..., None].view(np.uint8)
        if kind == "MXFP4":
            data[..., 0] = 125
        return kind, data.reshape(rows.shape[0], -1)

    return optx.load(families.write_llama_gguf(path, model, encode, **changes), weights="packed")


def arrays(compiled) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in exports.flatten(compiled.tree).items()}


def assert_same(compiled, folder, logits=True):
    """What `folder` holds is the compiled model: the tree, every array, logits and answers."""
    source = optx.load(folder)
    again = optx.compile(source)
    assert ir.describe(again.tree) == ir.describe(compiled.tree)
    old, new = arrays(compiled), arrays(again)
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert new[name].dtype == value.dtype
        np.testing.assert_array_equal(new[name].view(np.uint8), value.view(np.uint8), err_msg=name)
    if logits:
        tokens = [families.prompt(7)]
        want = np.asarray(compiled.logits(tokens))
        assert np.isfinite(want).all()
        np.testing.assert_array_equal(again.logits(tokens), want)
    return again


@pytest.mark.parametrize(
    "options",
    [
        *({"format": name} for name in NAMES),
        *({"format": name, "group": 8, "symmetric": False} for name in NAMES if name.startswith("int")),
        {"format": "fp8_e4m3", "group": 16},
    ],
    ids=str,
)
def test_every_format_of_ours(options, tmp_path):
    path, _ = families.hf_dir(tmp_path / "hf", "llama", num_hidden_layers=1)
    compiled = optx.compile(path, Recipe(name="r", weights=[QuantizeWeights(**options)]))
    assert compiled.export(tmp_path / "out") == tmp_path / "out"
    whole = options.get("group") == 8 and options["format"] == "int3"  # one of them also runs; the others are data
    assert_same(compiled, tmp_path / "out", logits=whole)


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_block_type_of_gguf(kind, tmp_path, rng):
    compiled = optx.compile(gguf(tmp_path / "m.gguf", kind, rng))
    packed = [v.get_value() for v in ir.params(compiled.tree).values() if is_qtensor(v.get_value())]
    assert {str(value.format) for value in packed} == {str(GGML(block=kind))}
    optx.export(compiled, tmp_path / "out")
    (tmp_path / "m.gguf").unlink()
    again = assert_same(compiled, tmp_path / "out", logits=kind in ("Q4_1", "Q4_K"))
    assert again.plan.source.origin.formats and again.tokenizer.eos_ids == compiled.tokenizer.eos_ids


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_whole_recipe_comes_back(family, tmp_path):
    path, _ = families.hf_dir(
        tmp_path / "hf", family, add_bos=True, **({} if family == "gemma3" else {"num_hidden_layers": 1})
    )
    recipe = Recipe(
        name="all",
        attention=[SlidingWindow(window=5, sinks=1, layers=(-1,))],
        weights=[QuantizeWeights(match="layers/.*", format="int4", group=8)],
        cache=[QuantizeKV()],
        lower=[FuseProjections()],
    )
    compiled = optx.compile(path, recipe)
    compiled.export(tmp_path / "out")
    shutil.rmtree(path)
    again = assert_same(compiled, tmp_path / "out", logits=False)
    assert again.plan.source.recipe == recipe and again.report.recipe == "all"
    if family == "qwen3":  # equal trees of equal arrays answer alike; once it is seen
        assert again.generate("wide open", GREEDY) == compiled.generate("wide open", GREEDY)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, tmp_path):
    path, _ = families.hf_dir(tmp_path / "hf", "qwen3", num_hidden_layers=1)
    compiled = optx.compile(optx.load(path, dtype=dtype), Recipe(weights=[QuantizeWeights(format="int8")]))
    compiled.export(tmp_path / "out")
    again = assert_same(compiled, tmp_path / "out", logits=False)
    assert again.tree.layers[0].mixer.cache.dtype == dtype


def test_an_export_of_an_export_is_equal(tmp_path, exported):
    again = optx.compile(exported)
    again.export(tmp_path / "second")
    assert_same(again, tmp_path / "second", logits=False)
    first, second = (json.loads((folder / "manifest.json").read_text()) for folder in (exported, tmp_path / "second"))
    for key in ("version", "origin", "recipe", "parameters"):
        assert first[key] == second[key]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    path, _ = families.hf_dir(tmp_path_factory.mktemp("models") / "tiny", "llama", num_hidden_layers=1, add_bos=True)
    return optx.compile(path, Recipe(name="r", weights=[QuantizeWeights(format="int4", group=8)], cache=[QuantizeKV()]))


@pytest.fixture(scope="module")
def pristine(compiled, tmp_path_factory):
    return compiled.export(tmp_path_factory.mktemp("exports") / "out")


@pytest.fixture
def exported(pristine, tmp_path):
    """An export that a test may damage."""
    return shutil.copytree(pristine, tmp_path / "out")


def test_the_tokenizer_survives(compiled, exported):
    tokenizer = optx.load(exported).tokenizer
    text = "Grüße, 世界 </s>"
    assert (
        tokenizer.encode(text) == compiled.tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    )
    for name in ("bos_id", "eos_ids", "add_bos", "chat_template", "special_tokens", "vocab_size"):
        assert getattr(tokenizer, name) == getattr(compiled.tokenizer, name)


def test_a_model_without_tokenizer(tmp_path):
    path, _ = families.hf_dir(tmp_path / "hf", "llama", num_hidden_layers=1)
    optx.compile(path).export(tmp_path / "out")
    assert optx.load(tmp_path / "out").tokenizer is None


def test_loading_reads_no_weight(exported):
    shutil.rmtree(exported / "weights")
    source = optx.load(exported)
    assert optx.plan(source).tree and ir.is_abstract(source.tree)
    with pytest.raises(CheckpointError, match="weights: damaged.*missing: "):
        optx.compile(source)


def test_an_export_takes_no_second_recipe(exported):
    with pytest.raises(
        PassError, match="out was compiled with recipe 'r' already|was compiled with recipe 'r' already"
    ):
        optx.plan(exported, Recipe(cache=[QuantizeKV()]))


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"weights": "packed"}], ids=str)
def test_an_export_is_what_it_is(options, exported):
    with pytest.raises(CheckpointError):
        optx.load(exported, **options)


def test_a_module_has_no_config_to_export(tmp_path):
    compiled = optx.compile(families.concrete("llama", num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="a module built in memory has no config to rebuild it from"):
        compiled.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Whole or not at all.


class Boom(RuntimeError):
    pass


def boom(*args, **kwargs):
    raise Boom("no")


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


FAILURES = {
    "saving": (ocp.StandardCheckpointer, "save"),
    "describing": (exports.ir, "describe"),
    "tokenizer": (optx.api.Tokenizer, "save"),
    "hashing": (exports, "_digests"),
}


@pytest.mark.parametrize("place", FAILURES)
@pytest.mark.parametrize("failure, error", [(boom, Boom), (full_disk, CheckpointError)], ids=["bug", "full disk"])
@pytest.mark.parametrize("before", ["nothing", "empty folder", "old export"])
def test_a_failure_in_the_middle_leaves_what_was_there(
    place, failure, error, before, compiled, pristine, tmp_path, monkeypatch
):
    out = tmp_path / "somewhere" / "out"
    out.parent.mkdir()
    if before == "empty folder":
        out.mkdir()
    if before == "old export":
        shutil.copytree(pristine, out)
    old = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    monkeypatch.setattr(*FAILURES[place], failure)
    with pytest.raises(error) as caught:
        compiled.export(out, overwrite=before == "old export")
    if error is CheckpointError:
        assert str(caught.value) == f"{out}: cannot be written: No space left on device"
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == old


def test_a_rename_that_fails_brings_the_old_folder_back(compiled, pristine, tmp_path, monkeypatch):
    out = shutil.copytree(pristine, tmp_path / "out")
    rename = type(out).rename

    def fails_second(self, target):
        if ".partial-" in self.name and not self.name.endswith("-old"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(out), "rename", fails_second)
    with pytest.raises(CheckpointError, match="out: cannot be written: Input/output error"):
        compiled.export(out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same(compiled, out, logits=False)


def test_an_occupied_folder_is_refused(compiled, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("the only copy")
    with pytest.raises(CheckpointError, match="out: exists and is not empty; choose another folder, or overwrite"):
        compiled.export(out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    compiled.export(out, overwrite=True)
    assert not (out / "thesis.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"
    assert_same(compiled, out, logits=False)


def test_an_empty_folder_is_taken_and_a_file_is_not(compiled, tmp_path):
    (tmp_path / "empty").mkdir()
    compiled.export(tmp_path / "empty")
    assert exports.is_export(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file: exists"):
        compiled.export(tmp_path / "file")
    with pytest.raises(CheckpointError, match="below: cannot be written: "):
        compiled.export(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "x"


def test_an_unknown_format(compiled, tmp_path):
    with pytest.raises(CheckpointError, match=r"export format 'optx2' is not supported; did you mean 'optx'\?"):
        optx.export(compiled, tmp_path / "out", format="optx2")


# Tampering.


def edit(change):
    def tamper(folder):
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(change(manifest) or manifest))

    return tamper


def without(*keys):
    """The manifest without what stands at `keys`."""

    def change(manifest):
        *parents, last = keys
        functools.reduce(dict.__getitem__, parents, manifest).pop(last)

    return edit(change)


def largest(folder):
    return max(
        (path for path in (folder / "weights").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def flip(folder):
    data = bytearray(largest(folder).read_bytes())
    data[len(data) // 2] ^= 1
    largest(folder).write_bytes(data)


def other_weights(folder):
    """A whole orbax checkpoint of the same arrays with other numbers."""
    with ocp.StandardCheckpointer() as checkpointer:
        old = checkpointer.restore((folder / "weights").resolve())
    shutil.rmtree(folder / "weights")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "weights", jax.tree.map(lambda x: x + 1, old))


def text(name, old, new):
    def tamper(folder):
        content = (folder / name).read_text()
        assert old in content
        (folder / name).write_text(content.replace(old, new))

    return tamper


TABLE = "embed/table"
TAMPERED = {
    "one bit of the weights": (flip, "weights: damaged, by the hashes of manifest.json: changed: "),
    "half a file of weights": (
        lambda folder: largest(folder).write_bytes(largest(folder).read_bytes()[:99]),
        "weights: damaged, by the hashes of manifest.json: changed: ",
    ),
    "a file of weights gone": (
        lambda folder: largest(folder).unlink(),
        "weights: damaged, by the hashes of manifest.json: m",
    ),
    "a file more": (lambda folder: (folder / "weights" / "x").write_text(""), "manifest.json: left over: x"),
    "weights of another model": (other_weights, "weights: damaged, by the hashes of manifest.json: "),
    "no weights": (lambda folder: shutil.rmtree(folder / "weights"), "hashes of manifest.json: missing: "),
    "a hash": (edit(lambda m: m["sha256"].update(_METADATA="0" * 64)), "hashes of manifest.json: changed: _METADATA"),
    "the printed tree": (
        text("ir.txt", "int4_g8", "int2_g8"),
        "ir.txt: this optx builds another tree from the export's config and recipe; stored 'q: Linear int2_g8[32, 32]",
    ),
    "a shorter tree": (lambda folder: (folder / "ir.txt").write_text(""), "ir.txt: this optx builds another tree"),
    "no tree": (lambda folder: (folder / "ir.txt").unlink(), "ir.txt: cannot be read: "),
    "a tree that is no text": (lambda folder: (folder / "ir.txt").write_bytes(b"\xff"), "ir.txt: cannot be read: "),
    "the recipe's group": (
        edit(lambda m: m["recipe"]["weights"][0].update(group=16)),
        "ir.txt: this optx builds another tree",
    ),
    "the recipe's pass": (
        edit(lambda m: m["recipe"]["weights"][0].update({"pass": "quantize"})),
        "no pass is called 'quantize'",
    ),
    "the recipe": (edit(lambda m: m.update(recipe=[])), "recipe: got list; allowed: a mapping"),
    "the config": (
        edit(lambda m: m["origin"]["config"].update(intermediate_size=128)),
        "ir.txt: this optx builds another",
    ),
    "the config's type": (
        edit(lambda m: m["origin"]["config"].update(model_type="bert")),
        "model_type 'bert' is not supported",
    ),
    "a config of another type": (edit(lambda m: m["origin"].update(config=3)), "manifest.json: not a whole manifest"),
    "the dtype": (edit(lambda m: m["origin"].update(dtype="int7")), "manifest.json: not a whole manifest"),
    "no dtype": (edit(lambda m: m["origin"].update(dtype=None)), "manifest.json: not a whole manifest"),
    "formats": (edit(lambda m: m["origin"].update(formats={"embed/tabel": "q4_0"})), "did you mean 'embed/table'?"),
    "an unknown format": (edit(lambda m: m["origin"].update(formats={TABLE: "q9_0"})), "format 'q9_0' is not known"),
    "formats as a list": (edit(lambda m: m["origin"].update(formats=[TABLE])), "manifest.json: not a whole manifest"),
    "another dense format": (
        edit(lambda m: m["origin"].update(formats={TABLE: "q4_0"})),
        "ir.txt: this optx builds another",
    ),
    "a parameter's shape": (
        edit(lambda m: m["parameters"][TABLE].update(shape=[8, 4])),
        "manifest.json: parameters do not fit the tree: embed/table",
    ),
    "a parameter's dtype": (
        edit(lambda m: m["parameters"][TABLE].update(dtype="float16")),
        "manifest.json: parameters do not fit the tree: embed/table",
    ),
    "a parameter gone": (without("parameters", TABLE), "do not fit the tree: embed/table"),
    "a parameter more": (
        edit(lambda m: m["parameters"].update(x={"shape": [1], "dtype": "int8"})),
        "manifest.json: parameters do not fit the tree: x",
    ),
    "a shape of words": (
        edit(lambda m: m["parameters"][TABLE].update(shape=["a"])),
        "manifest.json: not a whole manifest",
    ),
    "a later version": (
        edit(lambda m: m.update(version=2)),
        "manifest.json: export version 2; this optx reads version 1",
    ),
    "no version": (without("version"), "manifest.json: export version None"),
    "a list": (edit(lambda m: [1]), "manifest.json: export version 'list'"),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: not JSON"),
    **{
        f"no {key}": (without(key), "manifest.json: not a whole manifest")
        for key in ("origin", "recipe", "parameters", "sha256")
    },
    "an origin with more in it": (edit(lambda m: m["origin"].update(more=1)), "manifest.json: not a whole manifest"),
    "the tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json: not a tokenizer"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampering_is_detected(case, exported):
    tamper, told = TAMPERED[case]
    tamper(exported)
    with pytest.raises(OptxError) as error:
        optx.load(exported).load()
    assert told in str(error.value)


def test_a_recipes_name_is_not_its_content(exported):
    edit(lambda m: m["recipe"].update(name="renamed", description="said better"))(exported)
    assert optx.load(exported).recipe.name == "renamed"
