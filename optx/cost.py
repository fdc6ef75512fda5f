"""Bytes that one decode step moves, read off the tree's shapes: weights as stored, KV as its specs keep it."""

import dataclasses

from flax import nnx

from optx import ir
from optx.target import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBytes:
    """One decode step: a new token for each of `batch` sequences of `context` tokens."""

    batch: int
    context: int
    weights: int  # read
    kv: float  # read; metadata and states included
    kv_token: float  # that one token (and one row's states) leaves behind
    held: float  # in memory: all weights, and the caches of all sequences

    @property
    def total(self) -> float:
        """Bytes read."""
        return self.weights + self.kv

    def seconds(self, target: Target) -> float | None:
        """Lower bound of the step's time, bytes / bandwidth; None where the bandwidth is not known."""
        return self.total / target.bandwidth if target.bandwidth else None

    def to_dict(self) -> dict:
        return {
            "weights_read": self.weights,
            "kv_read": self.kv,
            "total": self.total,
            "kv_per_token": self.kv_token,
            "memory": self.held,
        }


def step_bytes(tree: nnx.Module, batch: int = 1, context: int = 1) -> StepBytes:
    """The step's bytes on a concrete or abstract tree."""
    plan = tree.cache_plan()
    kv = plan.bytes(batch, context)
    return StepBytes(
        batch=batch,
        context=context,
        weights=weights_read(tree, batch),
        kv=kv,
        kv_token=plan.bytes(1, 1),
        held=ir.weight_bytes(tree) + kv,
    )


def weights_read(tree: nnx.Module, batch: int = 1) -> int:
    """Weight bytes that one decode step reads: all but the rows of an untied input embedding, and of experts those that some
    of the `batch` tokens take, as many as uniform routing makes expect. A draft module is not run."""
    unread = [part for part in (tree.draft, tree.output and tree.embed) if part is not None]
    return ir.active_bytes(tree, batch) - sum(ir.active_bytes(part, batch) for part in unread)
