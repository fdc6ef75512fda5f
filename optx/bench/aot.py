"""Compiles GPU kernels with the real assembler on a machine without a GPU, and reads registers, spills and shared memory.

    python -m optx.bench.aot [--arch sm90] [--op paged_decode]      (needs the wheels of `optx[cuda13]`; one arch a process)

Nothing is executed: that a kernel compiles says nothing of its speed or of its numbers. For sm100, static estimates follow.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import re
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import scipy.sparse
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from optx import target as targets
from optx.bench import estimate
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
    shared: int = 232448  # bytes of shared memory that a block may have
    accelerated: bool = True  # whether code is for this architecture alone (sm_90a)

    @property
    def capability(self) -> str:
        return f"{self.major}.{self.minor}"

    def textproto(self) -> str:
        info = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 49152,
            "shared_memory_per_core": self.shared + 1024,
            "shared_memory_per_block_optin": self.shared,
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
        extension = " feature_extension: ACCELERATED_FEATURES" if self.accelerated else ""
        capability = f"major: {self.major} minor: {self.minor}{extension}"
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
    # For rows that are meant for more than one architecture; shared memory of a block and of an SM as the guide has them.
    "sm80": Chip(
        name="NVIDIA A100-SXM4-80GB",
        major=8,
        cores=108,
        bandwidth=2039000000000,
        l2=41943040,
        clock=1.41,
        memory=85899345920,
        shared=166912,
        accelerated=False,
    ),
    "sm89": Chip(
        name="NVIDIA GeForce RTX 4090",
        major=8,
        minor=9,
        cores=128,
        bandwidth=1008000000000,
        l2=75497472,
        clock=2.52,
        memory=25769803776,
        shared=101376,
        accelerated=False,
    ),
    "sm120": Chip(
        name="NVIDIA GeForce RTX 5090",
        major=12,
        cores=170,
        bandwidth=1792000000000,
        l2=100663296,
        clock=2.41,
        memory=34359738368,
        shared=101376,
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
    tmem_columns: int = 0  # of tensor memory, of 512
    sass: str = dataclasses.field(default="", repr=False)

    @property
    def matrix(self) -> str:
        """Matrix instructions in the SASS and how many: UTC*MMA are tcgen05 (2CTA: of two blocks), *GMMA wgmma, else a warp's."""
        found = collections.Counter(re.findall(r"\b(UTC[A-Z]*MMA(?:\.2CTA)?|[HQI]GMMA|[HQIO]MMA)\b", self.sass))
        return ", ".join(f"{count} {name}" for name, count in sorted(found.items())) or "-"

    @property
    def looped(self) -> int:
        """Reads and writes of local memory inside loops: spilled registers that cost time again and again."""
        lines = self.sass.splitlines()
        part = _circles(lines)
        again = np.bincount(part)[part] > 1 if lines else []
        return sum(bool(re.search(r"\b(LDL|STL)\b", line) and more) for line, more in zip(lines, again, strict=True))


def _circles(lines: list[str]) -> np.ndarray:
    """int[lines of SASS], equal where control can go from one to the other and back: strongly connected parts of what follows
    what. Code that stands behind a loop and jumps back into it, as waits for barriers do, is no loop around all before it."""
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    after = []
    for i, line in enumerate(lines):
        code = line.split("*/", 1)[-1].strip()
        if (to := re.search(r"\b(?:BRA|CALL)\b.*?(\.L_x_\d+)", code)) and to[1] in labels:
            after.append((i, labels[to[1]]))
        if i + 1 < len(lines) and not re.match(r"(BRA\S*\s+`|EXIT|RET)", code):
            after.append((i, i + 1))
    first, then = np.array(after, int).reshape(-1, 2).T
    graph = scipy.sparse.coo_array((np.ones(len(first)), (first, then)), shape=(len(lines), len(lines)))
    return connected_components(graph, connection="strong")[1]


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
        asked = resources.read_text() if resources.exists() else ""
        smem = re.search(r"smem_scratch_bytes=(\d+)", asked)
        tmem = re.findall(r"tmem_(?:collective_)?scratch_cols=(\d+)", asked)  # one of them is 0
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
                    tmem_columns=sum(map(int, tmem)),
                    sass=sass.read_text() if sass.exists() else "",
                )
            )
    return found


def compile_rows(arch: str, ops: tuple[str, ...] = ()) -> tuple[list[list[str]], list[str]]:
    """Lines of (row, case, kernel, registers, spills, shared and tensor memory, matrix instructions) of every case on every GPU
    row of `arch`; failures."""
    here = (t for t in targets.TARGETS.values() if t.arch == arch)
    target = next(here, targets.Target(name=arch, platform="gpu", arch=arch))
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
                    f"{k.spill_bytes} ({k.looped} in loops)", f"{k.smem_bytes / 1024:.0f} KiB", str(k.tmem_columns), k.matrix,
                ])  # fmt: skip
    return lines, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm90", choices=sorted(CHIPS))
    parser.add_argument("--op", action="append", default=[], help="only this op; may be repeated")
    args = parser.parse_args()
    lines, failures = compile_rows(args.arch, tuple(args.op))
    header = (
        "row",
        "case",
        "kernel",
        "registers",
        "spilled bytes",
        "shared memory",
        "tensor memory",
        "matrix instructions",
    )
    print(table(header, lines))
    print("\n".join(failures))
    if args.arch == "sm100":
        print(estimate.text(estimate.estimates()))
    return 1 if failures or not lines else 0


if __name__ == "__main__":
    sys.exit(main())
