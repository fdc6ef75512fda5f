"""What a program is compiled for: platform, architecture, memory and bandwidth."""

import dataclasses

import jax

from optx.errors import LoweringError, did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A device kind. Bandwidth and memory are the vendor's figures; None where they depend on the machine."""

    name: str
    platform: str  # as jax calls it: cpu, gpu, tpu
    arch: str  # sm90, v5e, ...
    memory: int | None = None  # bytes
    bandwidth: float | None = None  # bytes/s, read

    def __str__(self):
        return self.name


# Sources: NVIDIA H100, H200 and B200 data sheets (SXM); Google Cloud TPU system architecture pages (a chip).
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(name="cpu", platform="cpu", arch="any"),
        Target(name="h100", platform="gpu", arch="sm90", memory=80 * 10**9, bandwidth=3.35e12),
        Target(name="h200", platform="gpu", arch="sm90", memory=141 * 10**9, bandwidth=4.8e12),
        Target(name="b200", platform="gpu", arch="sm100", memory=180 * 10**9, bandwidth=7.7e12),
        Target(name="tpu-v5e", platform="tpu", arch="v5e", memory=16 * 10**9, bandwidth=8.2e11),
        Target(name="tpu-v6e", platform="tpu", arch="v6e", memory=32 * 10**9, bandwidth=1.64e12),
        Target(name="tpu-v7x", platform="tpu", arch="v7x", memory=192 * 10**9, bandwidth=7.37e12),
    )
}

_KINDS = {
    "cpu": "cpu",
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
    "v5 lite": "tpu-v5e",
    "v6 lite": "tpu-v6e",
    "7x": "tpu-v7x",
}


def detect() -> Target:
    """The target of the running machine's first device. Raises LoweringError for an accelerator not in the table."""
    kind = jax.devices()[0].device_kind
    if (name := named(kind)) is None:
        raise LoweringError(f"device {kind!r} has no target; name one: {', '.join(TARGETS)}")
    return TARGETS[name]


def named(kind: str) -> str | None:
    """The name of the target of a `device_kind` of JAX; None for one not in the table."""
    return next((name for mark, name in _KINDS.items() if mark in kind), None)


def get(name: str) -> Target:
    """`auto` or a name of TARGETS. Raises LoweringError naming the nearest."""
    if name == "auto":
        return detect()
    if name not in TARGETS:
        raise LoweringError(f"target {name!r} is not known{did_you_mean(name, ('auto', *TARGETS))}")
    return TARGETS[name]
