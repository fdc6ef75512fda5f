"""A target's decode figures out of measured steps, by least squares: `optx bench decode --against-plan --store NAME`."""

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import yaml

from optx import target as targets
from optx.bench import ceilings, timing
from optx.bench.profile import Profile, Sample
from optx.errors import RequestError
from optx.target import Decode, Efficiency, Source, Target, key

COMPUTES = ("matmul", "head", "experts")  # ops whose arithmetic grows with the batch and their bytes do not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observed:
    """A step that was profiled."""

    profile: Profile
    rest: float  # s of kernels beside those of ops
    small: int  # such kernels, as the plan counts them
    seconds: float  # of the step by the host's clock


def fit(observed: Sequence[Observed], target: Target) -> Decode:
    """The figures that predict the steps best: non-negative least squares of every kernel's time, each as a part of its step's.

    Raises: RequestError when nothing was profiled.
    """
    if not observed:
        raise RequestError("--store: no kernel was timed, so there is nothing to keep; run it on an NVIDIA GPU")
    rows = [(sample, 1 / each.seconds) for each in observed for sample in each.profile.samples]
    memory = sorted({key(s.op, s.format) for s, _ in rows})
    computes = _computing([s for s, _ in rows], target)
    matrix = np.zeros((len(rows), 1 + len(memory) + len(computes)))
    wanted = np.zeros(len(rows))
    for i, (sample, weight) in enumerate(rows):
        name = key(sample.op, sample.format)
        matrix[i, 0] = weight * sample.kernels
        matrix[i, 1 + memory.index(name)] = weight * sample.bytes / target.bandwidth
        if name in computes:
            column = 1 + len(memory) + list(computes).index(name)
            matrix[i, column] = weight * sample.flops / computes[name]
        wanted[i] = weight * sample.seconds
    from scipy.optimize import nnls  # slow to import

    found, _ = nnls(matrix, wanted)
    launch, shares, arithmetic = found[0], found[1 : 1 + len(memory)], found[1 + len(memory) :]
    compute = {name: 1 / x for name, x in zip(computes, arithmetic, strict=True) if x > 0}
    return Decode(
        launch=float(launch),
        small=sum(each.rest for each in observed) / max(1, sum(each.small for each in observed)),
        between=max(0.0, statistics.median(each.seconds - each.profile.total for each in observed)),
        efficiency=tuple(
            (name, Efficiency(memory=float(1 / share), compute=compute.get(name) and float(compute[name])))
            for name, share in zip(memory, shares, strict=True)
            if share > 0  # else all of its time is launches, and its bound is as good
        ),
    )


def _computing(samples: Sequence[Sample], target: Target) -> Mapping[str, float]:
    """Peak by key of ops whose arithmetic can be told from their bytes: those that ran at two intensities or more."""
    intensities: dict[str, set[float]] = collections.defaultdict(set)
    peaks: dict[str, float | None] = {}
    for sample in samples:
        if sample.op in COMPUTES and sample.bytes:
            name = key(sample.op, sample.format)
            intensities[name].add(float(f"{sample.flops / sample.bytes:.3g}"))
            peaks[name] = getattr(target.peak, sample.dtype)
    return {name: peak for name, peak in peaks.items() if peak and len(intensities[name]) > 1}


def row(decode: Decode) -> dict:
    """As `optx.target.DecodeRow`."""
    shares = {
        name: {field: round(value, 4) for field, value in vars(share).items() if value is not None}
        for name, share in decode.efficiency
    }
    times = {name: f"{max(1e6 * getattr(decode, name), 0.001):.3f} us" for name in ("launch", "small", "between")}
    return {**times, "efficiency": shares}


def store(name: str, decode: Decode, device: str, source: Source) -> Path:
    """Writes the figures into the user's target `name`, beside what stands in it; a new one is a variant of the device's, or what
    `optx bench ceilings` measures where the device is not in the table.

    Raises: LoweringError for a name that cannot be, RequestError for a device of another machine that is not in the table.
    """
    targets.check_name(name)
    path = targets.user_folder() / f"{name}.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else _fresh(device)
    kept = [
        other | {"figures": left}
        for other in data.get("sources", ())
        if (left := [figure for figure in other["figures"] if figure != "decode"])
    ]
    own = {"title": source.title, "figures": ["decode"]}
    return targets.store(name, data | {"decode": row(decode), "sources": [*kept, own]})


def _fresh(device: str) -> dict:
    like = targets.named(device)
    if like and targets.TARGETS[like].bandwidth:
        return {"like": like}
    if device != jax.devices()[0].device_kind:
        raise RequestError(
            f"--store: {device} is not in the table of targets and not here to be measured; fit it there"
        )
    return ceilings.row(timing.ceilings())
