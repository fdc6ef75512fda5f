"""Tuned tile sizes: data by device over a kernel's own rule."""

import dataclasses
import importlib
import json

import pytest

import optx.pallas.tiles as tiles
from optx.nn.attention import Attention
from optx.pallas import dispatch
from optx.target import TARGETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    rows: int = 64
    stages: int = 4


@pytest.fixture
def folder(tmp_path, monkeypatch):
    entries = [
        {"when": {"dim": 128, "kind": "int8"}, "tiles": {"stages": 3}},
        {"when": {"dim": 128}, "tiles": {"rows": 128}},
    ]
    (tmp_path / "h100.json").write_text(json.dumps({"op": entries}))
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    tiles.table.cache_clear()
    yield tmp_path
    tiles.table.cache_clear()


def test_the_first_entry_that_fits_sets_its_fields(folder):
    assert tiles.tuned("op", {"dim": 128, "kind": "int8"}, Sizes(), "h100") == Sizes(stages=3)
    assert tiles.tuned("op", {"dim": 128, "kind": "fp8"}, Sizes(), "h100") == Sizes(rows=128)
    assert tiles.tuned("op", {"dim": 64}, Sizes(), "h100") == Sizes()
    assert tiles.tuned("other", {"dim": 128}, Sizes(), "h100") == Sizes()


def test_a_device_without_a_table_runs_by_rule(folder):
    assert tiles.tuned("op", {"dim": 128}, Sizes(), "h200") == Sizes()
    assert tiles.current() == "cpu" and tiles.tuned("op", {"dim": 128}, Sizes()) == Sizes()


@pytest.mark.parametrize("path", sorted(tiles.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_tables_name_devices_kernels_and_fields(path):
    assert path.stem in TARGETS
    for op, entries in json.loads(path.read_text()).items():
        arch = TARGETS[path.stem].arch
        (row, *_) = [row for row in dispatch.rows(op) if row.arch == arch]
        fields = {field.name for field in dataclasses.fields(importlib.import_module(row.code.__name__).Tiles)}
        for entry in entries:
            assert entry.keys() == {"when", "tiles"} and entry["tiles"].keys() <= fields


def test_the_report_says_where_tiles_are_not_tuned():
    site = Attention(1024, heads=8, kv_heads=2, head_dim=128, rope=None, dtype="bfloat16").op_sites()[-1]
    assert dispatch.select(site, TARGETS["h100"]).note == ""
    assert dispatch.select(site, TARGETS["h200"]).note == "tiles by rule: not tuned on h200"
    assert dispatch.select(site, TARGETS["cpu"]).note == ""
