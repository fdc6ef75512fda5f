"""Quality through the paged caches: teacher-forced text in chunks, rows compacted when the engine would compact them.

What `optx.evaluate` computes in one forward attends to all that came before; here tokens see what the cache has kept of them, in
its format. Windows and scored tokens are those of `optx.evaluate`, but for `prompt` first tokens of each that are not scored:
policies that compact a prompt do so at its end. A window may be longer than the model's context where positions are counted
inside the cache.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from optx.cache import Address, Layout, Ragged
from optx.engine.compaction import Compaction, Compactor, compact, fed_again, share_out, table_for
from optx.engine.head_pages import HeadTables
from optx.engine.pages import PageTable
from optx.engine.request import Request, Sampling
from optx.errors import RequestError
from optx.evaluate import Evaluation, Model, figures, texts_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedEvaluation(Evaluation):
    """The same figures with what the caches held."""

    page_size: int
    pages: tuple[int, ...]  # most that a window held at once, by token group
    whole_pages: int  # of a window of which nothing is thrown away, a group
    curve: tuple[tuple[int, float], ...]  # (tokens seen, perplexity of the scored ones since the point before)


class PagedForward:
    """One row of a program over pages of its own: `run` gives outputs of `of` for every token of a window."""

    def __init__(self, program, *, context: int, chunk: int, page_size: int, encode=None):
        """context: tokens of the longest window; chunk: tokens of a step; encode: text to token ids, for policies that say
        something to the model."""
        self.program, self.chunk, self.page_size, self._encode = program, chunk, page_size, encode
        specs = program.plan.groups
        behind = fed_again(specs, context)
        widths = [PageTable.width_for(spec, context, chunk, page_size, behind) for spec in specs]
        self._widths = widths
        self._layouts = [Layout(pages=width, page_size=page_size, slots=1) for width in widths]
        self._treedef = jax.tree.structure(program.plan.abstract(self._room))
        self._compact = [
            jax.jit(functools.partial(compact, program.plan, self._treedef, group), donate_argnums=0)
            for group in range(len(widths))
        ]
        self._step = jax.jit(self._advance, donate_argnums=1)
        self._shares = {}
        self.pages = [0] * len(widths)

    @property
    def _room(self):
        return self._layouts or [Layout(pages=1, page_size=self.page_size, slots=1)]

    def run(self, ids: Sequence[int], prompt: int) -> Iterator[tuple[int, jax.Array]]:
        """ids of a window, of which the first `prompt` are its prompt -> (place of the first token, logits float32[count, V])."""
        room = {"rows": 1, "page_size": self.page_size}
        groups = zip(self.program.plan.groups, self._widths, strict=True)
        tables = [table_for(spec, width, width=width, **room) for spec, width in groups]
        compactor = Compactor(tables, self._encode)
        compactor.ask = lambda due: self._share_out(caches, due)
        request = Request(
            id=0, prompt=list(ids[:prompt]), sampling=Sampling(max_tokens=len(ids) + 1), stop_ids=frozenset(), row=0
        )
        caches = jax.tree.leaves(self.program.plan.init(self._room))
        while request.computed < len(ids):
            compactor.plan([request])
            for each in compactor.take()[0]:
                numbers = np.int32(each.length), each.keep
                caches = self._compact[each.group](caches, each.table, *numbers)
            again = bool(request.replay)
            tokens = request.replay[0][request.replayed :] if again else ids[request.computed :]
            tokens = tokens[: min(self.chunk, compactor.room(request))]
            start = request.computed + (request.replayed if again else 0)
            caches, logits = self._step(self.program.leaves, caches, *self._arguments(tables, tokens, start, prompt))
            if again:
                request.replayed += len(tokens)
            else:
                yield request.computed, logits[: len(tokens)]
                request.computed += len(tokens)

    def _share_out(self, caches, due: Sequence[Compaction]) -> np.ndarray:
        """As `Stepper.share_out`."""
        groups = tuple(one.group for one in due)
        if groups not in self._shares:
            self._shares[groups] = jax.jit(functools.partial(share_out, self.program.plan, self._treedef, groups))
        tables = np.stack([one.table for one in due])
        return np.asarray(self._shares[groups](caches, tables, np.int32(due[0].length), due[0].keep[0]))

    def _arguments(
        self, tables: Sequence[PageTable | HeadTables], tokens: Sequence[int], start: int, prompt: int
    ) -> tuple:
        """Of a step, on the host."""
        count = len(tokens)
        given = np.zeros(self.chunk, np.int32)
        given[:count] = tokens
        writes = []
        for group, table in enumerate(tables):
            slots = table.append(0, count)
            write = np.full((*slots.shape[:-1], self.chunk), table.pool.pages * table.page_size, np.int32)
            write[..., :count] = slots
            writes.append(write)
            self.pages[group] = max(self.pages[group], table.pool.used)
        address = Address(
            tables=tuple(table.tables.copy() for table in tables),
            lengths=tuple(table.lengths_by_head.copy() for table in tables),
            writes=tuple(writes),
            slots=np.zeros(1, np.int32),
            prompts=np.full(1, prompt, np.int32),
        )
        return given, np.full(1, count, np.int32), np.int32(start), address

    def _advance(self, leaves, caches, tokens, counts, start, address):
        model = self.program.merge(leaves)
        ragged = Ragged.dense(1, self.chunk, counts)
        real = jnp.arange(self.chunk) < counts
        ragged = dataclasses.replace(
            ragged, rows=jnp.where(real, 0, 1), positions=jnp.where(real, start + ragged.positions, 0)
        )
        hidden, caches, _ = model.backbone(tokens, ragged, jax.tree.unflatten(self._treedef, caches), address)
        return jax.tree.leaves(caches), model.head(hidden)


def evaluate_paged(
    model: Model,
    text: str,
    *,
    context: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    against: Model | None = None,
    prompt: int | None = None,
    chunk: int = 256,
    page_size: int = 64,
    points: int = 16,
    progress: bool = False,
) -> PagedEvaluation:
    """Perplexity of `model` on `text` through its paged caches, of `against` in one forward.

    prompt: first tokens of a window, which are not scored; None: one; points: of the curve, over the tokens of a window.
    Raises: RequestError as `evaluate`, and for a policy that compacts prompts without a prompt to compact.
    """
    plan, chosen = model.program.plan, prompt or 1
    once = [spec.evict for spec in plan.groups if spec.evict is not None and spec.evict.once]
    if once and prompt is None or not 1 <= chosen < context:
        raise RequestError(
            f"evaluate: prompt {prompt} of windows of {context} tokens; allowed: 1 to {context - 1}"
            + (f", where {once[0]} compacts it" if once else "")
        )
    windows = texts_of(model, text, context, stride, max_windows, against, endless=plan.endless)
    if min(len(window) for window, _ in windows) <= chosen:
        raise RequestError(f"evaluate: a window has no more than the {chosen} tokens of a prompt; give more text")
    encode = functools.partial(model.tokenizer.encode, add_special=False)
    row = PagedForward(model.program, context=context, chunk=chunk, page_size=page_size, encode=encode)
    sums, total = np.zeros((points, 2)), np.zeros(4)
    for window, fresh in tqdm(windows, desc="evaluate paged", unit="window", disable=not progress):
        other = None if against is None else _reference(against, window)
        for start, logits in row.run(window, chosen):
            nll, kl, agree, weight = _scores(logits, other, window, start, max(fresh, chosen))
            total += [np.sum(nll * weight), kl, agree, np.sum(weight)]
            at = np.minimum((start + 1 + np.arange(len(weight))) * points // context, points - 1)
            np.add.at(sums, at, np.stack([nll * weight, weight], axis=1))
    done = [(-(-(i + 1) * context // points), float(np.exp(a / b))) for i, (a, b) in enumerate(sums) if b]
    return PagedEvaluation(
        **figures(model, windows, total, against is not None, least=chosen),
        page_size=page_size,
        pages=tuple(row.pages),
        whole_pages=-(-context // page_size),
        curve=tuple(done),
    )


def _reference(model: Model, window: Sequence[int]) -> jax.Array:
    tokens = np.asarray([window], np.int32)
    return model.program.forward(model.program.leaves, tokens, jnp.asarray([len(window)], jnp.int32))[0]


def _scores(logits, other, window, start, fresh):
    """Of tokens that logits [count, V] of the tokens from `start` on predict: (-log p [count], sums of KL and of agreements,
    weight [count]: 1 for tokens of the window from place `fresh` on)."""
    count = logits.shape[0]
    after = start + 1 + np.arange(count)
    weight = ((after < len(window)) & (after >= fresh)).astype(np.float64)
    targets = np.asarray([*window, 0], np.int32)[np.minimum(after, len(window))]
    nll, kl, agree = _compare(logits, None if other is None else other[start : start + count], targets, weight)
    return np.asarray(nll, np.float64), float(kl), float(agree), weight


@jax.jit
def _compare(logits, other, targets, weight):
    log_q = jax.nn.log_softmax(logits, axis=-1)
    nll = -jnp.take_along_axis(log_q, targets[:, None], axis=-1)[:, 0]
    if other is None:
        return nll, 0, 0
    log_p = jax.nn.log_softmax(other, axis=-1)
    kl = jnp.sum(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) * weight)
    return nll, kl, jnp.sum((jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)) * weight)
