"""Runs every kernel of the running GPU, compiled for real, against its reference, over fresh random inputs.

    python -m optx.bench.verify_gpu [--op paged_decode] [--case 'int8*'] [--overlapped] [--seed 7] [--jobs 8] [--json FILE]

Prints one line a row: cases passed, worst error over its tolerance, whether two runs gave equal bits. Exit code 1 when a case
fails. Cases compile in `jobs` processes, as most of the time goes into compiling.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import fnmatch
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# The references are not timed: XLA need not try out ways of running their products, which took most of the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
)

import jax
import numpy as np
from tqdm import tqdm

from optx import target as targets
from optx.bench import verify_model
from optx.bench.cases import registry
from optx.pallas import late
from optx.report import table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One case on one row."""

    op: str
    row: str
    case: str
    error: float  # relative, the worst output
    tolerance: float
    repeatable: bool  # two runs gave equal bits
    raised: str = ""

    @property
    def passed(self) -> bool:
        return not self.raised and self.repeatable and self.error <= self.tolerance


def check(index: int, ops: tuple[str, ...], seed: int, overlapped: bool) -> list[Outcome]:
    """Case `index` of `ops` on every row that takes it."""
    case, target = registry.cases(ops)[index], targets.detect()
    rows = registry.kernels(case, target)
    if not rows:
        return []
    args, kwargs = case.make(np.random.default_rng([seed, index]))
    want = registry.reference(case.op, args, kwargs)
    return [_on_row(case, row, args, kwargs, want, overlapped) for row in rows]


def _on_row(case, row, args, kwargs, want, overlapped: bool) -> Outcome:
    def compare() -> dict:
        run = registry.jitted(late.overlapped(row.run) if overlapped else row.run, kwargs)
        dynamic, _ = registry.split(kwargs)
        first, second = (jax.block_until_ready(run(args, dynamic)) for _ in range(2))
        pairs = zip(registry.picked(case, first, kwargs), registry.picked(case, second, kwargs), strict=True)
        equal = all(np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)) for a, b in pairs)
        errors = registry.errors(case, first, want, kwargs)
        return {"error": max(errors) if all(e == e for e in errors) else float("nan"), "repeatable": equal}

    return _outcome(compare, op=case.op, row=row.name, case=case.name, tolerance=case.tolerance)


def check_model(recipe: str | None, seed: int) -> list[Outcome]:
    """A small model under `recipe`, with the kernels of the device and without."""

    def compare() -> dict:
        found = verify_model.compare(recipe, seed)
        none = "" if found.kernels else "no call site runs a kernel of the device"
        return {"error": found.worst, "repeatable": True, "raised": none}

    facts = {
        "op": "(model)",
        "row": "lowered",
        "case": recipe or "none",
        "tolerance": verify_model.TIPPED.get(recipe, verify_model.TOLERANCE),
    }
    return [_outcome(compare, **facts)]


def _outcome(compare: Callable[[], dict], **facts) -> Outcome:
    try:
        return Outcome(**facts, **compare())
    except Exception as error:  # noqa: BLE001 - whatever lowering, the assembler or the launch raise is the result
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return Outcome(**facts, error=float("nan"), repeatable=False, raised=said)


def verify(
    ops: tuple[str, ...] = (), seed: int = 0, jobs: int = 8, names: tuple[str, ...] = (), overlapped: bool = False
) -> list[Outcome]:
    """Outcomes of all cases of `ops` (all ops and small models when empty), on the running GPU; names: patterns (fnmatch) of
    which a case's name matches one, and no models then; overlapped: kernels as they are without graphs, and no models."""
    wanted = [
        index
        for index, case in enumerate(registry.cases(ops))
        if not names or any(fnmatch.fnmatchcase(case.name, name) for name in names)
    ]
    context = multiprocessing.get_context("spawn")
    outcomes: list[Outcome] = []
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        waiting = [pool.submit(check, index, ops, seed, overlapped) for index in wanted]
        if not ops and not names and not overlapped:
            waiting += [pool.submit(check_model, recipe, seed) for recipe in verify_model.RECIPES]
        for done in tqdm(concurrent.futures.as_completed(waiting), total=len(waiting), unit="case", mininterval=5):
            outcomes += done.result()
    return outcomes


def summary(outcomes: list[Outcome]) -> str:
    by_row = collections.defaultdict(list)
    for outcome in outcomes:
        by_row[outcome.op, outcome.row].append(outcome)
    lines = []
    for (op, row), mine in sorted(by_row.items()):
        worst = max(mine, key=lambda o: o.error / (o.tolerance or 1) if o.error == o.error else float("inf"))
        passed = sum(o.passed for o in mine)
        repeatable = all(o.repeatable for o in mine)
        lines.append([
            op,
            row,
            f"{passed} of {len(mine)}",
            f"{worst.error:.1e} of {worst.tolerance:.0e} ({worst.case})",
            "yes" if repeatable else "no",
        ])  # fmt: skip
    text = table(("op", "row", "cases passed", "worst error", "bit-equal twice"), lines)
    failed = [
        f"FAILED {o.op} {o.row} {o.case}: " + (o.raised or f"error {o.error:.2e}, repeatable {o.repeatable}")
        for o in outcomes
        if not o.passed
    ]
    return "\n".join([text, *failed])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", default=[], help="only this op; may be repeated")
    parser.add_argument("--case", action="append", default=[], help="only cases of such a name (*, ?); may be repeated")
    parser.add_argument(
        "--overlapped", action="store_true", help="as with graphs: false, where kernels come up while others end"
    )
    parser.add_argument("--seed", type=int, default=None, help="of the inputs; default: the clock")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write every outcome there")
    args = parser.parse_args()
    seed = int(time.time()) if args.seed is None else args.seed
    outcomes = verify(tuple(args.op), seed, args.jobs, tuple(args.case), args.overlapped)
    print(f"{jax.devices()[0].device_kind}, seed {seed}")
    print(summary(outcomes))
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(o) | {"passed": o.passed} for o in outcomes], indent=1))
    return 0 if outcomes and all(o.passed for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
