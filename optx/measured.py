"""Decode steps as predicted and as measured, op by op: what `optx bench decode --against-plan` writes and reports read."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optx import strict
from optx.errors import RecipeError, RequestError, no_such_path

FORM = "optx decode against plan 1"
REST = "everything else"  # kernels that no op's name is in: norms, rotations, sampling, ops that XLA fused
BETWEEN = "between kernels"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpTime:
    """Ops of one kind and one format in one step."""

    op: str  # as `OpCost.op`, or REST, or BETWEEN
    format: str  # weights or cache are stored in; "" for REST and BETWEEN
    kernels: int  # as predicted
    bytes: float
    bound_seconds: float
    predicted_seconds: float
    measured_seconds: float | None = None  # None: the device tells no kernels, or has none by that name

    @property
    def ratio(self) -> float | None:
        """Predicted over measured."""
        return self.predicted_seconds / self.measured_seconds if self.measured_seconds else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """A decode step of `batch` sequences of `context` tokens."""

    model: str
    recipe: str
    batch: int
    context: int
    bound_seconds: float
    predicted_seconds: float
    measured_seconds: float  # by the host's clock, the mean of many steps in a row
    ops: tuple[OpTime, ...]
    kernels: Sequence[
        tuple[str, float]
    ] = ()  # (name, seconds) in order, of one step; empty where the device tells none

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted_seconds / self.measured_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Steps of one device."""

    form: str = FORM
    device: str
    date: str
    target: str  # whose figures predict
    source: str | None  # where those were measured; None: the prediction is the bounds alone
    steps: tuple[StepTimes, ...]
    decode: Mapping[str, Any] | None = None  # the target's figures as YAML has them (optx.target.DecodeRow)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def read(path: Path) -> Measured:
    """A file of `optx bench decode --against-plan --out`. Raises RequestError naming file and key."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"--measured {no_such_path(str(path))}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RequestError(f"--measured {path}: cannot be read as JSON: {error}") from None
    form = data.get("form") if isinstance(data, dict) else None
    if form != FORM:
        raise RequestError(
            f"--measured {path}: form: got {form!r}; allowed: {FORM!r}, as `optx bench decode --against-plan --out` writes"
        )
    try:
        return strict.load(Measured, data, str(path))
    except RecipeError as error:
        raise RequestError(f"--measured {error}") from None
