"""Compiles GPU kernels with the real assembler on a machine without a GPU, and reads registers, spills and shared memory.

    python -m optx.bench.aot [--arch sm90] [--op paged_decode]      (needs the wheels of `optx[cuda13]`; one arch a process)

Nothing is executed: that a kernel compiles says nothing of its speed or of its numbers.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding
from tqdm import tqdm

from optx import target as targets
from optx.bench.cases import registry
from optx.report import table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What XLA and the assembler must know of a GPU. Sources: NVIDIA data sheets, CUDA programming guide, section 16."""

    name: str
    major: int
    cores: int
    bandwidth: int  # bytes/s
    l2: int  # bytes
    clock: float  # GHz
    memory: int  # bytes
    minor: int = 0

    @property
    def capability(self) -> str:
        return f"{self.major}.{self.minor}"

    def textproto(self) -> str:
        info = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 49152,
            "shared_memory_per_core": 233472,
            "shared_memory_per_block_optin": 232448,
            "threads_per_core_limit": 2048,
            "core_count": self.cores,
            "fpus_per_core": 128,
            "block_dim_limit_x": 2147483647,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "memory_bandwidth": self.bandwidth,
            "l2_cache_size": self.l2,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
            "device_address_bits": 64,
            "device_vendor": '"NVIDIA Corporation"',
            "name": f'"{self.name}"',
            "driver_version": '"13.0.0"',
            "runtime_version": '"13.0.0"',
            "compile_time_toolkit_version": '"13.0.0"',
            "dnn_version": '"9.28.1"',
        }
        fields = " ".join(f"{key}: {value}" for key, value in info.items())
        capability = f"major: {self.major} minor: {self.minor} feature_extension: ACCELERATED_FEATURES"
        return (
            f"gpu_device_info {{ {fields} cuda_compute_capability {{ {capability} }} }} "
            'platform_name: "CUDA" dnn_version_info { major: 9 minor: 28 patch: 1 } '
            f'device_description_str: "{self.name}"'
        )


CHIPS = {
    "sm90": Chip(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        cores=132,
        bandwidth=3352320000000,
        l2=52428800,
        clock=1.98,
        memory=84942979072,
    ),
    "sm100": Chip(
        name="NVIDIA B200",
        major=10,
        cores=148,
        bandwidth=7672320000000,
        l2=132644864,
        clock=1.965,
        memory=191514411008,
    ),
}


@dataclasses.dataclass(frozen=True)
class Device(AbstractDevice):
    """An abstract device that says its architecture, which Mosaic GPU asks for: without, it takes 9.0."""

    compute_capability: str = "9.0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembled:
    """What ptxas says of one kernel."""

    kernel: str
    registers: int
    spill_bytes: int  # stores + loads
    stack_bytes: int
    smem_bytes: int = 0  # a block's scratch in shared memory
    sass: str = dataclasses.field(default="", repr=False)


def compile_for(chip: Chip, function, *args) -> list[Assembled]:
    """Compiles `function` for args (arrays or jax.ShapeDtypeStruct) and returns what was assembled, Mosaic GPU kernels only.

    Raises: whatever lowering or ptxas raise. MOSAIC_GPU_DUMP_* are set for the call.
    """
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=chip.name, topology="1x1x1", target_config=chip.textproto()
    )
    where = SingleDeviceSharding(topology.devices[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    abstract = Device(device_kind=chip.name, num_cores=chip.cores, platform="cuda", compute_capability=chip.capability)
    mesh = AbstractMesh((1,), ("_",), (AxisType.Explicit,), abstract_device=abstract)
    with tempfile.TemporaryDirectory() as folder, _environment(folder), jax.sharding.use_abstract_mesh(mesh):
        jax.jit(function).trace(*jax.tree.map(place, args)).lower().compile()
        return _read(Path(folder))


@contextlib.contextmanager
def _environment(folder: str):
    names = ("PTXAS", "PTX", "SASS")
    values = {"MOSAIC_GPU_DUMP_TO": folder, **{f"MOSAIC_GPU_DUMP_{name}": "1" for name in names}}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _read(folder: Path) -> list[Assembled]:
    found = []
    for log in sorted(folder.glob("*.ptxas")):
        sass, resources = log.with_suffix(".sass_ctrl"), log.with_suffix(".resources.txt")
        smem = re.search(r"smem_scratch_bytes=(\d+)", resources.read_text()) if resources.exists() else None
        for entry in re.split(r"(?=Compiling entry function)", log.read_text())[1:]:
            name = re.search(r"Compiling entry function '([^']+)'", entry)[1]
            used = re.search(r"Used (\d+) registers", entry)
            spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
            stack, stores, loads = (int(x) for x in spills.groups()) if spills else (0, 0, 0)
            found.append(
                Assembled(
                    kernel=name,
                    registers=int(used[1]) if used else -1,
                    spill_bytes=stores + loads,
                    stack_bytes=stack,
                    smem_bytes=int(smem[1]) if smem else 0,
                    sass=sass.read_text() if sass.exists() else "",
                )
            )
    return found


def compile_rows(arch: str, ops: tuple[str, ...] = ()) -> tuple[list[list[str]], list[str]]:
    """Lines of (row, case, kernel, registers, spills, shared memory) of every case on every GPU row of `arch`; failures."""
    target = next(t for t in targets.TARGETS.values() if t.arch == arch)
    lines, failures = [], []
    for case in tqdm(registry.cases(ops), unit="case", file=sys.stderr, mininterval=5):
        rows = registry.kernels(case, target)
        if not rows:
            continue
        args, kwargs = case.make(np.random.default_rng(0))
        dynamic, _ = registry.split(kwargs)
        for row in rows:
            try:
                found = compile_for(CHIPS[arch], registry.jitted(row.run, kwargs), args, dynamic)
            except Exception as error:  # noqa: BLE001 - whatever lowering or the assembler raise is the result of the case
                failures.append(f"FAILED {row.op} {row.name} {case.name}: {str(error).strip().splitlines()[0][:200]}")
                continue
            for k in found:
                lines.append([
                    f"{row.op} {row.name}", case.name, k.kernel.removesuffix("_mosaic_gpu_kernel"), str(k.registers),
                    str(k.spill_bytes), f"{k.smem_bytes / 1024:.0f} KiB",
                ])  # fmt: skip
    return lines, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm90", choices=sorted(CHIPS))
    parser.add_argument("--op", action="append", default=[], help="only this op; may be repeated")
    args = parser.parse_args()
    lines, failures = compile_rows(args.arch, tuple(args.op))
    print(table(("row", "case", "kernel", "registers", "spilled bytes", "shared memory"), lines))
    print("\n".join(failures))
    return 1 if failures or not lines else 0


if __name__ == "__main__":
    sys.exit(main())
