"""`optx report`: what stands in text, JSON, charts and page, of exports and of plans; the page in a headless Chromium."""

import base64
import dataclasses
import html
import json
import math
import re
import shutil
import subprocess
import sys

import browser
import pytest
import tiny

import optx
from optx import cli, measured, pipeline, png_report, report_data
from optx.cost import OpCost, step_bytes, step_ops
from optx.estimate import estimate
from optx.roofline import roofline
from optx.target import TARGETS, Target

PATH = browser.find()
needs_browser = pytest.mark.skipif(
    PATH is None, reason=f"no browser: none of {', '.join(browser.NAMES)} is on the PATH"
)
RECIPE = {
    "name": "t4",
    "weights": [{"pass": "quantize_weights", "match": "layers/.*", "format": "int4", "group": 32}],
    "cache": [{"pass": "quantize_kv", "format": "int8"}],
    "lower": [{"pass": "fuse_projections"}],
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tiny.checkpoint(tmp_path_factory.mktemp("report") / "tiny")
    return optx.compile(str(folder), optx.Recipe.from_dict(RECIPE))


@pytest.fixture(scope="module")
def export(compiled, tmp_path_factory):
    return compiled.export(tmp_path_factory.mktemp("report") / "out")


@pytest.fixture(scope="module")
def written(export, tmp_path_factory):
    """The export's page for an H100."""
    path = tmp_path_factory.mktemp("report") / "page.html"
    assert cli.run(["report", str(export), "--target", "h100", "--html", str(path)]) == 0
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def times(tmp_path_factory):
    """Steps of the export and of another recipe as `optx bench decode --against-plan` writes them: 8 and 1 sequences, by op."""

    def op(name, format, predicted, told):
        return measured.OpTime(
            op=name, format=format, kernels=8, bytes=1e6, bound_seconds=predicted / 2, predicted_seconds=predicted,
            measured_seconds=told,
        )  # fmt: skip

    def step(recipe, batch):
        ops = (
            op("matmul", "int4_g32", 4e-3, 5e-3),
            op("attention", "int8", 2e-3, None),
            op(measured.REST, "", 1e-3, 3e-3),
        )
        return measured.StepTimes(
            model="tiny", recipe=recipe, batch=batch, context=64, bound_seconds=3.5e-3, predicted_seconds=7e-3,
            measured_seconds=8e-3, ops=ops, kernels=[("quant_matmul", 5e-3), ("fusion", 3e-3)],
        )  # fmt: skip

    steps = (step("t4", 8), step("t4", 1), step("other", 1))
    found = measured.Measured(device="Made 9000", date="2026-11-26", target="h100", source="our runs", steps=steps)
    path = tmp_path_factory.mktemp("times") / "against.json"
    path.write_text(json.dumps(found.to_dict()))
    return path


def words(page: str) -> str:
    """What a reader sees: no tags, one space."""
    body = re.sub(r"<(style|script)>.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


# What an export keeps


def test_an_export_keeps_times_and_errors_of_its_compile(compiled, export):
    kept = json.loads((export / "manifest.json").read_text())["report"]
    assert kept["target"] == "cpu"
    assert [row["pass"] for row in kept["passes"]] == ["quantize_weights", "quantize_kv", "fuse_projections"]
    for row, record in zip(kept["passes"], compiled.plan.records, strict=True):
        assert row["seconds"] == record.seconds and row["errors"] == record.errors
    assert len(kept["passes"][0]["errors"]) == 14, "seven matrices a layer"


def test_the_text_of_an_export(compiled, export, capsys):
    assert cli.run(["report", str(export)]) == 0
    text = capsys.readouterr().out
    mean, largest = pipeline.flat_errors(compiled.plan.records[0])
    assert text.startswith("tiny + t4 for cpu\n") and f"{mean:.4f} / {largest:.4f}" in text
    assert "mosaic_gpu/sm90 declined: is for sm90, not cpu" in text and "bytes a step" in text
    assert "on shapes alone" not in text


def test_an_export_of_an_earlier_optx_is_reported_without_times_and_errors(export, tmp_path, capsys):
    old = shutil.copytree(export, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["report"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert cli.run(["report", str(old), "--html", str(tmp_path / "a.html")]) == 0
    page = words((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "not kept (written by an earlier optx)" in page and "lossy" in page and "Largest weight error" not in page
    assert cli.run(["report", str(old)]) == 0
    assert "on shapes alone; a compile measures them" in capsys.readouterr().out
    assert optx.load(str(old)).recipe.name == "t4"


def test_measured_quality_is_shown(export, tmp_path):
    folder = shutil.copytree(export, tmp_path / "measured")
    manifest = json.loads((folder / "manifest.json").read_text())
    outputs = {"layers/0/mixer/q": 0.1, "layers/1/mixer/q": 0.3}
    manifest["report"]["passes"][1]["quality"] = {"kl": 0.0123, "top1": 0.97, "tokens": 640, "errors": outputs}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    path = tmp_path / "page.html"
    assert cli.run(["report", str(folder), "--html", str(path)]) == 0
    page = path.read_text(encoding="utf-8")
    assert "0.0123 nats a token, 97.00 %" in words(page) and "97.00 % of 640 tokens" in words(page)
    assert "layer 1, mixer/q: 30.00 %" in page and "lossy, not measured" not in page


def test_a_damaged_record_is_told(export, tmp_path, capsys):
    bad = shutil.copytree(export, tmp_path / "bad")
    manifest = json.loads((bad / "manifest.json").read_text())
    manifest["report"]["passes"][0]["seconds"] = "soon"
    (bad / "manifest.json").write_text(json.dumps(manifest))
    assert cli.run(["report", str(bad)]) == 1
    assert "manifest.json: report: not as optx writes it" in capsys.readouterr().err


# What stands in the page


def test_the_page_says_what_the_compile_did(compiled, written):
    shown = words(written)
    plan = optx.plan(compiled.plan.source, compiled.plan.recipe, "h100")
    before, *_, after = plan.steps()
    mean, largest = pipeline.flat_errors(compiled.plan.records[0])
    for text in (
        "tiny + t4 for h100",
        f"{before.total / after.total:.2f}× fewer",
        f"{100 * mean:.2f} %, {100 * largest:.2f} %",
        "14 sites",
        "-layers/0-1/mlp/down",
        "reads MLA latents, not a paged cache",
        "compiled for cpu",
        "group: 32",
        "NVIDIA H100 Tensor Core GPU, data sheet (SXM)",
    ):
        assert text in shown, text


def test_the_page_asks_for_nothing(written):
    loads = re.findall(r"""(?:src|srcset|@import|url\()\s*=?\s*["'(]?([^"')\s>]*)""", written)
    assert loads == [] and "<link" in written and re.findall(r"<link[^>]*href=\"([^\"]*)\"", written) == ["data:,"]


def test_names_are_escaped(compiled, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text('name: "<b>&"\ncache:\n- {pass: quantize_kv, format: int8}\n')
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny.CONFIG | {"vocab_size": 320}))
    page = tmp_path / "page.html"
    assert cli.run(["report", str(config), "--recipe", str(path), "--target", "h100", "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "<b>" not in text and "&lt;b&gt;&amp;" in text and "Made from shapes: no weights were read" in words(text)


def test_times_by_op_beside_the_prediction(export, times, tmp_path):
    path = tmp_path / "page.html"
    assert cli.run(["report", str(export), "--target", "h100", "--measured", str(times), "--html", str(path)]) == 0
    shown = words(path.read_text(encoding="utf-8"))
    assert "Measured on Made 9000, 2026-11-26; predicted for h100 by efficiencies (our runs)." in shown
    assert shown.index("batch 1") < shown.index("batch 8"), "in order"
    assert "matmul int4_g32 2 ms 4 ms 5 ms 0.800" in shown and "attention int8 1 ms 2 ms – –" in shown
    assert "whole step 3.5 ms 7 ms 8 ms 0.875" in shown and "but those called predicted or measured" in shown


def test_the_predicted_time_is_a_tile(written, export, tmp_path):
    assert "Time a decode step, predicted" in words(written)
    path = tmp_path / "page.html"
    assert cli.run(["report", str(export), "--target", "mi300x", "--html", str(path)]) == 0
    assert "Time a decode step, predicted" not in words(path.read_text(encoding="utf-8")), "not measured"


# JSON and charts


def test_the_json_has_what_the_page_shows(compiled, export, times, capsys):
    arguments = ["--target", "h100", "--batch", "2", "--context", "64", "--measured", str(times), "--json"]
    assert cli.run(["report", str(export), *arguments]) == 0
    data, plan = json.loads(capsys.readouterr().out), compiled.plan
    documented = re.findall(r"^    ([a-z, ]+?)  ", report_data.__doc__, flags=re.MULTILINE)
    assert set(data) == {key for line in documented for key in line.split(", ")}, "every key is documented"
    assert (data["title"], data["target"], data["batch"], data["context"], data["timed"]) == (
        "tiny + t4",
        "h100",
        2,
        64,
        True,
    )
    assert data["steps"] == [step_bytes(tree, 2, 64).to_dict() for tree in plan.trees]
    bounds = estimate(plan.tree, TARGETS["h100"], batch=2, context=64)
    assert data["estimate"]["tpot_seconds"] == bounds.tpot
    assert data["estimate"]["tpot_predicted_seconds"] == pytest.approx(bounds.predicted.seconds)
    dots = data["roofline"]["decode"]["dots"]
    assert sum(dot["share"] for dot in dots) == pytest.approx(1, abs=0.01)
    assert all(dot["rate"] == pytest.approx(dot["intensity"] * 3.35e12) for dot in dots if dot["binds"] == "memory")
    assert [record["errors"] for record in data["passes"]] == [dict(record.errors) for record in plan.records]
    rows = {row["part"]: row["values"] for row in data["maps"]["error"]["rows"]}
    assert rows["mixer/k"] == [plan.records[0].errors[f"layers/{i}/mixer/k/weight"] for i in range(2)]
    assert sum(row["sites"] for row in data["kernels"]) > 0 and data["yaml"] == plan.recipe.to_yaml()
    assert [step["batch"] for step in data["measured"]] == [1, 8] and data["measured"][0]["ops"][0]["ratio"] == 0.8


def test_json_of_a_target_without_a_bandwidth(export, capsys):
    assert cli.run(["report", str(export), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["roofline"] == {"decode": None, "prefill": None} and data["measured"] == []
    assert data["estimate"]["tpot_seconds"] is None and data["maps"]["bytes"]["rows"]


def test_charts_are_legible_files(export, tmp_path, capsys):
    """Large enough to read, on white, with something drawn in colour."""
    from matplotlib.image import imread

    folder = tmp_path / "charts"
    assert cli.run(["report", str(export), "--target", "h100", "--png", str(folder)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("tiny + t4 for h100\n"), "the text as well"
    drawn = {path.stem: imread(path)[..., :3] for path in folder.iterdir()}
    assert drawn.keys() == {"waterfall", "roofline_decode", "roofline_prefill", "bytes", "error"}
    for name, image in drawn.items():
        height, width, _ = image.shape
        assert width >= 1400 and height >= 300, name
        assert (image[:4] == 1).all() and (image[-4:] == 1).all(), f"{name}: light, nothing cut off at the edges"
        assert ((image.max(-1) - image.min(-1)) > 0.3).mean() > 0.001, f"{name}: no colour"
        assert (image.max(-1) < 0.35).mean() > 0.001, f"{name}: no dark text"
    assert cli.run(["report", str(export), "--png", str(folder)]) == 2
    assert "has a waterfall.png; choose another folder, or --overwrite" in capsys.readouterr().err
    assert cli.run(["report", str(export), "--png", str(folder), "--overwrite"]) == 0, "no bandwidth: no rooflines"


def test_errors_of_outputs_are_drawn_where_they_were_measured(compiled, tmp_path):
    outputs = {"layers/0/mixer/q": 0.1, "layers/1/mixer/q": 0.3}
    quality = pipeline.Quality(kl=0.01, top1=0.9, tokens=10, errors=outputs)
    plan = compiled.plan
    records = (dataclasses.replace(plan.records[0], quality=quality), *plan.records[1:])
    subject = report_data.Subject(
        model="tiny", recipe=plan.recipe, target=TARGETS["h100"], trees=plan.trees, records=records, timed=True, file_bytes=0,
        provenance=(),
    )  # fmt: skip
    written = png_report.write(subject, tmp_path, batch=1, context=64)
    assert [path.stem for path in written] == list(png_report.FILES)
    (found,) = [each for each in report_data.layer_maps((), records) if each.name == "output"]
    assert found.row("mixer/q") == [0.1, 0.3] and found.share(0.3) == 1 and found.share(0.1) == 0


def test_drawing_is_imported_only_to_draw():
    code = "import sys, optx.cli; sys.exit('matplotlib' in sys.modules or 'scipy.optimize' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_op_stands_in_the_roofline(compiled):
    target, tree = TARGETS["h100"], compiled.plan.tree
    for step in (estimate(tree, target, batch=2, context=64).decode, estimate(tree, target, context=64).prefill):
        plot = roofline(step.ops, target)
        assert sum(dot.sites for dot in plot.dots) + plot.still == len(step.ops)
        moving = sum(op.seconds(target) for op in step.ops if op.flops)
        assert sum(dot.seconds for dot in plot.dots) == pytest.approx(moving)
        for dot in plot.dots:
            assert plot.left <= dot.x <= plot.right and plot.top <= dot.y <= plot.bottom


def test_where_a_dot_stands():
    """bandwidth 1e12, peak 1e14: the ridge is at 100 operations a byte."""
    from optx.target import Peak

    target = Target(name="made", platform="gpu", arch="any", bandwidth=1e12, peak=Peak(bf16=1e14))
    common = {"op": "matmul", "format": "bfloat16", "dtype": "bf16"}
    ops = (
        OpCost(path="layers/0/a", weights=1e9, flops=1e10, **common),
        OpCost(path="layers/1/a", weights=1e9, flops=1e10, **common),
        OpCost(path="layers/0/b", weights=1e9, flops=1e12, **common),
        OpCost(path="norm", op="vectors", format="bfloat16", dtype="bf16", weights=10),
    )
    plot = roofline(ops, target)
    dots = {dot.first: dot for dot in plot.dots}
    ticks = {text: x for x, text in plot.x_ticks}
    assert dots["layers/0/a"].sites == 2 and dots["layers/0/a"].binds == "memory"
    assert dots["layers/0/a"].x == pytest.approx(ticks["10"])
    assert dots["layers/0/b"].binds == "compute" and dots["layers/0/b"].x == pytest.approx(ticks["1k"])
    heights = {text: y for y, text in plot.y_ticks}
    assert dots["layers/0/a"].y == pytest.approx(heights["10 TFLOP/s"])
    assert dots["layers/0/b"].y == pytest.approx(heights["100 TFLOP/s"])
    (roof,) = plot.roofs
    assert roof.points[1] == pytest.approx((ticks["100"], heights["100 TFLOP/s"])), "the ridge"
    areas = [(dot.radius - 4) ** 2 for dot in (dots["layers/0/b"], dots["layers/0/a"])]
    assert areas[0] / areas[1] == pytest.approx(1e-2 / 2e-3) and plot.still == 1
    assert math.isclose(sum(dot.share for dot in plot.dots), 1, rel_tol=1e-6)


def test_a_target_without_a_bandwidth_has_no_roof_and_says_so(export, compiled, tmp_path):
    assert roofline(step_ops(compiled.plan.tree), TARGETS["cpu"]) is None
    path = tmp_path / "page.html"
    assert cli.run(["report", str(export), "--html", str(path)]) == 0, "its own target"
    page = words(path.read_text(encoding="utf-8"))
    assert "No memory bandwidth is known of cpu" in page and "Ops of decode by kind" in page


def test_a_target_without_a_peak_says_so(export, tmp_path):
    assert TARGETS["m4-max"].bandwidth and TARGETS["m4-max"].peak.fp32 is None
    path = tmp_path / "page.html"
    assert cli.run(["report", str(export), "--target", "m4-max", "--html", str(path)]) == 0
    assert "No peak of fp32 is known of m4-max" in words(path.read_text(encoding="utf-8"))


def test_wrong_command_lines(export, times, tmp_path, capsys):
    (tmp_path / "there.html").write_text("mine")
    tiny_config = tmp_path / "tiny.json"
    tiny_config.write_text(json.dumps(tiny.CONFIG | {"vocab_size": 320}))
    for arguments, code, told in (
        ([export, "--recipe", "int8_kv8"], 2, "has its recipe; leave --recipe out"),
        ([export, "--dtype", "float16"], 2, "has its dtype; leave --dtype out"),
        ([export, "--html", tmp_path], 2, "is a folder; name a file in it"),
        ([export, "--html", tmp_path / "there.html"], 2, "--overwrite"),
        ([export, "--html", tmp_path / "no" / "a.html"], 2, "does not exist; make it first"),
        ([tmp_path / "nothing"], 1, "no such file or directory"),
        ([export, "--target", "h10"], 1, "did you mean 'h100'?"),
        ([export, "--measured", tmp_path / "there.html"], 2, "--measured goes with --html or --json"),
        ([export, "--json", "--measured", tmp_path / "nothing.json"], 1, "--measured"),
        ([export, "--json", "--measured", tmp_path / "there.html"], 1, "cannot be read as JSON"),
        ([tiny_config, "--json", "--measured", times], 1, "no step of tiny + none; it has tiny + t4, tiny + other"),
        ([export, "--png", tmp_path / "there.html"], 2, "is a file; name a folder"),
        ([export, "--png", tmp_path / "no" / "charts"], 2, "does not exist; make it first"),
    ):
        assert cli.run(["report", *map(str, arguments)]) == code
        assert told in capsys.readouterr().err
    assert (tmp_path / "there.html").read_text() == "mine"
    assert cli.run(["report", str(export), "--html", str(tmp_path / "there.html"), "--overwrite"]) == 0
    assert (tmp_path / "there.html").read_text(encoding="utf-8").startswith("<!doctype html>")


# In a browser


def opened(page: str):
    tab = browser.Browser(PATH)
    try:
        tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
        tab.open("data:text/html;base64," + base64.b64encode(page.encode()).decode())
        yield tab
        assert tab.complaints == []
    finally:
        tab.close()


@pytest.fixture
def tab(written):
    yield from opened(written)


@pytest.fixture
def timed_tab(export, times, tmp_path):
    """The page with measured times."""
    path = tmp_path / "page.html"
    arguments = ["--target", "h100", "--measured", str(times), "--html", str(path)]
    assert cli.run(["report", str(export), *arguments]) == 0
    yield from opened(path.read_text(encoding="utf-8"))


def shown(tab, css: str) -> bool:
    return tab.evaluate(f"document.querySelector({css!r}).checkVisibility()")


@needs_browser
def test_switches_show_one_panel_and_keys_go_through_a_chart(tab):
    assert shown(tab, ".panel.decode svg") and not shown(tab, ".panel.prefill svg")
    tab.evaluate("document.querySelector('input[value=decode]').focus()")
    tab.press("ArrowRight", 39)
    assert shown(tab, ".panel.prefill svg") and not shown(tab, ".panel.decode svg")
    tab.evaluate("document.querySelector('input[value=error]').click()")
    assert shown(tab, ".panel.error table") and not shown(tab, ".panel.bytes table")
    tab.evaluate("document.querySelector('.panel.error td[tabindex=\"0\"]').focus()")
    told = "document.getElementById('out-error').textContent"
    assert tab.evaluate(told).startswith("layer 0, mixer/k: ")
    tab.press("ArrowRight", 39)
    assert tab.evaluate(told).startswith("layer 1, mixer/k: ")
    tab.press("ArrowDown", 40)
    assert tab.evaluate(told).startswith("layer 1, mixer/o: ")
    tab.press("End", 35)
    assert tab.evaluate(told).startswith("layer 1, mlp/up: ")
    tab.press("ArrowDown", 40)
    assert tab.evaluate(told).startswith("layer 1, mlp/up: "), "stays at the edge"
    assert tab.evaluate("document.querySelectorAll('.panel.error td[tabindex=\"0\"]').length") == 1
    tab.evaluate("document.querySelector('.panel.prefill .dot[tabindex=\"0\"]').focus()")
    first = tab.evaluate("document.getElementById('out-prefill').textContent")
    tab.press("ArrowRight", 39)
    assert "operations a byte" in first and first != tab.evaluate("document.getElementById('out-prefill').textContent")


@needs_browser
def test_it_fits_a_narrow_screen_and_names_its_charts(tab):
    tab.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    nameless = (
        "[...document.querySelectorAll('svg, circle, [role=grid], [role=region], pre')]"
        ".filter((e) => !e.getAttribute('aria-label')).length"
    )
    assert tab.evaluate(nameless) == 0
    assert tab.evaluate("document.querySelector('.panel.decode .scroll').scrollWidth") > 360, "the plot scrolls"


CONTRAST = """(() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (color) => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = color; paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((x) => x / 255)
    .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.checkVisibility() || ["SCRIPT", "STYLE", "title"].includes(e.tagName)) continue;
    seen += 1;
    const style = getComputedStyle(e);
    const pair = [light(rgb(e.closest("svg") ? style.fill : style.color)), light(ground(e))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) found.push([walk.currentNode.data.trim(), ratio]);
  }
  return { seen, found };
})()"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_measured_times_switch_by_batch_and_stand_out(timed_tab, scheme):
    tab = timed_tab
    tab.call("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": scheme}])
    assert shown(tab, ".panel.step0 table") and not shown(tab, ".panel.step1 table")
    tab.evaluate("document.querySelector('input[value=step0]').focus()")
    tab.press("ArrowRight", 39)
    assert shown(tab, ".panel.step1 table") and not shown(tab, ".panel.step0 table")
    widths = (
        "[...document.querySelectorAll('.panel.step1 .duo i:not(.mark)')].map((e) => e.getBoundingClientRect().width)"
    )
    predicted, told, *_ = tab.evaluate(widths)
    assert predicted / told == pytest.approx(0.8, abs=0.01), "bars as long as the times"
    result = tab.evaluate(CONTRAST)
    assert result["seen"] > 150 and result["found"] == []
    tab.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


@needs_browser
@pytest.mark.parametrize("media", ["", "print"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(tab, scheme, media):
    """Contrast of at least 4.5 (WCAG 2.2, success criterion 1.4.3) of every text as it is painted."""
    tab.call("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])
    tab.evaluate("for (const e of document.querySelectorAll('details')) e.open = true")
    result = tab.evaluate(CONTRAST)
    assert result["seen"] > 150 and result["found"] == []


@needs_browser
def test_print_shows_every_panel_and_no_controls(tab):
    tab.call("Emulation.setEmulatedMedia", media="print")
    panels = "[...document.querySelectorAll('.panel')].map((e) => e.checkVisibility())"
    assert tab.evaluate(panels) == [True] * 4
    assert not shown(tab, "nav") and not shown(tab, ".switch") and not shown(tab, ".readout")
