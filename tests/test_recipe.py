"""Recipes: YAML and back, Python-built ones, and an error for every way to get one wrong."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

import optx.configs
from optx import passes, registry, strict
from optx.errors import OptxError, RecipeError
from optx.passes.fuse_projections import FuseProjections
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.sliding_window import SlidingWindow
from optx.recipe import Recipe, find_yaml
from optx.registry import PassOptions, Stage

SHIPPED = sorted(Path(next(iter(optx.configs.__path__))).glob("*.yaml"))

FULL = Recipe(
    name="full",
    description="everything that a recipe can say",
    attention=(SlidingWindow(match="layers/0/.*", window=8, sinks=0, layers=(0, -1)),),
    weights=(
        QuantizeWeights(match=".*/down", format="int8"),
        QuantizeWeights(format="int4", group=16, symmetric=False, requantize=True),
    ),
    cache=(QuantizeKV(format="int4", symmetric=False),),
    lower=(FuseProjections(),),
    allow=("k_bias_low_bit_kv",),
    allow_overlap=True,
    require="xla",
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_survive_yaml(path, tmp_path):
    recipe = Recipe.from_yaml(path)
    assert recipe.name == path.stem and recipe.description and recipe.steps()
    (tmp_path / "copy.yaml").write_text(recipe.to_yaml())
    assert Recipe.from_yaml(tmp_path / "copy.yaml") == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_python_recipe_survives_yaml(tmp_path):
    (tmp_path / "full.yaml").write_text(FULL.to_yaml())
    assert Recipe.from_yaml(tmp_path / "full.yaml") == FULL
    assert hash(Recipe.from_yaml(tmp_path / "full.yaml")) == hash(FULL)


def test_defaults_stay_out_of_yaml():
    assert Recipe(name="x", lower=[FuseProjections()]).to_dict() == {
        "name": "x",
        "lower": [{"pass": "fuse_projections"}],
    }
    assert Recipe(cache=[QuantizeKV()]).to_dict() == {"cache": [{"pass": "quantize_kv"}]}


@pytest.mark.parametrize("text, name", [("", "mine"), ("name: other\n", "other"), ("allow_overlap: true\n", "mine")])
def test_a_recipe_is_named_after_its_file_unless_it_says_otherwise(tmp_path, text, name):
    (tmp_path / "mine.yaml").write_text(text)
    assert Recipe.from_yaml(tmp_path / "mine.yaml").name == name


@pytest.mark.parametrize("name", ["int4_kv8", "int4_kv8.yaml", "configs/int4_kv8.yaml"])
def test_shipped_recipes_are_found_by_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_yaml(name) in SHIPPED
    (tmp_path / "int4_kv8.yaml").write_text("name: mine\n")
    mine = Recipe.from_yaml("int4_kv8.yaml").name
    assert mine == "mine", "a file at the path itself comes first"


def test_stages_run_in_order_whatever_the_order_of_writing():
    recipe = Recipe.from_dict(
        {
            "lower": [{"pass": "fuse_projections"}],
            "cache": [{"pass": "quantize_kv"}],
            "weights": [{"pass": "quantize_weights", "format": "int8"}],
            "attention": [{"pass": "sliding_window", "window": 4}],
        }
    )
    assert [pass_.name for pass_, _ in recipe.steps()] == [
        "sliding_window",
        "quantize_weights",
        "quantize_kv",
        "fuse_projections",
    ]


def test_rules_of_one_pass_form_one_step_with_their_places():
    ((pass_, rules),) = Recipe(weights=FULL.weights).steps()
    assert pass_.name == "quantize_weights"
    assert [where for where, _ in rules] == ["recipe.weights[0]", "recipe.weights[1]"]
    assert tuple(options for _, options in rules) == FULL.weights


def test_the_table_of_contents_lists_every_pass_in_stage_order():
    ours = [pass_ for pass_ in registry.PASSES.values() if pass_.apply.__module__.startswith("optx.passes.")]
    listed = [module.__name__ for module in passes.ORDER]
    assert sorted(pass_.apply.__module__ for pass_ in ours) == sorted(listed)
    stages = [list(Stage).index(pass_.stage) for name in listed for pass_ in ours if pass_.apply.__module__ == name]
    assert stages == sorted(stages)
    for pass_ in ours:
        assert pass_.doc, f"{pass_.name} says what it does"
        assert dataclasses.is_dataclass(pass_.options) and pass_.options.__dataclass_params__.frozen


QW = "quantize_weights, format: int8"
BAD = {
    "unknown stage": ("wieghts: []", "recipe.wieghts: unknown field of Recipe; did you mean 'weights'?"),
    "unknown field": (
        "weights: [{pass: quantize_weights, format: int4, gruop: 64}]",
        "recipe.weights[0].gruop: unknown field of QuantizeWeights; did you mean 'group'?",
    ),
    "far from any field": (
        "lower: [{pass: fuse_projections, zzz: 1}]",
        "recipe.lower[0].zzz: unknown field of FuseProjections; allowed: match",
    ),
    "unknown pass": (
        "cache: [{pass: quantise_kv}]",
        "recipe.cache[0].pass: no pass is called 'quantise_kv'; did you mean 'quantize_kv'?",
    ),
    "pass that is no name": ("cache: [{pass: [quantize_kv]}]", "recipe.cache[0].pass: no pass is called"),
    "pass as a key": (
        "quantize_kv: {format: int8}",
        "recipe.quantize_kv: is a pass; list it under 'cache:' as '- pass: quantize_kv'",
    ),
    "wrong stage": (
        f"cache: [{{pass: fuse_projections}}, {{pass: {QW}}}]",
        "recipe.cache[0]: fuse_projections runs in stage 'lower', not 'cache'; list it under 'lower:'",
    ),
    "wrong stage further on": (
        f"cache: [{{pass: quantize_kv}}, {{pass: {QW}}}]",
        "recipe.cache[1]: quantize_weights runs in stage 'weights', not 'cache'; list it under 'weights:'",
    ),
    "wrong value": (
        "weights: [{pass: quantize_weights, format: int5}]",
        "recipe.weights[0].format: got 'int5'; did you mean 'int",
    ),
    "value far from any": (
        "cache: [{pass: quantize_kv, format: zzz}]",
        "recipe.cache[0].format: got 'zzz'; allowed: fp8_e4m3, fp8_e5m2, int2, int3, int4, int8",
    ),
    "missing value": (
        "weights: [{pass: quantize_weights}]",
        "recipe.weights[0]: missing field 'format' of QuantizeWeights",
    ),
    "text for a number": (
        "attention: [{pass: sliding_window, window: wide}]",
        "recipe.attention[0].window: got 'wide' (str); allowed: int",
    ),
    "number for a list": (
        "attention: [{pass: sliding_window, window: 4, layers: 3}]",
        "recipe.attention[0].layers: got 3; allowed: a list",
    ),
    "text in a list of numbers": (
        "attention: [{pass: sliding_window, window: 4, layers: [0, a]}]",
        "recipe.attention[0].layers[1]: got 'a' (str); allowed: int",
    ),
    "stage is no list": (f"weights: {{pass: {QW}}}", "recipe.weights: got {'pass'"),
    "stage is empty": ("weights:", "recipe.weights: got None; allowed: a list of passes"),
    "rule is no mapping": (
        "weights: [quantize_weights]",
        "recipe.weights[0]: got 'quantize_weights'; allowed: a mapping",
    ),
    "rule without pass": ("weights: [{format: int8}]", "recipe.weights[0]: got {'format': 'int8'}; allowed: a mapping"),
    "recipe is a list": ("- pass: quantize_kv", "recipe: got list; allowed: a mapping of stages"),
    "recipe is text": ("int4", "recipe: got str; allowed: a mapping of stages"),
    "name is a number": ("name: 4", "recipe.name: got 4 (int); allowed: str"),
    "flag is text": ("allow_overlap: 'no'", "recipe.allow_overlap: got 'no' (str); allowed: bool"),
    "allow is text": ("allow: gqa", "recipe.allow: got 'gqa'; allowed: a list"),
    "key twice": (
        "cache: [{pass: quantize_kv}]\ncache: []",
        "key 'cache' twice",
    ),
    "not yaml": ("weights: [", "bad.yaml: not YAML: "),
    "a tag that builds objects": ("name: !!python/object/apply:os.getcwd []", "bad.yaml: not YAML: "),
    "a number as key": ("1: 2", "recipe.1: unknown field of Recipe"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_recipe_is_told_where_and_what(case, tmp_path):
    text, told = BAD[case]
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        Recipe.from_yaml(tmp_path / "bad.yaml")
    assert told in str(error.value)


def test_yaml_anchors_work(tmp_path):
    (tmp_path / "anchors.yaml").write_text(
        "weights:\n- &base {pass: quantize_weights, format: int4, group: 8, match: a}\n- {<<: *base, match: b}\n"
    )
    first, second = Recipe.from_yaml(tmp_path / "anchors.yaml").weights
    assert second == dataclasses.replace(first, match="b")


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match="bad.yaml: not YAML"):
        Recipe.from_yaml(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    "path, told",
    [
        ("int4_kv9.yaml", "int4_kv9.yaml: no such recipe file; did you mean 'int4_kv8'?"),
        ("configs/slidng.yaml", "configs/slidng.yaml: no such recipe file; did you mean 'sliding'?"),
        (
            "zzz",
            "zzz: no such recipe file; allowed: " + ", ".join(path.stem for path in SHIPPED),
        ),
        ("elsewhere/deep/int4_kv8.yaml", "elsewhere/deep/int4_kv8.yaml: no such recipe file; did you mean 'int4_kv8'?"),
    ],
)
def test_a_missing_file_names_the_nearest_shipped(path, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as error:
        Recipe.from_yaml(path)
    assert str(error.value) == told


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe file"):
        Recipe.from_yaml(tmp_path)


def test_python_recipes_are_checked_like_yaml():
    with pytest.raises(RecipeError, match=r"recipe.weights\[0\]: quantize_kv runs in stage 'cache'"):
        Recipe(weights=[QuantizeKV()])

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Stranger(PassOptions):
        pass

    with pytest.raises(RecipeError, match=r"recipe.lower\[0\]: Stranger belongs to no registered pass"):
        Recipe(lower=[Stranger()])
    with pytest.raises(TypeError):
        Recipe(wieghts=[])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    note: str = "none"


@pytest.mark.parametrize(
    "value, hint, want",
    [
        (3, int, 3),
        (3, float, 3.0),
        (2.5, float, 2.5),
        ("x", str, "x"),
        (True, bool, True),
        (None, int | None, None),
        (3, int | None, 3),
        ("b", Literal["a", "b"], "b"),
        ([1, 2], tuple[int, ...], (1, 2)),
        ((), tuple[str, ...], ()),
        ({"size": 1}, Inner, Inner(size=1)),
        ([{"size": 1, "note": "n"}], tuple[Inner, ...], (Inner(size=1, note="n"),)),
        ("auto", int | str, "auto"),
        (None, None | tuple[int, ...], None),
    ],
)
def test_strict_convert(value, hint, want):
    got = strict.convert(value, hint, "here")
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize(
    "value, hint, told",
    [
        (True, int, "here: got True (bool); allowed: int"),
        (True, float, "here: got True (bool); allowed: float"),
        (1, bool, "here: got 1 (int); allowed: bool"),
        (2.5, int, "here: got 2.5 (float); allowed: int"),
        ("3", int, "here: got '3' (str); allowed: int"),
        (None, int, "here: got None (NoneType); allowed: int"),
        (3, str, "here: got 3 (int); allowed: str"),
        ("3", int | None, "here: got '3' (str); allowed: int"),
        ("c", Literal["a", "b"], "here: got 'c'; allowed: a, b"),
        (["a"], Literal["a", "b"], "here: got ['a']"),
        ("ab", tuple[str, ...], "here: got 'ab'; allowed: a list"),
        ([1, None], tuple[int, ...], "here[1]: got None (NoneType); allowed: int"),
        ({"size": "x"}, Inner, "here.size: got 'x' (str); allowed: int"),
        ({"sise": 1}, Inner, "here.sise: unknown field of Inner; did you mean 'size'?"),
        ({}, Inner, "here: missing field 'size' of Inner"),
        ([1], Inner, "here: got list; allowed: a mapping with the fields of Inner"),
    ],
)
def test_strict_convert_refuses(value, hint, told):
    with pytest.raises(OptxError) as error:
        strict.convert(value, hint, "here")
    assert told in str(error.value)
