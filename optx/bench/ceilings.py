"""The running machine as a target: `optx bench ceilings --store NAME`, then `optx plan MODEL --target NAME`."""

import datetime
import os
from pathlib import Path

import jax

from optx import target as targets
from optx.bench.timing import Ceilings


def row(ceilings: Ceilings) -> dict:
    """The row of a target that reads and multiplies as fast as was measured; all else as its kind of device, where that is
    in the table. Fields: optx.target.Row."""
    device = jax.devices()[0]
    like = targets.named(device.device_kind)
    found = {"like": like} if like else {"platform": device.platform, "arch": "any"}
    memory = (device.memory_stats() or {}).get("bytes_limit") or (_ram() if device.platform == "cpu" else None)
    peaks = {"bf16": ceilings.bf16, "fp8": ceilings.fp8}
    measured = ["bandwidth", "peak", *(["memory"] if memory else [])]
    return {
        **found,
        **({"memory": f"{memory / 1e9:.3f} GB"} if memory else {}),
        "bandwidth": f"{ceilings.read / 1e9:.2f} GB/s",
        "peak": {name: f"{rate / 1e12:.3f} TFLOP/s" for name, rate in peaks.items() if rate},
        "sources": [
            {
                "title": f"optx bench ceilings on {ceilings.device}, {datetime.date.today()}, jax {jax.__version__}",
                "figures": measured,
            }
        ],
    }


def _ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def store(ceilings: Ceilings, name: str) -> Path:
    """Writes the machine as the user's target `name`, over one of that name; where: `optx.target.user_folder()`.

    Raises: LoweringError for a name that cannot be.
    """
    return targets.store(name, row(ceilings))
