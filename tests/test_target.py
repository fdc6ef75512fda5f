"""Targets: every figure has its source, devices are recognised, a user's YAML is read strictly, a measured machine is kept."""

import dataclasses
import json

import jax
import pytest
import yaml

from optx import cli, target
from optx.bench import ceilings, timing
from optx.errors import LoweringError
from optx.pallas import dispatch
from optx.target import TARGETS

ASKED = {
    *(
        "a100",
        "h100",
        "h200",
        "b200",
        "gb200-nvl72",
        "rtx-4090",
        "rtx-5090",
        "mi300x",
        "mi325x",
        "mi355x",
        "tpu-v5e",
        "tpu-v5p",
    ),
    *("tpu-v6e", "tpu-v7x", "trainium2", "gaudi3", "dgx-spark", "strix-halo", "m4-max", "m3-ultra", "jetson-orin-nano"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user's targets, apart from those of whoever runs the tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "optx" / "targets"
    path.mkdir(parents=True)
    return path


def test_the_table_is_whole():
    assert TARGETS.keys() == ASKED | {"cpu"}
    assert all(t.memory and t.bandwidth for name, t in TARGETS.items() if name != "cpu")


@pytest.mark.parametrize("name", TARGETS)
def test_every_figure_has_one_source(name):
    row = TARGETS[name]
    unset = {f.name: f.default for f in dataclasses.fields(row) if f.name in target.FIGURES}
    known = [figure for figure in target.FIGURES if getattr(row, figure) != unset[figure]]
    told = sorted(figure for source in row.sources for figure in source.figures)
    assert told == sorted(known)
    assert all(source.title for source in row.sources)
    assert all(source.url.startswith("https://") for source in row.sources if source.figures != ("decode",)), "measured"
    assert all(row.source(figure) in row.sources for figure in known)


@pytest.mark.parametrize(
    "name, memory, bandwidth, peaks",
    [
        ("h100", 80e9, 3.35e12, {"bf16": 989.4e12, "fp8": 1978.9e12, "fp4": None}),
        ("b200", 180e9, 7.7e12, {"bf16": 2250e12, "fp4": 9000e12}),
        ("gb200-nvl72", 186e9, 8e12, {"bf16": 2500e12, "fp4": 10000e12}),
        ("mi300x", 192e9, 5.3e12, {"bf16": 1307.4e12, "fp8": 2614.9e12}),
        ("tpu-v7x", 192 * 2**30, 7.38e12, {"bf16": 2307e12, "fp8": 4614e12}),
        ("m4-max", 128e9, 546e9, {"bf16": None}),
    ],
)
def test_figures_in_bytes_and_seconds(name, memory, bandwidth, peaks):
    row = TARGETS[name]
    assert (row.memory, row.bandwidth) == (memory, pytest.approx(bandwidth))
    assert {kind: getattr(row.peak, kind) for kind in peaks} == {k: v and pytest.approx(v) for k, v in peaks.items()}


def test_a_rack_is_a_domain():
    rack = TARGETS["gb200-nvl72"]
    assert rack.domain == 72 and rack.domain * rack.link == pytest.approx(130e12, rel=0.01)
    assert rack.domain * rack.memory == pytest.approx(13.4e12, rel=0.01)
    assert rack.domain * rack.bandwidth == pytest.approx(576e12)


def test_what_is_bought_is_paid_off_in_three_years():
    assert TARGETS["rtx-4090"].price.hourly == pytest.approx(1599 / 26_280)
    assert TARGETS["tpu-v5e"].price.hourly == 1.2


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200-nvl72"),
        ("NVIDIA GB10", "dgx-spark"),
        ("TPU v5 lite", "tpu-v5e"),
        ("TPU v5", "tpu-v5p"),
        ("TPU v6 lite", "tpu-v6e"),
        ("TPU7x", "tpu-v7x"),
        ("AMD Instinct MI300X", "mi300x"),
        ("cpu", "cpu"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_devices_are_recognised(kind, name):
    assert target.named(kind) == name


def test_detect(monkeypatch):
    assert target.detect() == TARGETS["cpu"] == target.get("auto")
    unknown = dataclasses.make_dataclass("Device", ["device_kind"])("Abacus 9")
    monkeypatch.setattr(jax, "devices", lambda: [unknown])
    with pytest.raises(LoweringError, match="device 'Abacus 9' has no target; name one: cpu, h100, .*--store NAME"):
        target.detect()


VARIANT = """
like: h100
bandwidth: 3010 GB/s
peak: {bf16: 781 TFLOP/s}
price: {dollars: 2, per: hour}
sources: [{title: our own runs, figures: [bandwidth, peak, price]}]
"""


def test_a_variant_by_name_and_by_path(folder):
    (folder / "ours.yaml").write_text(VARIANT)
    ours, h100 = target.get("ours"), TARGETS["h100"]
    assert (ours.name, ours.like, ours.arch, ours.memory) == ("ours", "h100", "sm90", h100.memory)
    assert (ours.bandwidth, ours.peak.bf16, ours.peak.fp8) == (3.01e12, 781e12, h100.peak.fp8)
    assert ours.price.hourly == 2 and ours.link == h100.link
    assert ours.source("bandwidth").title == "our own runs"
    assert ours.source("memory") == dataclasses.replace(h100.source("memory"), figures=ours.source("memory").figures)
    told = [figure for source in ours.sources for figure in source.figures]
    assert len(told) == len(set(told))
    assert target.get(str(folder / "ours.yaml")) == ours
    assert target.names()[-1] == "ours"


def test_a_variant_takes_the_tuned_tiles_of_its_kind(folder):
    (folder / "ours.yaml").write_text(VARIANT)
    site = dispatch.OpSite(op="made_up", args={})
    row = dispatch.Row(op="made_up", backend="mosaic_gpu", arch="sm90", module="attention.reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "ROWS", (row,))
        assert dispatch.select(site, target.get("ours")).note == ""
        assert "not tuned on h200" in dispatch.select(site, TARGETS["h200"]).note


def test_a_device_of_its_own(folder):
    (folder / "abacus.yaml").write_text("platform: gpu\nmemory: 1.5 TiB\nbandwidth: 2.5 TB/s\ndomain: 4\n")
    found = target.get("abacus")
    assert found == target.Target(
        name="abacus", platform="gpu", arch="any", memory=3 * 2**39, bandwidth=2.5e12, domain=4
    )


@pytest.mark.parametrize(
    "text, told",
    [
        ("platform: gpu\nmemroy: 80 GB", "ours.yaml.memroy: unknown field of Row; did you mean 'memory'?"),
        ("platform: gpu\npeak: {fp64: 60 TFLOP/s}", "ours.yaml.peak.fp64: unknown field of PeakRow; did you mean"),
        ("platform: gpu\nbandwidth: 3.35 TBps", "ours.yaml.bandwidth: got '3.35 TBps'; allowed: a number above 0 and one of"),
        ("platform: gpu\nbandwidth: 0 TB/s", "ours.yaml.bandwidth: got '0 TB/s'; allowed: a number above 0"),
        ("platform: gpu\nmemory: 80", "ours.yaml.memory: got 80 (int); allowed: str"),
        ("platform: gpu\npeak: {bf16: 1 TB/s}", "ours.yaml.peak.bf16: got '1 TB/s'"),
        ("memory: 80 GB", "ours.yaml: missing field 'platform' (cpu, gpu, tpu, ...), or 'like' for a variant"),
        ("like: h1000", "ours.yaml: like: got 'h1000'; did you mean 'h100'?"),
        ("like: [h100]", "ours.yaml: like: got ['h100']"),
        ("like: h100\nprice: {dollars: 2, per: minute}", "ours.yaml.price.per: got 'minute'; allowed: device, hour"),
        ("like: h100\nsources: [{title: x, figures: [bandwith]}]", "sources[0].figures: got 'bandwith'; did you mean"),
        ("like: h100\ndetect: [H100]", "ours.yaml: detect: only for targets that ship with optx; name yours: --target ours"),
        ("like: h100\nlike: h200", "ours.yaml: not YAML: key 'like' twice"),
        ("[1", "ours.yaml: not YAML"),
        ("- 1", "ours.yaml: got list; allowed: a mapping with the fields of Row"),
        ("", "ours.yaml: got NoneType; allowed: a mapping"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named(text, told, folder):
    (folder / "ours.yaml").write_text(text)
    with pytest.raises(LoweringError) as error:
        target.get("ours")
    assert told in str(error.value)


def test_names_that_are_not_there(folder):
    (folder / "ours.yaml").write_text(VARIANT)
    with pytest.raises(LoweringError, match="target 'oours' is not known; did you mean 'ours'?"):
        target.get("oours")
    with pytest.raises(LoweringError, match="target 'nowhere/x.yaml' is not known"):
        target.get("nowhere/x.yaml")
    (folder / "h100.yaml").write_text(VARIANT)
    assert target.get("h100") == TARGETS["h100"] and target.names().count("h100") == 1
    with pytest.raises(LoweringError, match="'h100' ships with optx; give the file another name and say like: h100"):
        target.get(str(folder / "h100.yaml"))
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(LoweringError, match="bytes.yaml: cannot be read"):
        target.get("bytes")


MEASURED = timing.Ceilings(device="cpu", read=10.27e9, bf16=23e9)


def test_a_measured_machine_is_kept(folder, monkeypatch, capsys):
    monkeypatch.setattr(timing, "ceilings", lambda: MEASURED)
    assert cli.run(["bench", "ceilings", "--store", "mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stored"] == str(folder / "mine.yaml")
    mine = target.get("mine")
    assert (mine.bandwidth, mine.peak.bf16, mine.peak.fp8) == (10.27e9, pytest.approx(23e9), None)
    assert mine.like == "cpu" and mine.memory > 1e9
    assert mine.source("bandwidth").title.startswith("optx bench ceilings on cpu, ")
    assert cli.run(["plan", "smollm3-3b", "--target", "mine"]) == 0
    assert "smollm3-3b for mine" in capsys.readouterr().out


def test_the_row_of_a_machine_is_what_a_user_would_write():
    row = ceilings.row(MEASURED)
    assert yaml.safe_load(yaml.safe_dump(row)) == row
    assert row["peak"] == {"bf16": "0.023 TFLOP/s"} and row["bandwidth"] == "10.27 GB/s"


@pytest.mark.parametrize("name", ["h100", "auto", "a/b", "..", "Mine", ""])
def test_names_that_cannot_be(name, folder, capsys, monkeypatch):
    with pytest.raises(LoweringError, match="allowed: lower-case letters"):
        target.store(name, {"platform": "cpu"})
    assert not list(folder.iterdir())


def test_a_wrong_name_is_told_before_the_work(monkeypatch, capsys):
    monkeypatch.setattr(timing, "ceilings", lambda: pytest.fail("measured before the name was checked"))
    assert cli.run(["bench", "ceilings", "--store", "h100"]) == 1
    assert "target name 'h100'; allowed: lower-case letters" in capsys.readouterr().err
    assert cli.run(["bench", "kernels", "--store", "mine"]) == 2
