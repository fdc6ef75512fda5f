"""What a program is compiled for: platform, architecture, memory, bandwidth, peak, interconnect, price.

Figures are data with their sources: `targets.yaml` beside this file holds the devices that ship with optx; a user adds one as
NAME.yaml in `user_folder()` (~/.config/optx/targets, below $XDG_CONFIG_HOME where that is set), or gives a file's path:

    like: h100                 # figures and kernels of that target, but for what stands here
    bandwidth: 3010 GB/s
    peak: {bf16: 781 TFLOP/s}
    price: {dollars: 2.2, per: hour}
    sources: [{title: our own runs, figures: [bandwidth, peak, price]}]
"""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import yaml

from optx import strict
from optx.errors import LoweringError, RecipeError, did_you_mean

LIFETIME = 3 * 8760  # hours over which a bought device is paid off
FIGURES = ("memory", "bandwidth", "peak", "link", "domain", "power", "energy", "price", "decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """Dense FLOP/s of matrix products by the type of their operands; None: no such unit, or no published figure."""

    fp32: float | None = None
    bf16: float | None = None
    fp16: float | None = None
    fp8: float | None = None
    int8: float | None = None
    fp4: float | None = None
    int4: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """What a device costs to rent (per hour) or to buy (per device)."""

    dollars: float
    per: Literal["hour", "device"]

    @property
    def hourly(self) -> float:
        """Dollars an hour: the rent, or the price over three years of use, without electricity."""
        return self.dollars if self.per == "hour" else self.dollars / LIFETIME


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What decode steps reach in one op on one format: seconds = bytes / (bandwidth x memory) + FLOPs / (peak x compute)."""

    memory: float  # share of the target's bandwidth
    compute: float | None = (
        None  # of the peak; above 1 where reads hide part of the arithmetic, None: where they hide all
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """What decode steps take beyond their bounds, measured with the kernels of optx: `optx bench decode --against-plan`."""

    launch: float  # s that a kernel which reads weights or a cache takes whatever it reads
    small: float  # s of any other kernel: norms, activations, rotations
    between: float  # s of a step that lie between its kernels
    efficiency: tuple[tuple[str, Efficiency], ...]  # by `key`

    def of(self, op: str, format: str) -> Efficiency | None:
        """None: not measured."""
        return dict(self.efficiency).get(key(op, format))


def key(op: str, format: str) -> str:
    """`matmul/int4` for matmul and `int4_g64`: groups of other sizes count as one format."""
    return f"{op}/{re.sub(r'_g[0-9]+', '', format)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where figures come from."""

    title: str
    figures: tuple[str, ...]  # of FIGURES
    url: str | None = None
    checked: str | None = None  # what the figures were compared with, and when; None: they were not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A device kind. None where a figure is not published, or depends on the machine."""

    name: str
    platform: str  # as jax calls it: cpu, gpu, tpu, ...
    arch: str  # sm90, v5e, ...
    memory: int | None = None  # bytes
    bandwidth: float | None = None  # bytes/s, read
    peak: Peak = Peak()
    link: float | None = None  # bytes/s between devices: sent and received together
    domain: int = 1  # devices that reach each other over the link
    power: float | None = None  # W, of a device at full load
    energy: float | None = None  # J a byte read from memory
    price: Price | None = None
    decode: Decode | None = None  # None: not measured, so bounds are all there is
    like: str | None = None  # the target whose tuned tiles it takes; None: its own
    sources: tuple[Source, ...] = ()

    def __str__(self):
        return self.name

    def source(self, figure: str) -> Source | None:
        """Where one of FIGURES comes from."""
        return next((source for source in self.sources if figure in source.figures), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeakRow:
    """`Peak` in text: `989.4 TFLOP/s`."""

    fp32: str | None = None
    bf16: str | None = None
    fp16: str | None = None
    fp8: str | None = None
    int8: str | None = None
    fp4: str | None = None
    int4: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """`Decode` in text: `4.1 us`."""

    launch: str
    small: str
    between: str
    efficiency: Mapping[str, Any]  # key: {memory: 0.93, compute: 2.4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A target in YAML: quantities are a number and a unit."""

    platform: str | None = None  # with `like`: None for its platform
    arch: str | None = None  # with `like`: None for its arch; else "any"
    like: str | None = None  # a target that ships with optx, of which this one is a variant
    detect: tuple[str, ...] = ()  # parts of JAX's `device_kind`; for targets that ship with optx
    memory: str | None = None  # 80 GB, 96 GiB
    bandwidth: str | None = None  # 3.35 TB/s
    peak: PeakRow = PeakRow()
    link: str | None = None  # 900 GB/s
    domain: int | None = None
    power: str | None = None  # 700 W
    energy: str | None = None  # 31.4 pJ/B
    price: Price | None = None
    decode: DecodeRow | None = None  # with `like`: None for its own, as long as bandwidth and peak are its own too
    sources: tuple[Source, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tier:
    """A place below a device's memory where KV may wait."""

    name: str
    bandwidth: float  # bytes/s, one way
    title: str
    url: str


_BYTES = {"B": 1, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_RATES = {f"{unit}/s": size for unit, size in _BYTES.items()}
_TIMES = {"us": 1e-6, "ms": 1e-3}
_FLOPS = {"GFLOP/s": 1e9, "TFLOP/s": 1e12, "PFLOP/s": 1e15}
UNITS: Mapping[str, Mapping[str, float]] = {
    "memory": _BYTES, "bandwidth": _RATES, "link": _RATES, "power": {"W": 1, "kW": 1e3}, "energy": {"pJ/B": 1e-12},
    "launch": _TIMES, "small": _TIMES, "between": _TIMES,
    **{field.name: _FLOPS for field in dataclasses.fields(Peak)},
}  # fmt: skip
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?) ?(\D\S*)")


def quantity(text: str, figure: str, where: str) -> float:
    """`3.35 TB/s` -> 3.35e12, in the units of a figure. Raises LoweringError naming `where` and the units allowed."""
    units = UNITS[figure]
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in units or not float(match[1]):
        raise LoweringError(f"{where}: got {text!r}; allowed: a number above 0 and one of {', '.join(units)}")
    return float(match[1]) * units[match[2]]


def read_row(name: str, data: Any, where: str, base: Target | None = None) -> Target:
    """A target from its row. base: what `like` names. Raises LoweringError naming the key."""
    try:
        row = strict.load(Row, data, where)
    except RecipeError as error:
        raise LoweringError(str(error)) from None
    if base is None and row.platform is None:
        raise LoweringError(f"{where}: missing field 'platform' (cpu, gpu, tpu, ...), or 'like' for a variant")
    for i, source in enumerate(row.sources):
        for figure in source.figures:
            if figure not in FIGURES:
                raise LoweringError(f"{where}.sources[{i}].figures: got {figure!r}{did_you_mean(figure, FIGURES)}")
    changes: dict[str, Any] = {
        figure: quantity(text, figure, f"{where}.{figure}")
        for figure in ("memory", "bandwidth", "link", "power", "energy")
        if (text := getattr(row, figure)) is not None
    }
    peaks = {
        field: quantity(text, field, f"{where}.peak.{field}")
        for field, text in vars(row.peak).items()
        if text is not None
    }
    if "memory" in changes:
        changes["memory"] = round(changes["memory"])
    changes |= {"peak": dataclasses.replace(base.peak if base else Peak(), **peaks)} if peaks else {}
    changes |= {
        field: value for field in ("platform", "arch", "domain", "price") if (value := getattr(row, field)) is not None
    }
    if row.decode is not None:
        changes["decode"] = _decode(row.decode, f"{where}.decode")
    elif {"bandwidth", "peak"} & changes.keys():
        changes["decode"] = None  # shares of figures that are no longer these
    if base is None:
        return Target(name=name, **({"arch": "any"} | changes), sources=row.sources)
    own = {figure for source in row.sources for figure in source.figures} | changes.keys()
    kept = (
        dataclasses.replace(s, figures=tuple(f for f in s.figures if f not in own)) for s in base.sources
    )  # what this row does not say again
    sources = (*row.sources, *(source for source in kept if source.figures))
    return dataclasses.replace(base, name=name, like=base.like or base.name, sources=sources, **changes)


def _decode(row: DecodeRow, where: str) -> Decode:
    times = {name: quantity(getattr(row, name), name, f"{where}.{name}") for name in ("launch", "small", "between")}
    if not isinstance(row.efficiency, Mapping):
        raise LoweringError(
            f"{where}.efficiency: got {row.efficiency!r}; allowed: a mapping such as matmul/int4: {{memory: 0.9}}"
        )
    shares = []
    for name, given in row.efficiency.items():
        try:
            share = strict.load(Efficiency, given, f"{where}.efficiency.{name}")
        except RecipeError as error:
            raise LoweringError(str(error)) from None
        if not all(value is None or value > 0 for value in (share.memory, share.compute)):
            raise LoweringError(f"{where}.efficiency.{name}: got {given!r}; allowed: shares above 0, 1 being all")
        shares.append((str(name), share))
    return Decode(**times, efficiency=tuple(shares))


def _load(text: str, where: str) -> Any:
    try:
        return yaml.load(text, strict.UniqueKeys)
    except (yaml.YAMLError, RecursionError) as error:
        raise LoweringError(f"{where}: not YAML: {error}") from None


_DATA = _load((Path(__file__).parent / "targets.yaml").read_text(encoding="utf-8"), "targets.yaml")
TARGETS: dict[str, Target] = {
    name: read_row(name, row, f"targets.yaml: {name}") for name, row in _DATA["targets"].items()
}
TIERS: tuple[Tier, ...] = tuple(
    Tier(**(tier | {"bandwidth": quantity(tier["bandwidth"], "bandwidth", "targets.yaml: tiers")}))
    for tier in _DATA["tiers"]
)
_KINDS = {mark: name for name, row in _DATA["targets"].items() for mark in row.get("detect", ())}


def detect() -> Target:
    """The target of the running machine's first device. Raises LoweringError for an accelerator not in the table."""
    kind = jax.devices()[0].device_kind
    if (name := named(kind)) is None:
        raise LoweringError(
            f"device {kind!r} has no target; name one: {', '.join(names())}; `optx bench ceilings --store NAME` makes one"
        )
    return TARGETS[name]


@functools.cache
def named(kind: str) -> str | None:
    """The name of the target of a `device_kind` of JAX, by the longest mark in it; None for one not in the table."""
    marks = [mark for mark in _KINDS if mark in kind]
    return _KINDS[max(marks, key=len)] if marks else None


def user_folder() -> Path:
    """Where a user's own targets lie, NAME.yaml each."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "optx" / "targets"


def names() -> tuple[str, ...]:
    """Targets that ship with optx, then the user's."""
    return (*TARGETS, *sorted(path.stem for path in user_folder().glob("*.yaml") if path.stem not in TARGETS))


def get(name: str) -> Target:
    """`auto`, a name of `names()`, or the path of a YAML file. Raises LoweringError naming the nearest, or the key of a file
    that is wrong."""
    if name == "auto":
        return detect()
    if name in TARGETS:
        return TARGETS[name]
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return read_file(Path(name))
    if name in names():
        return read_file(user_folder() / f"{name}.yaml")
    raise LoweringError(f"target {name!r} is not known{did_you_mean(name, ('auto', *names()))}")


def read_file(path: Path) -> Target:
    """A user's target, named as the file. Raises LoweringError naming file and key."""
    try:
        data = _load(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise LoweringError(f"{path}: cannot be read: {error}") from None
    if path.stem in TARGETS:
        raise LoweringError(
            f"{path}: {path.stem!r} ships with optx; give the file another name and say like: {path.stem}"
        )
    like, marks = (data.get("like"), data.get("detect")) if isinstance(data, dict) else (None, None)
    if marks is not None:
        raise LoweringError(f"{path}: detect: only for targets that ship with optx; name yours: --target {path.stem}")
    if like is not None and like not in tuple(TARGETS):
        raise LoweringError(f"{path}: like: got {like!r}{did_you_mean(str(like), TARGETS)}")
    return read_row(path.stem, data, str(path), TARGETS[like] if like else None)


def check_name(name: str) -> None:
    """Raises LoweringError for what a user's target cannot be called."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or name in ("auto", *TARGETS):
        raise LoweringError(
            f"target name {name!r}; allowed: lower-case letters, digits, '-', '_' and '.', and none of "
            f"{', '.join(('auto', *TARGETS))}"
        )


def store(name: str, row: Mapping[str, Any]) -> Path:
    """Writes a user's target, over one of that name. Raises LoweringError for a name that cannot be, or a wrong row."""
    check_name(name)
    path = user_folder() / f"{name}.yaml"
    read_row(name, row, str(path), TARGETS.get(row.get("like")))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(row), sort_keys=False), encoding="utf-8")
    return path
