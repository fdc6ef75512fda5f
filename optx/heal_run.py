"""The training loop of healing.

AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on float32 weights, with products in the options' `dtype`; a batch may be run
in parts, and split over devices. Where the options limit `minutes`, the run's progress is the clock's where that is ahead of the
steps'. Equal inputs on one kind of device give equal bits, kills or not, as far as the clock does not decide: a checkpoint holds
all that the next step depends on.
"""

import concurrent.futures
import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from optx import heal_data, heal_plot, ir
from optx.checkpoint.source import fill
from optx.errors import HealError
from optx.heal_loss import cast, losses, narrow, routers, values_of
from optx.heal_phases import Phase, phases
from optx.heal_state import State
from optx.nn.moe import balanced_bias
from optx.passes.distill import Distill
from optx.pipeline import Healing

Values = dict[str, jax.Array]
BETAS = (0.9, 0.95)  # of AdamW: the second as in the training of language models (Llama 2, arXiv:2307.09288)


class Run:
    """One training: what moves is in `moving`, the student's other numbers in `still`, both float32."""

    def __init__(self, teacher: nnx.Module, student: nnx.Module, options: Distill, state: State):
        self.options, self.state = options, state
        self.forms = ir.abstract(teacher), ir.abstract(student)
        self.phases, self.routers = phases(teacher, student, options), routers(student)
        self.narrow = narrow(teacher), narrow(student)
        used = jax.devices()[: options.devices]
        mesh = jax.make_mesh((options.devices,), ("batch",), (jax.sharding.AxisType.Auto,), devices=used)
        self.whole = jax.NamedSharding(mesh, jax.P())
        self.split = jax.NamedSharding(mesh, jax.P(None, "batch"))
        self.teacher = jax.device_put(cast(values_of(teacher), self.narrow[0], options.dtype), self.whole)
        still = {
            name: jnp.array(x, jnp.float32, copy=True) for name, x in values_of(student).items()
        }  # moves are donated
        still = jax.device_put(still, self.whole)
        self.biases: Values = {name: still.pop(name) for name in self.routers if name}
        self.still, self.moving, self.opt = still, {}, None
        self.frozen: Values = {}  # `still` as products take it
        self.phase = -1  # index of the one that `moving` is of
        self.step, self.elapsed, self.tokens = 0, 0.0, 0
        self.tune = optax.chain(
            optax.clip_by_global_norm(options.clip),
            optax.scale_by_adam(*BETAS),
            optax.add_decayed_weights(
                options.weight_decay, mask=lambda values: jax.tree.map(lambda x: x.ndim > 1, values)
            ),
        )

    def value(self, name: str) -> jax.Array:
        """Of a parameter of the student, now."""
        return (self.still | self.moving | self.biases)[name]

    def reload(self) -> None:
        """The end of a run that was kept."""
        self._enter(len(self.phases) - 1)
        found = self.state.healed(_specs({"moving": self.moving, "biases": self.biases}))
        self.moving, self.biases = found["moving"], found["biases"]

    def train(self, rows: np.ndarray, held: np.ndarray, progress: bool = False) -> Healing:
        """rows int32[n, T] to train on, held int32[m, T] to measure on -> what was won back; the numbers are in `value`.

        Raises: HealError for a loss that is no number.
        """
        data, programs, measure = heal_data.batches(rows, self.options), self._programs(), self._measure(held)
        first, last, ahead = self._resume(data) or measure(), None, None
        with heal_data.bar("heal", 1.0, progress) as advance:
            advance(self._progress())
            while (place := self._progress()) < 1:
                began = time.perf_counter()
                self._enter(next(i for i, phase in enumerate(self.phases) if place < phase.stop))
                ahead, behind = self._advance(programs[self.phase], next(data), place), ahead
                due, last = self.step % self.options.every == 0, None
                self._tell(behind)  # while the device is at the next one
                if due:
                    self._tell(ahead)
                    last, ahead = measure(), None
                    self._save(data, first)
                self.elapsed += time.perf_counter() - began
                advance(min(self._progress(), 1) - place, f"step {self.step:,}")
            self._tell(ahead)
        healing = self._healing(first, last or measure())
        heal_plot.draw(self.state.folder, healing)
        self.state.finish({"moving": self.moving, "biases": self.biases}, healing)
        return healing

    def _progress(self) -> float:
        """Share of the run that is done."""
        limit = self.options.minutes
        return max(self.step / self.options.steps, 0.0 if limit is None else self.elapsed / (60 * limit))

    def _enter(self, phase: int) -> None:
        """Lets the phase's parameters move, the optimizer knowing nothing of them yet."""
        if phase == self.phase:
            return
        whole, self.phase = self.still | self.moving, phase
        self.moving = {name: whole.pop(name) for name in self.phases[phase].moving}
        self.still, self.opt = whole, jax.device_put(self.tune.init(self.moving), self.whole)
        self.frozen = cast(self.still, self.narrow[1], self.options.dtype)

    def _advance(self, program, batch: np.ndarray, place: float) -> dict[str, Any]:
        """Starts a step -> what is to be told of it; its figures are on their way."""
        parts = batch.reshape(self.options.accumulate, -1, self.options.context)
        rate = self.phases[self.phase].rate(place, 1 / self.options.steps, self.options)
        tokens = jax.device_put(parts.astype(np.int32), self.split)
        args = (self.frozen, self.teacher, tokens, jax.device_put(jnp.float32(rate), self.whole))
        self.moving, self.opt, self.biases, found = program(self.moving, self.opt, self.biases, *args)
        self.step += 1
        self.tokens += batch.size
        return {"step": self.step, "phase": self.phases[self.phase].name, "rate": rate} | found

    def _tell(self, found: dict[str, Any] | None) -> None:
        """Waits for a step's figures and logs them. Raises: HealError for a loss that is no number."""
        if found is None:
            return
        found = {name: float(x) if isinstance(x, jax.Array) else x for name, x in found.items()}
        if not math.isfinite(found["loss"]):
            raise HealError(
                f"distill: the loss is {found['loss']} at step {found['step']}, gradients' norm {found['norm']}; lower lr (now "
                f"{self.options.lr:g}) or clip, or take dtype: float32"
            )
        self.state.log(kind="train", **found, seconds=self.elapsed)

    def _programs(self) -> list:
        """A compiled step a phase, all compiled at once: compilation is no part of the run's minutes."""
        everything, lowered = self.still | self.moving, []
        shape = (self.options.accumulate, self.options.batch // self.options.accumulate, self.options.context)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.split)
        rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=self.whole)
        for phase in self.phases:
            moving = _specs({name: everything[name] for name in phase.moving})
            still = {name: x for name, x in everything.items() if name not in moving}
            frozen = jax.eval_shape(lambda x: cast(x, self.narrow[1], self.options.dtype), still)
            opt = jax.eval_shape(self.tune.init, moving)
            opt, frozen = (_specs(x, self.whole) for x in (opt, frozen))
            jitted = jax.jit(
                functools.partial(self._stepped, phase),
                donate_argnums=(0, 1, 2),
                out_shardings=self.whole,
                compiler_options=_compiler(),
            )
            lowered.append(jitted.lower(moving, opt, _specs(self.biases), frozen, _specs(self.teacher), tokens, rate))
        with concurrent.futures.ThreadPoolExecutor(len(lowered)) as pool:
            return list(pool.map(lambda one: one.compile(), lowered))

    def _stepped(
        self, phase: Phase, moving: Values, opt, biases: Values, frozen: Values, teacher: Values, tokens, rate
    ):
        """tokens int32[parts, B, T] -> (moving, opt, biases, figures) after a step."""

        def loss(moving, tokens):
            parts, loads = self._losses(teacher, frozen | moving | biases, tokens)
            value = parts["kl"] + self.options.hidden * parts["hidden"]
            return value + parts["auxiliary"] if "auxiliary" in parts else value, (parts, loads)

        def of_part(tokens):
            (value, (parts, loads)), slope = jax.value_and_grad(loss, has_aux=True)(moving, tokens)
            told = {name: parts[name] for name in ("kl", "hidden", "auxiliary") if name in parts}
            return slope, {"loss": value} | told, loads

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, tokens[0]))
        total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, of_part(part)), None), zero, tokens)
        slope, found, loads = total
        slope, found = jax.tree.map(lambda x: x / len(tokens), (slope, found))
        change, opt = self.tune.update(slope, opt, moving)
        share = {name: self.options.others if name in phase.gentle else 1.0 for name in moving}
        moved = {name: x - rate * share[name] * change[name] for name, x in moving.items()}
        biases = biases | {
            name: balanced_bias(biases[name], load, self.options.balance)
            for name, load in zip(self.routers, loads, strict=True)
            if name
        }
        return moved, opt, biases, found | {"norm": optax.tree.norm(slope)}

    def _losses(self, teacher: Values, student: Values, tokens):
        whole = cast(student, self.narrow[1], self.options.dtype)
        models = (fill(form, values.__getitem__) for form, values in zip(self.forms, (teacher, whole), strict=True))
        return losses(*models, tokens, hidden=self.options.hidden > 0)

    def _measure(self, held: np.ndarray):
        """-> a function that measures the held-out sequences and logs it."""
        most = self.options.batch // self.options.accumulate
        sizes = range(self.options.devices, min(len(held), most) + 1, self.options.devices)
        size = max((n for n in sizes if len(held) % n == 0), default=None)
        if size is None:
            raise HealError(
                f"distill.held_out: got {len(held)}; allowed: multiples of the {self.options.devices} devices"
            )
        parts = jax.device_put(held.reshape(-1, size, held.shape[1]), self.split)
        run = jax.jit(
            lambda teacher, student, tokens: self._losses(teacher, student, tokens)[0], compiler_options=_compiler()
        )

        def measure() -> dict[str, float]:
            student = self.still | self.moving | self.biases
            each = [run(self.teacher, student, tokens) for tokens in parts]
            mean = {name: float(np.mean([float(one[name]) for one in each])) for name in each[0]}
            found = {"kl": mean["kl"], "perplexity": math.exp(mean["nll"]), "teacher": math.exp(mean["teacher_nll"])}
            self.state.log(kind="held_out", step=self.step, **found, seconds=self.elapsed)
            return found

        return measure

    def _save(self, data: heal_data.Batches, first: Mapping[str, float]) -> None:
        arrays = {"moving": self.moving, "opt": self.opt, "biases": self.biases}
        facts = {"phase": self.phase, "step": self.step, "elapsed": self.elapsed, "tokens": self.tokens}
        self.state.save(self.step, arrays, facts | {"data": data.get_state(), "first": dict(first)})

    def _resume(self, data: heal_data.Batches) -> dict[str, float] | None:
        """Goes on from the newest checkpoint -> what was measured before the first step; None: there is none."""
        facts: dict[str, Any] | None = self.state.facts()
        self.state.begin(-1 if facts is None else facts["step"])
        if facts is None:
            return None
        self._enter(facts["phase"])
        found = self.state.arrays(_specs({"moving": self.moving, "opt": self.opt, "biases": self.biases}))
        self.moving, self.opt, self.biases = found["moving"], found["opt"], found["biases"]
        self.step, self.elapsed, self.tokens = facts["step"], facts["elapsed"], facts["tokens"]
        data.set_state(facts["data"])
        return facts["first"]

    def _healing(self, first: Mapping[str, float], last: Mapping[str, float]) -> Healing:
        before, after = self.forms
        return Healing(
            kl=(first["kl"], last["kl"]),
            perplexity=(first["teacher"], first["perplexity"], last["perplexity"]),
            steps=self.step,
            tokens=self.tokens,
            seconds=self.elapsed,
            moved=sum(x.size for x in self.moving.values()),
            weight_bytes=(ir.weight_bytes(before), ir.weight_bytes(after)),
            kv_bytes=tuple(tree.cache_plan().bytes(1, tree.context) for tree in self.forms),
            folder=str(self.state.folder),
        )


def _compiler() -> dict[str, Any] | None:
    """Options of XLA. On GPUs it tries out ways to run every product, which takes minutes: more than a short run wins by it."""
    gpu = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    return gpu if jax.default_backend() == "gpu" else None


def _specs(values, sharding=None):
    """Shapes, types and places of arrays; sharding: in place of theirs."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), values)
