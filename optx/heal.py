"""Healing: a converted model is trained against the uncompiled one until it answers as that does (passes/distill.py).

What can go wrong is said here, before a weight is touched; heal_run.py trains. A run is kept in the user's cache under a name
that tells all that determines it: one that was killed goes on, one that has ended is read.
"""

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from optx import heal_data, heal_memory, heal_sample, ir, lora
from optx.checkpoint.source import fill
from optx.errors import HealError
from optx.heal_loss import converted, values_of
from optx.heal_phases import phases
from optx.passes.distill import Distill
from optx.pipeline import Healing, Record
from optx.report import unhealed_text
from optx.tensor import is_packed


def check(teacher: nnx.Module, student: nnx.Module, options: Distill, room: int | None) -> None:
    """Raises HealError for what cannot be healed, from shapes alone. room: bytes of a device, None: unknown."""
    phases(teacher, student, options)
    for tree in (teacher, student):
        for path, variable in ir.params(tree).items():
            if is_packed(value := variable.get_raw_value()):
                raise HealError(
                    f"distill: {path} is packed ({ir.tensor_text(value)}); healing needs dense weights: load with "
                    "weights='dense' and quantize in stage 'weights', which comes after it"
                )
    if options.context > teacher.context:
        raise HealError(f"distill.context: got {options.context}; allowed: up to the model's {teacher.context}")
    if options.devices > (here := jax.local_device_count()):
        raise HealError(f"distill.devices: got {options.devices}; this machine has {here}")
    heal_data.check_reader()
    heal_data.files(options)
    heal_memory.check(teacher, student, options, room)


def check_planned(planned) -> None:
    """Raises HealError, from shapes and text, for what a recipe's healing cannot do on this machine."""
    for (_, rules), before in zip(planned.recipe.steps(), planned.trees):
        for _, options in rules:
            if isinstance(options, Distill):
                check(planned.source.tree, before, options, heal_memory.available())
                heal_sample.starts(planned.source, options)
                written = np.zeros((options.sample, options.context), np.int32)  # what will be sampled counts as rows
                heal_data.sequences(planned.source, options, written)


def plan_text(planned) -> str:
    """What a recipe's healing would do and need on the plan's target, and which passes want some; '' where none do."""
    lines = [text] if (text := unhealed_text(planned.records)) else []
    for options, parts in _asked(planned):
        tokens = options.steps * options.batch * options.context
        limit = "" if options.minutes is None else f" or {options.minutes:g} minutes of training"
        room = heal_memory.available(planned.target)
        has = f"; {planned.target} has {ir.size_text(room)}" if room else ""
        lines.append(
            f"healing, run by compile: {options.steps:,} steps of {options.batch} sequences of {options.context:,} tokens, "
            f"{tokens:,} tokens in all{limit}\nmemory for it: at least {heal_memory.told(parts)} a device{has}"
        )
    return "".join(f"{line}\n\n" for line in lines)


def plan_dict(planned) -> list[dict]:
    """The same as plain data."""
    return [{"options": dataclasses.asdict(options), "bytes": parts} for options, parts in _asked(planned)]


def _asked(planned) -> list[tuple[Distill, dict[str, float]]]:
    """Options of each step of healing, and the bytes that it needs."""
    steps = zip(planned.recipe.steps(), planned.trees)
    asked = [(options, before) for (_, rules), before in steps for _, options in rules if isinstance(options, Distill)]
    return [(options, heal_memory.needed(planned.trees[0], before, options)) for options, before in asked]


def applied(
    source, teacher: nnx.Module, student: nnx.Module, step, record: Record, progress: bool = False
) -> nnx.Module:
    """The student after a recipe's step of healing; what was won back goes into its record. step: as `Recipe.steps` gives it."""
    start, (_, options) = time.perf_counter(), step[1][0]
    out, record.healing = heal(source, teacher, student, options, progress=progress)
    record.seconds += time.perf_counter() - start
    return out


def heal(
    source,
    teacher: nnx.Module,
    student: nnx.Module,
    options: Distill,
    *,
    folder: Path | None = None,
    progress: bool = False,
) -> tuple[nnx.Module, Healing]:
    """-> (the student with what it has learned, its dtypes as they were; what was won back).

    source: of the uncompiled model, for its tokenizer. folder: that keeps the state; None: one of the user's cache by all that
    determines the result. A run that has ended is read from there, one that was killed goes on.
    Raises: HealError before anything is trained for what cannot be healed, and for a loss that is no number.
    """
    from optx.heal_run import Run  # orbax and optax take a third of a second, which every verb would pay
    from optx.heal_state import State

    check(teacher, student, options, heal_memory.available())
    folder = folder or cache() / key(teacher, student, options)
    state = State(folder)
    changed = converted(teacher, student)
    if options.train == "lora":
        outside = [p for p in lora.projections(student) if f"{p}/weight" not in changed]
        student = lora.adapted(student, outside, options.rank, options.seed)
    run = Run(teacher, student, options, state)
    if (healing := state.result()) is None:
        rows, held = heal_data.sequences(source, options, _written(source, teacher, options, progress))
        healing = run.train(rows, held, progress)
    else:
        run.reload()
    moved = {name: run.value(name).astype(x.dtype) for name, x in values_of(student).items()}
    return lora.merged(fill(student, moved.__getitem__)), healing


def _written(source, teacher: nnx.Module, options: Distill, progress: bool) -> np.ndarray | None:
    """The sample that the recipe asks for."""
    if not options.sample:
        return None
    told = [fingerprint(teacher), options.sample, options.context, options.seed]
    told += [options.prime, heal_data.digests(options)] if options.prime else []
    shard = cache() / f"sample-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:20]}{heal_data.SHARD}"
    return heal_sample.sampled(teacher, heal_sample.starts(source, options), options, shard, progress)


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optx" / "heal"


def key(teacher: nnx.Module, student: nnx.Module, options: Distill) -> str:
    """Tells runs apart: by what both models are, by a sample of their numbers, by options and files."""
    told = {"options": dataclasses.asdict(options), "files": heal_data.digests(options), "jax": jax.__version__}
    told |= {"device": jax.devices()[0].device_kind, "models": [fingerprint(teacher), fingerprint(student)]}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:20]


def fingerprint(model: nnx.Module) -> str:
    """Of the printed tree and of the first 1,024 numbers of each parameter."""
    head = jax.jit(lambda x: x.reshape(-1)[:1024])
    digest = hashlib.sha256(ir.describe(model).encode())
    for name, value in values_of(model).items():
        digest.update(name.encode() + np.asarray(head(value)).tobytes())
    return digest.hexdigest()
