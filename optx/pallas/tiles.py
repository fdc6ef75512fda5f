"""Tuned tile sizes as data: `tuned/<device>.json`, over the rule by which a kernel chooses them from its shapes.

A table holds for an op a list of {"when": facts, "tiles": fields}; the first entry whose facts all hold sets its fields. Devices
without a table, H200 and B200 so far, run by rule, and the report of a compile says so.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from optx import target

FOLDER = Path(__file__).parent / "tuned"


def tuned[T](op: str, facts: Mapping[str, Any], rule: T, device: str | None = None) -> T:
    """`rule`, a frozen dataclass, with the fields tuned for a call with these facts.

    device: a target's name (h100, ...); None: the one that is lowered for.
    """
    for entry in table(device or current()).get(op, ()):
        if all(facts.get(name) == wanted for name, wanted in entry["when"].items()):
            return dataclasses.replace(rule, **entry["tiles"])
    return rule


@functools.cache
def table(device: str | None) -> Mapping[str, Any]:
    """The tuned entries of a device by op; empty where it has none."""
    path = FOLDER / f"{device}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def current() -> str | None:
    """Name of the target that is lowered for: the abstract device when compiling ahead of time, else the first."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return target.named(abstract.device_kind if abstract else jax.devices()[0].device_kind)
