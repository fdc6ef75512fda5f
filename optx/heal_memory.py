"""Bytes that healing needs on each device at least, told before a weight is read."""

import math
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from optx import ir, lora
from optx.errors import HealError
from optx.heal_loss import ROWS, converted, values_of
from optx.passes.distill import Distill
from optx.target import Target


def needed(teacher: nnx.Module, student: nnx.Module, options: Distill) -> dict[str, float]:
    """{what: bytes}, from abstract trees. What moves has a float32 weight, a gradient (another while parts of a batch are
    added up) and two moments; products are made of a copy in `options.dtype`; of activations, what enters each block, one
    block's own, and of a thousand tokens both models' logits, log-probabilities and gradients."""
    size = jnp.dtype(options.dtype).itemsize
    counts = {name: math.prod(value.shape) for name, value in values_of(student).items()}
    moving = sum(counts.values())
    if options.train != "all":
        moving = sum(counts[name] for name in converted(teacher, student))
    if options.train == "lora":
        shapes = (ir.get(student, path).weight.get_value().shape for path in lora.projections(student))
        moving += options.rank * sum(sum(shape) for shape in shapes)
    tokens = options.batch // (options.accumulate * options.devices) * options.context
    vocab, width = student.embed.table.get_value().shape
    widest = max(
        value.shape[-1] for value in values_of(student).values() if len(value.shape) > 1 and value.shape[-1] != vocab
    )
    states = len(student.layers) * (3 if options.hidden else 1)
    return {
        "teacher": size * ir.weight_count(teacher),
        "student": (4 + size) * sum(counts.values()),
        "optimizer": (12 + 4 * (options.accumulate > 1)) * moving,
        "activations": size * tokens * (states * width + 8 * widest),
        "logits": 6 * 4 * min(tokens, ROWS) * vocab,
    }


def available(target: Target | None = None) -> int | None:
    """Bytes of a device: of the target, of this machine where None; None: it does not tell."""
    if target is not None:
        return target.memory
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if jax.default_backend() == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def told(parts: Mapping[str, float]) -> str:
    """`3.1 GB (teacher 0.3 GB, ...)`."""
    each = ", ".join(f"{name} {ir.size_text(size)}" for name, size in parts.items())
    return f"{ir.size_text(sum(parts.values()))} ({each})"


def check(teacher: nnx.Module, student: nnx.Module, options: Distill, room: int | None) -> None:
    """Raises HealError where a device of `room` bytes cannot hold it; None: unknown, which is not refused."""
    parts = needed(teacher, student, options)
    if room is not None and sum(parts.values()) > room:
        raise HealError(
            f"distill: needs at least {told(parts)} a device, which has {ir.size_text(room)}; raise accumulate, lower batch or "
            "context, take train: lora, or more devices"
        )
