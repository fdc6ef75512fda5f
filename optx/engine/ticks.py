"""From a plan to the arrays of a dispatch: what a row's request asks for is written down once, when the row gets it."""

import numpy as np

from optx.engine.head_pages import HeadTables
from optx.engine.pages import PageTable
from optx.engine.plan import Plan
from optx.engine.request import STOPS, Request
from optx.engine.sampling import BIASES, KNOBS, Way
from optx.engine.step import Tick


def _by_head(table: PageTable | HeadTables) -> tuple[int, ...]:
    """The axis of heads in writes, where there is one."""
    return (len(table.tables),) if isinstance(table, HeadTables) else ()


class TickBuilder:
    """Columns by row of the batch, and `build`. chunks: numbers of tokens that programs are compiled for, ascending; ticks:
    decodes of a program, of which a dispatch may run fewer."""

    def __init__(self, tables: list[PageTable | HeadTables], rows: int, chunks: tuple[int, ...], ticks: int):
        self.tables, self.chunks, self.ticks = tables, chunks, ticks
        self._owner: list[Request | None] = [None] * rows
        self._seeds = np.zeros(rows, np.uint32)
        self._stops = np.full((rows, STOPS), -1, np.int32)
        self._prompts = np.zeros(rows, np.int32)
        self._sampling = np.zeros((rows, len(KNOBS) + BIASES), np.float32)
        self._biased = np.full((rows, BIASES), -1, np.int32)

    def build(self, plan: Plan, way: Way) -> Tick:
        rows = np.array([part.row for part in plan.parts])
        for part in plan.parts:
            if self._owner[part.row] is not part.request:
                self._write_down(part.row, part.request)
        alone = plan.alone
        batch = 1 if alone else len(self._owner)
        at = np.zeros(1, np.int64) if alone else rows  # places of the parts in the batch

        def place(values, dtype, fill=0) -> np.ndarray:
            out = np.full(batch, fill, dtype)
            out[at] = values
            return out

        rounds = np.array([part.rounds for part in plan.parts])
        lengths = np.array([len(part.tokens) for part in plan.parts])
        ahead = np.where(plan.ticks > 1, rounds - 1, 0)  # slots taken for ticks after the first
        total = self._size(int(lengths.sum())) if plan.chunk else batch * plan.width
        if not plan.chunk:  # where each part's tokens are
            within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            at_tokens = np.repeat(at * plan.width, lengths) + within
        else:
            at_tokens = np.arange(lengths.sum())
        ticks = 1 if plan.chunk or plan.width > 1 else self.ticks
        tokens, writes = self._tokens(plan, at_tokens, total), self._writes(plan, ticks, at_tokens, total)
        chosen_from = slice(None) if not alone else rows
        biases = BIASES if way == "full" else 0
        return Tick(
            tokens=tokens,
            counts=place(lengths, np.int32),
            starts=place([part.start for part in plan.parts], np.int32),
            slots=place(rows, np.int32, len(self._owner)),
            tables=tuple(table.tables[:, chosen_from] for table in self.tables),
            lengths=tuple(
                np.stack([place(lengths[rows] - ahead, np.int32) for lengths in table.lengths_by_head])
                for table in self.tables
            ),
            writes=writes,
            limits=place(rounds, np.int32),
            stops=self._stops[chosen_from],
            prompts=self._prompts[chosen_from],
            biased=self._biased[chosen_from, :biases],
            seeds=self._seeds[chosen_from],
            sampling=self._sampling[chosen_from, : len(KNOBS) + biases].copy(),
            masks=self._masks(plan, at, batch),
            ticks=ticks,
            mixed=plan.mixed,
            verify=plan.width > 1,
        )

    def blank(
        self, way: Way, *, chunk: int | None = None, mixed: bool = False, single: bool = False, width: int = 1
    ) -> Tick:
        """A dispatch in which no row takes part, with the shapes of one that has `chunk` prompt tokens (rounded up as `build`
        does), or of decodes of `width` tokens a row, or (`single`) of one row."""
        ticks = 1 if chunk or width > 1 else self.ticks
        batch = 1 if single or (chunk and not mixed) else len(self._owner)
        total, biases = chunk or batch * width, BIASES if way == "full" else 0
        none = np.zeros(batch, np.int32)
        pad = [table.pool.pages * table.page_size for table in self.tables]
        return Tick(
            tokens=np.full(total, 0 if chunk else -1, np.int32),
            counts=none,
            starts=none,
            slots=np.full(batch, len(self._owner), np.int32),
            tables=tuple(table.tables[:, :batch] for table in self.tables),
            lengths=tuple(np.zeros((len(table.tables), batch), np.int32) for table in self.tables),
            writes=tuple(
                np.full((ticks, *_by_head(table), total), slot, np.int32)
                for table, slot in zip(self.tables, pad, strict=True)
            ),
            limits=none,
            stops=self._stops[:batch],
            prompts=none,
            biased=np.full((batch, biases), -1, np.int32),
            seeds=self._seeds[:batch],
            sampling=np.zeros((batch, len(KNOBS) + biases), np.float32),
            ticks=ticks,
            mixed=mixed,
            verify=width > 1,
        )

    def _masks(self, plan: Plan, at: np.ndarray, batch: int) -> np.ndarray | None:
        """None where no row that draws a token follows a grammar."""
        held = [(i, p.request.constraint.mask) for i, p in zip(at, plan.parts) if p.request.constraint and p.rounds]
        if not held:
            return None
        masks = np.full((batch, len(held[0][1])), 0xFFFFFFFF, np.uint32)
        for i, mask in held:
            masks[i] = mask
        return masks

    def _tokens(self, plan: Plan, at: np.ndarray, total: int) -> np.ndarray:
        tokens = np.full(total, 0 if plan.chunk else -1, np.int32)
        tokens[at] = [token for part in plan.parts for token in part.tokens]
        return tokens

    def _writes(self, plan: Plan, ticks: int, at: np.ndarray, total: int) -> tuple[np.ndarray, ...]:
        """Flat slots [ticks, T] by group, [ticks, K, T] of heads apart; padding goes to the page that takes it."""
        rounds = np.array([part.rounds for part in plan.parts])
        out = []
        for table, slots in zip(self.tables, plan.writes, strict=True):
            write = np.full((ticks, *_by_head(table), total), table.pool.pages * table.page_size, np.int32)
            if plan.ticks == 1:
                write[0, ..., at] = slots.T
            else:
                tick = np.arange(slots.shape[-1]) - np.repeat(np.cumsum(rounds) - rounds, rounds)
                write[tick, ..., np.repeat(at, rounds)] = slots.T
            out.append(write)
        return tuple(out)

    def _size(self, count: int) -> int:
        return next(chunk for chunk in self.chunks if chunk >= count)

    def _write_down(self, row: int, request: Request) -> None:
        how = request.sampling
        self._owner[row] = request
        self._seeds[row], self._prompts[row] = how.seed, request.subject
        ids = sorted(request.stop_ids)[:STOPS]
        self._stops[row] = -1
        self._stops[row, : len(ids)] = ids
        self._sampling[row], self._biased[row] = 0, -1
        self._sampling[row, : len(KNOBS)] = how.knobs
        for i, (token, bias) in enumerate((how.logit_bias or {}).items()):
            self._biased[row, i], self._sampling[row, len(KNOBS) + i] = token, bias
