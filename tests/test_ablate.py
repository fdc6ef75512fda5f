"""`optx ablate` on a tiny checkpoint: figures against plain compiles, results kept through kills, expansion, errors."""

import csv
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml

import optx
from optx import ablate, ablate_config, ablate_plot, cli, pipeline
from optx.ablate_config import Ablation, ModelRow
from optx.ablate_table import UNCOMPILED, Outcome, Result, front
from optx.errors import RecipeError
from optx.recipe import Recipe

INT8 = {"pass": "quantize_weights", "match": "layers/.*", "format": "int8"}
INT4 = INT8 | {"format": "int4", "group": 32}
KV8 = {"pass": "quantize_kv", "format": "int8"}
BASE = {"weights": [INT8], "cache": [KV8], "lower": [{"pass": "fuse_projections"}]}
GRID = {"weights.0": {"int8": INT8, "int4": INT4}, "cache.0": {"KV dense": None, "KV int8": KV8}}
REFUSED = {"name": "g48", "weights": [INT8 | {"format": "int4", "group": 48}]}
FILES = {"results", "table.md", "table.csv", "results.json", "pareto.png"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama", num_hidden_layers=1)


@pytest.fixture
def write(model, tmp_path):
    """Writes an ablation file beside a text; fields over those of a small grid, None to leave one out."""

    def call(**fields) -> Path:
        (tmp_path / "fox.txt").write_text(tiny.TEXT, encoding="utf-8")
        plain = {"models": [str(model)], "text": "fox.txt", "context": 64, "max_windows": 2, "base": BASE, "grid": GRID}
        data = {name: value for name, value in (plain | fields).items() if value is not None}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
        return path

    return call


@pytest.fixture
def optx_(capsys):
    """Runs `optx ablate` -> (exit code, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        code = cli.run(["ablate", *(str(a) for a in arguments)])
        return code, *capsys.readouterr()

    return call


def results(out: Path) -> dict[str, dict]:
    return {r["variant"]: r for r in json.loads((out / "results.json").read_text())["results"]}


# A whole run


@pytest.fixture(scope="module")
def ran(model, tmp_path_factory):
    """A grid run once, for the tests that only look at what it wrote."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "fox.txt").write_text(tiny.TEXT, encoding="utf-8")
    data = {"models": [str(model)], "text": "fox.txt", "context": 64, "max_windows": 2, "base": BASE, "grid": GRID}
    (folder / "study.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    assert cli.run(["ablate", str(folder / "study.yaml"), "--out", str(folder / "out")]) == 0
    return folder


def test_quality_is_that_of_a_plain_compile(ran, model):
    """Variants start from the passes that they share, and the reference remembers its logits: neither changes a figure."""
    found = results(ran / "out")
    assert list(found) == [UNCOMPILED, "int8 KV dense", "int8 KV int8", "int4 KV dense", "int4 KV int8"]
    source = optx.load(model)
    dense = optx.compile(source)
    protocol = {"context": 64, "max_windows": 2}
    assert found[UNCOMPILED]["perplexity"] == pytest.approx(dense.evaluate(tiny.TEXT, **protocol).perplexity, rel=1e-6)
    assert (found[UNCOMPILED]["kl"], found[UNCOMPILED]["top1"]) == (0, 1)
    for name in ("int8 KV int8", "int4 KV dense"):
        compiled = optx.compile(source, Recipe.from_dict(found[name]["recipe"]))
        want = compiled.evaluate(tiny.TEXT, **protocol, against=dense)
        for figure in ("perplexity", "kl", "top1", "windows", "tokens"):
            assert found[name][figure] == pytest.approx(getattr(want, figure), rel=1e-5), (name, figure)
    assert 0 < found["int8 KV dense"]["kl"] < found["int4 KV dense"]["kl"]


def test_bytes_are_those_of_the_plan_and_of_plain_arithmetic(ran, model):
    found = results(ran / "out")
    # int4 with a scale of 16 bits for 32 inputs; int8 with one for each of 512 outputs of 64 or 128 inputs
    assert found["int4 KV dense"]["layer_bits"] == pytest.approx(4 + 16 / 32)
    weights = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    assert found["int8 KV dense"]["layer_bits"] == pytest.approx(8 + 16 * 512 / weights)
    assert found[UNCOMPILED]["layer_bits"] == found[UNCOMPILED]["bits"] == 32
    # 2 heads of 16 numbers, K and V, one layer: float32, then int8 with a float16 scale
    assert found["int8 KV dense"]["kv_bytes_per_token"] == 2 * 2 * 16 * 4
    assert found["int8 KV int8"]["kv_bytes_per_token"] == 2 * 2 * (16 + 2)
    for row in found.values():
        plan = optx.plan(optx.load(model), Recipe.from_dict(row["recipe"]), "h100").to_dict(1, 4096)
        assert row["weight_bytes"] == plan["weight_bytes"]
        assert row["bytes_per_token"] == plan["after"]["total"]
        assert row["ms_bound"] == pytest.approx(1e3 * plan["estimate"]["tpot_seconds"])
        count = optx.ir.weight_count(optx.load(model).tree)
        assert row["bits"] == pytest.approx(8 * plan["weight_bytes"] / count)


def test_the_same_rows_in_every_form(ran):
    out = ran / "out"
    assert {path.name for path in out.iterdir()} == FILES
    found = results(out)
    lines = list(csv.DictReader((out / "table.csv").open()))
    assert [line["variant"] for line in lines] == list(found)
    for line, row in zip(lines, found.values()):
        assert float(line["kl"]) == row["kl"] and int(line["weight_bytes"]) == row["weight_bytes"]
        assert bool(int(line["front"])) == row["front"]
    table = [line for line in (out / "table.md").read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[0] for row in cells[2:]] == list(found) and len({len(row) for row in cells}) == 1
    assert [row[0] for row in cells[2:] if row[-1] == "*"] == [name for name, row in found.items() if row["front"]]


def test_stdout_is_a_table_or_the_json(ran, optx_):
    code, shown, err = optx_(ran / "study.yaml", "--out", ran / "out")
    assert code == 0 and shown.startswith("study: tiny-llama\n") and "int4 KV int8" in shown and "front" in shown
    assert "5 of 5 results kept from an earlier run" in err
    code, shown, _ = optx_(ran / "study.yaml", "--out", ran / "out", "--json")
    assert code == 0 and json.loads(shown) == json.loads((ran / "out" / "results.json").read_text())


# Results that are kept


def test_a_second_run_computes_only_what_is_new(write, optx_, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert optx_(write(grid=None, recipes=[{"name": "a", "weights": [INT8]}]), "--out", out)[0] == 0
    first = results(out)
    asked = []
    result = ablate.Workbench.result

    def counted(self, recipe):
        asked.append(recipe.name)
        return result(self, recipe)

    monkeypatch.setattr(ablate.Workbench, "result", counted)
    listed = [{"name": "renamed", "weights": [INT8]}, {"name": "new", "cache": [KV8]}]
    config = write(grid=None, base=None, recipes=listed)
    code, _, err = optx_(config, "--out", out)
    assert code == 0 and asked == ["new"] and "2 of 3 results kept" in err and "[1/1] tiny-llama, new: KL" in err
    assert results(out)["renamed"]["kl"] == first["a"]["kl"], "a name does not decide a result"
    assert optx_(config, "--out", out, "--fresh")[0] == 0
    assert asked == ["new", "new", "renamed"]

    def never(self, *arguments):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ablate.Workbench, "__init__", never)
    assert optx_(config, "--out", out)[0] == 0


@pytest.mark.slow
def test_a_killed_run_goes_on(write, optx_, tmp_path):
    config, out = write(), tmp_path / "out"
    command = [sys.executable, "-m", "optx", "ablate", str(config), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while len(list(out.glob("results/*.json"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait(timeout=60)
    kept = {path: path.read_bytes() for path in out.glob("results/*.json")}
    assert 2 <= len(kept) < 5 and not (out / "table.md").exists()
    code, _, err = optx_(config, "--out", out)
    assert code == 0 and f"{len(kept)} of 5 results kept" in err and f"[1/{5 - len(kept)}]" in err
    assert {path.name for path in out.iterdir()} == FILES and len(results(out)) == 5
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert len(list(out.glob("results/*.json"))) == 5


def test_an_interrupt_between_variants_keeps_those_before(write, optx_, tmp_path, monkeypatch):
    result, done = ablate.Workbench.result, []

    def interrupted(self, recipe):
        if done:
            raise KeyboardInterrupt
        done.append(recipe.name)
        return result(self, recipe)

    config, out = write(), tmp_path / "out"
    monkeypatch.setattr(ablate.Workbench, "result", interrupted)
    code, shown, err = optx_(config, "--out", out)
    assert (code, shown) == (130, "") and err.endswith("interrupted\n")
    assert len(list(out.glob("results/*.json"))) == 2


def test_a_damaged_result_is_computed_again(write, optx_, tmp_path):
    config, out = write(grid=None, leave_one_out=True, base={"weights": [INT8], "cache": [KV8]}), tmp_path / "out"
    assert optx_(config, "--out", out)[0] == 0
    want = results(out)
    whole, empty, *_ = sorted(out.glob("results/*.json"))
    whole.write_text(whole.read_text()[:100])
    empty.write_text("[]")
    code, _, err = optx_(config, "--out", out)
    assert code == 0 and "2 of 4 results kept" in err
    for name, row in results(out).items():
        assert row["kl"] == pytest.approx(want[name]["kl"], rel=1e-5)


def test_whatever_determines_a_result_is_in_its_key(write, model, tmp_path):
    row = ModelRow(model=str(model))
    config = write()
    ablation, folder = ablate_config.read(config)
    study = cli.cli_ablate._study(ablation, folder, None, None)[0]
    recipe, other = study.variants[:2]

    def key(study=study, row=row, recipe=recipe) -> str:
        source = optx.load(row.model, row.weights, row.dtype)
        return ablate.Job(label="", recipe=recipe, inputs=ablate.inputs(study, row, source, recipe)).key

    def changed(**fields) -> str:
        return key(dataclasses.replace(study, **fields))

    plain = key()
    assert plain == key(), "and nothing else"
    assert plain == key(recipe=dataclasses.replace(recipe, name="x", description="y"))
    assert plain == changed(name="x", x="bits", variants=(), calibration="read by no pass")
    keys = [
        plain,
        key(recipe=other),
        key(row=dataclasses.replace(row, dtype="bfloat16")),
        changed(text=study.text + "x"),
        changed(calibration=study.text, measured=True),
        changed(calibration=study.text + "x", measured=True),
        key(recipe=dataclasses.replace(recipe, max_kl=1.0)),
        changed(context=32),
        changed(stride=32),
        changed(max_windows=1),
        changed(decode_context=128),
        changed(target=dataclasses.replace(study.target, bandwidth=1e12)),
    ]
    os.utime(model / "model.safetensors", ns=(0, 1))
    keys.append(key())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optx, "__version__", "9.9.9")
        keys.append(key())
    assert len(set(keys)) == len(keys)


# What is computed once


def test_shared_passes_run_once(model, monkeypatch):
    ran = []
    apply = pipeline.apply_pass

    def counted(block, prefix, step, *others):
        ran.append((step[0].name, prefix))
        return apply(block, prefix, step, *others)

    monkeypatch.setattr(pipeline, "apply_pass", counted)
    source = optx.load(model)
    stages = ablate.Stages(source)
    caches = [{}, {"cache": [KV8]}, {"cache": [KV8 | {"format": "int4"}]}]
    seconds = []
    for fields in caches:
        recipe = Recipe.from_dict({"weights": [INT8], **fields})
        compiled, took = stages.compile(optx.plan(source, recipe))
        records = compiled.plan.records
        assert took > stages.seconds[0] and records[0].errors
        seconds.append((stages.seconds[0], records[0].seconds))
        want = optx.compile(source, recipe)
        np.testing.assert_array_equal(compiled.logits([[3, 4, 5]]), want.logits([[3, 4, 5]]))
    assert len(set(seconds)) == 1, "a pass that is shared keeps the seconds of its only run"
    blocks = len(source.segments())  # each plain compile runs its passes over every block too
    names = [name for name, _ in ran]
    assert names.count("quantize_weights") == blocks * (1 + 3) and names.count("quantize_kv") == blocks * (2 + 2)


@pytest.mark.parametrize(("room", "computed"), [(1 << 30, 1), (0, 2)])
def test_the_reference_computes_a_window_once_while_there_is_room(model, monkeypatch, room, computed):
    monkeypatch.setattr(ablate, "KEPT", room)
    dense = optx.compile(optx.load(model))
    calls = []

    @dataclasses.dataclass
    class Counted:
        leaves, context, vocab = dense.program.leaves, dense.program.context, dense.vocab
        plan = dense.program.plan

        def forward(self, *arguments):
            calls.append(arguments)
            return dense.program.forward(*arguments)

    compiled = dataclasses.make_dataclass("C", ["program", "tokenizer", "vocab"])(
        Counted(), dense.tokenizer, dense.vocab
    )
    reference = ablate.Remembered(compiled)
    for _ in range(2):
        found = dense.evaluate(tiny.TEXT, context=64, max_windows=1, against=reference)
        assert found.kl == pytest.approx(0, abs=1e-6) and found.top1 == 1
    assert len(calls) == computed


# Refused variants, several models, calibration


def test_a_refused_variant_is_a_row_with_its_reason(write, optx_, tmp_path):
    budget = {"name": "budget", "weights": [INT8], "max_kl": 1.0}
    config, out = write(grid=None, base=None, recipes=[{"name": "good", "weights": [INT8]}, REFUSED, budget]), tmp_path
    code, shown, err = optx_(config, "--out", out)
    assert code == 0 and re.search(r"^refused: tiny-llama, g48: \w+Error: quantize_weights at layers/0/", shown, re.M)
    found = results(out)
    assert "group 48" in found["g48"]["refused"] and found["g48"]["kl"] is None and not found["g48"]["front"]
    assert found["budget"]["refused"].startswith("RecipeError: recipe.max_kl: 1.0 is a budget on calibration text")
    assert found["good"]["refused"] is None and found["good"]["front"]
    assert "g48: refused" in err
    lines = {line["variant"]: line for line in csv.DictReader((out / "table.csv").open())}
    assert "group 48" in lines["g48"]["refused"] and lines["g48"]["kl"] == ""
    code, shown, err = optx_(config, "--out", out, "--strict")
    assert code == 1 and "4 of 4 results kept" in err and "good" in shown
    assert err.splitlines()[-1].startswith("error: ablate: 2 of 4 refused: tiny-llama 'g48', tiny-llama 'budget'")


def test_nothing_to_draw(write, optx_, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "pareto.png").write_bytes(b"of an earlier run")
    code, _, err = optx_(write(grid=None, base=None, recipes=[REFUSED]), "--out", out)
    assert code == 0 and "no variant has a KL" in err and not (out / "pareto.png").exists()


def test_several_models_and_the_flags_over_the_file(write, optx_, model, tmp_path):
    rows = [{"model": str(model), "name": "narrow", "dtype": "bfloat16"}, str(model)]
    config = write(models=rows, grid=None, leave_one_out=True, base={"weights": [INT8]}, target="b200")
    code, shown, _ = optx_(config, "--out", tmp_path / "a", "--max_windows", 1, "--json")
    data = json.loads(shown)
    assert code == 0 and data["protocol"]["max_windows"] == 1 and data["protocol"]["target"] == "b200"
    found = [(r["model"], r["variant"], r["layer_bits"]) for r in data["results"]]
    assert [row[:2] for row in found] == list(itertools.product(("narrow", "tiny-llama"), (UNCOMPILED, "base")))
    assert [row[2] for row in found if row[1] == UNCOMPILED] == [16, 32]
    assert all(r["front"] for r in data["results"] if r["variant"] == "base"), "a front a model"
    text = tmp_path / "other.txt"
    text.write_text(tiny.TEXT[:900], encoding="utf-8")
    flags = ("--model", model, "--dtype", "float16", "--text", text, "--context", 32, "--target", "h200", "--x", "bits")
    code, shown, _ = optx_(config, "--out", tmp_path / "b", *flags, "--json")
    data = json.loads(shown)
    assert code == 0 and data["x"] == "bits" and [r["layer_bits"] for r in data["results"]][0] == 16
    want = {
        "text": "other.txt",
        "context": 32,
        "stride": None,
        "max_windows": 2,
        "decode_context": 4096,
        "target": "h200",
    }
    assert data["protocol"] == want


def test_a_model_sets_options_of_the_rules_that_give_them(write, optx_, model, tmp_path):
    rows = [str(model), {"model": str(model), "name": "g16", "set": {"group": 16}}]
    config = write(
        models=rows, grid=None, base=None, recipes=[{"name": "a", "weights": [INT4]}, {"name": "b", "weights": [INT8]}]
    )
    code, shown, _ = optx_(config, "--out", tmp_path / "out", "--json")
    found = {(r["model"], r["variant"]): r for r in json.loads(shown)["results"]}
    assert code == 0
    assert found["g16", "a"]["recipe"]["weights"][0]["group"] == 16
    assert found["g16", "a"]["layer_bits"] == 5 and found["tiny-llama", "a"]["layer_bits"] == 4.5
    assert found["g16", "b"]["key"] == found["tiny-llama", "b"]["key"], "int8 gives no group"


def test_models_of_one_name_are_told_apart(model):
    rows = (ModelRow(model=str(model)), ModelRow(model=str(model), dtype="bfloat16"))
    sources = [optx.load(row.model, row.weights, row.dtype) for row in rows]
    assert ablate._labels(rows, sources) == [f"{model} (dense, float32)", f"{model} (dense, bfloat16)"]
    same = (rows[0], dataclasses.replace(rows[0], dtype="float32"))
    with pytest.raises(RecipeError, match="is listed twice"):
        ablate._labels(same, [sources[0], sources[0]])


WITHIN = {"weights": [INT8], "cache": [KV8], "max_kl": 1.0}


def test_calibration_shows_each_pass(write, optx_, tmp_path):
    config = write(grid=None, leave_one_out=True, base=WITHIN, calibration="fox.txt", measured=True)
    assert optx_(config, "--out", tmp_path / "out")[0] == 0
    passes = results(tmp_path / "out")["base"]["passes"]
    assert [p["pass"] for p in passes] == ["quantize_weights", "quantize_kv"]
    assert all(p["quality"]["kl"] > 0 and p["quality"]["errors"] for p in passes)


def test_calibrated_passes_read_the_text_and_are_refused_without(write, optx_, tmp_path):
    fields = {"grid": None, "leave_one_out": True, "base": {"weights": [INT4 | {"scales": "activation"}]}}
    assert optx_(write(**fields), "--out", tmp_path / "a")[0] == 0
    refused = results(tmp_path / "a")["base"]["refused"]
    assert "reads its inputs (square) on calibration text" in refused
    assert optx_(write(**fields, calibration="fox.txt"), "--out", tmp_path / "a")[0] == 0
    found = results(tmp_path / "a")["base"]
    source = optx.load(yaml.safe_load(write().read_text())["models"][0])
    want = optx.compile(source, Recipe.from_dict(found["recipe"]), calibration=tiny.TEXT, measured=False)
    kl = want.evaluate(tiny.TEXT, context=64, max_windows=2, against=optx.compile(source)).kl
    assert found["kl"] == pytest.approx(kl, rel=1e-5) and found["passes"][0]["quality"] is None


# Expansion


def expand(folder=Path("."), **fields) -> list[Recipe]:
    return list(ablate_config.variants(Ablation(**fields), folder))


def test_a_grid_is_the_product_of_its_axes():
    grid = {"weights.0.format": ["int8", "int4"], "weights.0.group": [None, 32], "cache.0.format": ["int8", "int4"]}
    found = expand(base=BASE, grid=grid)
    assert len(found) == 8
    assert [recipe.name for recipe in found][:3] == [
        "weights.format=int8 group=none cache.format=int8",
        "weights.format=int8 group=none cache.format=int4",
        "weights.format=int8 group=32 cache.format=int8",
    ]
    points = [(r.weights[0].format, r.weights[0].group, r.cache[0].format) for r in found]
    assert points == list(itertools.product(("int8", "int4"), (None, 32), ("int8", "int4")))
    assert all(r.weights[0].match == "layers/.*" and len(r.lower) == 1 for r in found)


def test_a_grid_over_whole_rules_and_other_fields():
    found = expand(base=BASE, grid=GRID | {"require": {"": None, "xla": "xla"}})
    assert [r.name for r in found][:4] == ["int8 KV dense", "int8 KV dense xla", "int8 KV int8", "int8 KV int8 xla"]
    assert [len(r.cache) for r in found[:4]] == [0, 0, 1, 1] and found[1].require == "xla"
    two = {"weights": [INT4 | {"match": "layers/0/.*"}, INT8]}
    found = expand(base=two, grid={"weights.0": [None, INT4 | {"match": "output"}], "weights.1.format": ["int8"]})
    assert [len(r.weights) for r in found] == [1, 2]
    assert [r.name for r in found] == ["weights=none format=int8", "weights=format:int4,group:32 format=int8"]


def test_leave_one_out():
    base = {"name": "whole", "weights": [INT4 | {"match": "layers/0/.*"}, INT8], "cache": [KV8], "allow_overlap": True}
    found = expand(base=base, leave_one_out=True)
    names = [
        "whole",
        "without weights[0] quantize_weights",
        "without weights[1] quantize_weights",
        "without quantize_kv",
    ]
    assert [r.name for r in found] == names
    assert [(len(r.weights), len(r.cache)) for r in found] == [(2, 1), (1, 1), (1, 1), (2, 0)]
    assert [r.weights[0].format for r in found] == ["int4", "int8", "int4", "int4"]
    assert all(r.allow_overlap for r in found)


def test_recipes_by_name_path_and_inline(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"weights": [INT4]}))
    found = expand(
        tmp_path, base="fused", recipes=["int8_kv8", "mine.yaml", {"name": "kv", "cache": [KV8]}, {"name": "e"}]
    )
    assert [r.name for r in found] == ["fused", "int8_kv8", "mine", "kv"], "one without passes is the uncompiled model"


def test_the_shipped_ablation_of_weights_is_legal_on_a_published_model():
    ablation, folder = ablate_config.read("weights")
    found = ablate_config.variants(ablation, folder)
    small, wide = ablate_config.models(ablation, folder)
    assert len(found) == 25 and small.model.startswith("/") and wide.set == {"group": 128}
    source = optx.load("smollm3-3b")
    for recipe in found[::4]:
        assert optx.plan(source, ablate_config.for_model(wide, recipe), "h100").records


def test_the_shipped_ablation_of_caches_is_legal_on_a_published_model():
    ablation, folder = ablate_config.read("kv")
    found = ablate_config.variants(ablation, folder)
    assert len(found) == 20
    for recipe in found:
        assert optx.plan(optx.load("smollm3-3b"), recipe, "h100").records


def test_the_shipped_ablation_is_legal_on_a_published_model():
    ablation, folder = ablate_config.read("formats")
    assert (ablation.name, ablation.models, ablation.text) == ("formats", (), None)
    found = ablate_config.variants(ablation, folder)
    assert len(found) == 8 * 3 - 1
    source = optx.load("smollm3-3b")
    for recipe in found[:: len(found) // 4]:
        assert optx.plan(source, recipe, "h100").records


# Front and plot


def point(variant, bits, kl, model="m", **fields) -> Result:
    return Result(variant=variant, recipe={}, model=model, layer_bits=bits, kl=kl, perplexity=1.0, **fields)


def outcome(*points: Result) -> Outcome:
    protocol = {"text": "t", "context": 64, "decode_context": 64, "target": "h100"}
    return Outcome(name="study", description="", protocol=protocol, x="layer_bits", results=points)


def test_the_front_is_what_no_other_beats_in_both(rng):
    points = [point(str(i), float(b), float(k)) for i, (b, k) in enumerate(rng.integers(1, 12, (60, 2)))]
    points += [point(UNCOMPILED, 1.0, 0.0), point("refused", None, None), point("alone", 99.0, 99.0, "other")]
    found = {(r.model, r.variant) for r in front(points, "layer_bits")}
    drawn = points[:60]
    want = {
        ("m", p.variant)
        for p in drawn
        if not any(
            q.layer_bits <= p.layer_bits and q.kl <= p.kl and (q.layer_bits, q.kl) != (p.layer_bits, p.kl)
            for q in drawn
        )
    }
    assert found == want | {("other", "alone")} and 1 < len(want) < 60


@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_plot(tmp_path, rng, count):
    """It is written for one point, few and many, for two models, and for a KL that is zero."""
    from matplotlib.image import imread

    kls = rng.uniform(1e-4, 1, count)
    points = [point(f"v{i}", 3.0 + i % 7, float(kl), "ab"[i % 2], kv_bytes_per_token=i % 3) for i, kl in enumerate(kls)]
    points[0] = dataclasses.replace(points[0], kl=0.0)
    path = tmp_path / "pareto.png"
    assert ablate_plot.draw(outcome(point(UNCOMPILED, 16.0, 0.0), *points), path)
    image = imread(path)
    height, width = image.shape[:2]
    assert height == 1120 and width == (2120 if count > ablate_plot.NAMED else 1680)
    dark = (image[..., :3].max(-1) < 0.2).mean()
    assert 0.001 < dark < 0.2


def test_labels_do_not_cover_each_other(tmp_path, monkeypatch):
    """A column of points closer than a line of text: each label finds a place of its own."""
    boxes = []
    covered = ablate_plot._covered

    def noted(box, others, page):
        area = covered(box, others, page)
        boxes.append(area)
        return area

    monkeypatch.setattr(ablate_plot, "_covered", noted)
    points = [point(f"variant {i}", 4.0 + 0.01 * i, 0.1 * 1.12**i) for i in range(6)] + [point("far", 16.0, 1e-4)]
    assert ablate_plot.draw(outcome(*points), tmp_path / "p.png")
    places = len(ablate_plot.PLACES)
    assert [min(boxes[i : i + places]) for i in range(0, len(boxes), places)] == [0] * len(points)


# Bad input: one error, nothing written


def fails(result, code, *told):
    got, out, err = result
    assert (got, out) == (code, ""), (got, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for part in told:
        assert part in err, err


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"contxt": 3}, ["ablation.contxt: unknown field of Ablation", "did you mean 'context'?"]),
        ({"context": 1}, ["ablation.context: got 1; allowed: 2 or more"]),
        ({"max_windows": "all"}, ["ablation.max_windows: got 'all' (str); allowed: int"]),
        ({"x": "bit"}, ["ablation.x: got 'bit'; did you mean 'bits'?"]),
        ({"target": "h10"}, ["did you mean 'h100'?"]),
        ({"text": None}, ["ablation.text: missing", "--text FILE"]),
        ({"text": "fux.txt"}, ["ablation.text", "fux.txt: no such file or directory"]),
        ({"calibration": "fux.txt"}, ["ablation.calibration", "fux.txt: no such file or directory"]),
        ({"measured": True}, ["ablation.measured: needs a text", "--calibration FILE"]),
        ({"models": None}, ["ablation.models: none", "--model MODEL"]),
        ({"models": [{"model": "a", "wights": "dense"}]}, ["ablation.models[0].wights", "did you mean 'weights'?"]),
        ({"models": [{"model": "a", "set": {"gruop": 8}}]}, ["ablation.models: a: set: no option 'gruop'", "'group'?"]),
        ({"models": [{"model": "a", "set": 8}]}, ["set: got 8; allowed: a mapping"]),
        ({"models": ["nowhere.gguf"]}, ["nowhere.gguf: no such file or directory"]),
        ({"models": ["qwen3-8b"]}, ["a config holds no weights"]),
        ({"grid": None}, ["one of recipes, grid, leave_one_out: true; got none"]),
        ({"leave_one_out": True}, ["got grid and leave_one_out"]),
        ({"base": None}, ["ablation.base: missing; grid needs a recipe to start from"]),
        ({"base": "int4_kv9"}, ["int4_kv9: no such recipe file; did you mean 'int4_kv8'?"]),
        ({"base": {"weights": [{"pass": "quantize_wights"}]}}, ["ablation.base.weights[0].pass", "'quantize_weights'?"]),
        ({"grid": {}}, ["ablation.grid: got {}; allowed: a mapping of dotted paths"]),
        ({"grid": {"wieghts.0.format": ["int8"]}}, ["ablation.grid.wieghts.0.format", "did you mean 'weights'?"]),
        ({"grid": {"weights.1.format": ["int8"]}}, ["no such rule in the recipe 'base'", "weights.0 (quantize_weights)"]),
        ({"grid": {"fold.0": [None]}}, ["no such rule in the recipe 'base', which has none at fold"]),
        ({"grid": {"weights.0.fromat": ["int8"]}}, ["unknown field of QuantizeWeights; did you mean 'format'?"]),
        ({"grid": {"weights.0.format": ["int5"]}}, ["ablation.grid at 'format=int5': recipe.weights[0].format: got 'int5'"]),
        ({"grid": {"weights.0.format": "int8"}}, ["ablation.grid.weights.0.format: got 'int8'; allowed: a list"]),
        ({"grid": {"weights.0": [INT8], "weights.0.group": [32]}}, ["weights.0.group: lies in weights.0"]),
        ({"grid": {"weights.0.format": ["int8", "int8"]}}, ["'format=int8' and 'format=int8' are the same recipe"]),
        ({"grid": {"max_kl.x": [1]}}, ["max_kl has no parts"]),
        ({"grid": None, "recipes": [{"weights": [INT8]}]}, ["ablation.recipes[0]: has no name"]),
        ({"grid": None, "base": None, "recipes": ["int8_kv8", "int8_kv8"]}, ["'int8_kv8' and 'int8_kv8' are the same recipe"]),
        ({"grid": None, "base": {"name": "a", "weights": [INT8]}, "recipes": [{"name": "a", "cache": [KV8]}]},
         ["two variants are called 'a'"]),
        ({"grid": None, "base": None, "recipes": [{"name": "empty"}]}, ["ablation.recipes: no variant has a pass"]),
        ({"context": 4096}, ["evaluate: context 4096; allowed: 2 to the model's 256"]),
    ],
)  # fmt: skip
def test_bad_input(write, optx_, tmp_path, fields, told):
    out = tmp_path / "out"
    fails(optx_(write(**fields), "--out", out), 1, *told)
    assert not any(out.glob("**/*.*"))


def test_bad_command_lines(write, optx_, model, tmp_path):
    config, out = write(), tmp_path / "out"
    fails(optx_(config), 2, "--out DIR is missing")
    fails(optx_(config, "--out", out, "--dtype", "bfloat16"), 2, "--dtype bfloat16 is for --model")
    fails(optx_(config, "--out", out, "--x", "bit"), 2, "did you mean 'bits'?")
    fails(optx_(config, "--out", out, "--text", tmp_path / "none"), 1, "--text", "no such file or directory")
    fails(optx_(tmp_path / "stdy.yaml", "--out", out), 1, "stdy.yaml: no such ablation file")
    fails(optx_("format", "--out", out), 1, "no such ablation file; did you mean 'formats'?")
    fails(optx_("formats", "--out", out), 1, "ablation.text: missing")
    (tmp_path / "bad.yaml").write_text("models: [a\n")
    fails(optx_(tmp_path / "bad.yaml", "--out", out), 1, "bad.yaml: not YAML")
    (tmp_path / "file").write_text("")
    fails(optx_(config, "--out", tmp_path / "file"), 1, "file")
