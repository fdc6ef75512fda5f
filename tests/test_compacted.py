"""Compacted prompts that other requests go on from: the same answers as without, pages add up, room is made, refusals."""

import copy
import dataclasses
import functools

import families
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import optx
from optx.cache import CacheSpec, Stream
from optx.engine.compacted import CompactedPrompts
from optx.engine.compaction import table_for
from optx.engine.engine import Engine, EngineOptions
from optx.engine.pages import PagePool, PageTable
from optx.engine.prefix import refusal
from optx.engine.request import Request, Sampling
from optx.errors import RequestError
from optx.eviction import KVzip
from optx.passes.evict_kv import EvictKV
from optx.recipe import Recipe

P = 4
OPTIONS = EngineOptions(rows=3, context=48, page_size=P, chunks=(4, 8))
KVZIP = EvictKV(policy="kvzip", ratio=0.5, sinks=1, recent=1, part=6, instruction="")
RULES = {
    "as many a head": KVZIP,
    "over a layer": dataclasses.replace(KVZIP, over="layer"),
    "over the model": dataclasses.replace(KVZIP, over="model"),
}
OTHERS = {
    "streaming_llm": EvictKV(policy="streaming_llm", budget=8, sinks=2, slack=4),
    "h2o": EvictKV(policy="h2o", budget=8, slack=4),
    "tova": EvictKV(policy="tova", budget=8, slack=4),
    "snapkv": EvictKV(policy="snapkv", ratio=0.5, recent=2),
}
CONTEXT = families.prompt(22, seed=3)
QUESTIONS = [families.prompt(length, seed=40 + length) for length in (1, 3, 6, 9)]
HOW = Sampling(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def program():
    model = families.concrete("qwen3", num_hidden_layers=2)
    return functools.cache(lambda rule: optx.compile(model, Recipe(cache=(rule,))).program)


def run(engine, prompts, context=None, how=HOW):
    requests = [engine.add_request(prompt, how, context=context) for prompt in prompts]
    engine.run()
    engine.check()
    return [request.output for request in requests]


@pytest.mark.parametrize("name", RULES)
def test_a_prompt_that_comes_again_is_not_computed_again(name, program):
    wanted = run(Engine(program(RULES[name]), dataclasses.replace(OPTIONS, prefix_cache=False)), [CONTEXT])
    kept = Engine(program(RULES[name]), OPTIONS)
    kept.warm_up()
    compiled = kept.compiles
    assert run(kept, [CONTEXT]) == wanted
    stats = kept.stats()
    assert stats.prefix_hit_tokens == 0 and stats.pages_cached > 0
    assert run(kept, [CONTEXT]) == run(kept, [CONTEXT, CONTEXT])[:1] == wanted
    again = kept.stats()
    assert again.prefix_hit_tokens == 3 * 21 and again.prefix_asked_tokens == 4 * 22
    assert again.pages_cached == stats.pages_cached and kept.compiles == compiled
    # 3 chunks of a prompt, 4 of what is fed again, its last token and 7 decodes; or these 8 alone, of two rows 1 + 8.
    assert (stats.steps, again.steps - stats.steps) == (15, 8 + 9)


@pytest.mark.parametrize("name", RULES)
def test_questions_about_one_context_go_on_from_it(name, program):
    """Alone, together, in another order, with other chunks and out of pages: an answer depends on nothing but tokens."""
    prompts = [[*CONTEXT, *question] for question in QUESTIONS]
    make = lambda **changes: Engine(program(RULES[name]), dataclasses.replace(OPTIONS, **changes))  # noqa: E731
    wanted = [run(make(prefix_cache=False), [prompt], 22)[0] for prompt in prompts]
    kept = make()
    assert run(kept, prompts, 22) == wanted
    assert run(kept, prompts[::-1], 22) == wanted[::-1]
    assert kept.stats().prefix_hit_tokens >= 5 * 21
    scarce = make(chunks=(8, 16), ticks=4, overlap=True, mixed=True, pages=max(t.width for t in kept._tables) + 1)
    assert run(scarce, prompts, 22) == wanted
    whole = run(make(), [prompts[2]])
    assert whole != wanted[2:3], "compacted with its question, a prompt keeps other tokens"
    assert run(kept, [prompts[2]]) == whole, "and what was kept of its beginning is not taken for it"


@pytest.mark.parametrize("name", ["as many a head", "over the model"])
def test_windows_step_back_and_are_kept_beside(name):
    """Gemma's layers with a window of 6 hold what they held before the prompt was fed again."""
    model = families.concrete("gemma3")
    program = optx.compile(model, Recipe(cache=(RULES[name],))).program
    prompts = [[*CONTEXT, *question] for question in QUESTIONS]
    make = lambda **changes: Engine(program, dataclasses.replace(OPTIONS, **changes))  # noqa: E731
    wanted = run(make(prefix_cache=False), prompts, 22)
    kept = make(chunks=(8, 16))
    assert run(kept, prompts, 22) == run(kept, prompts, 22) == wanted
    assert kept.stats().prefix_hit_tokens >= 4 * 21
    most = Engine(optx.compile(model).program, OPTIONS)
    assert wanted != [run(most, [prompt])[0] for prompt in prompts], "the budget binds"


def test_a_window_that_steps_back_has_freed_nothing():
    spec = CacheSpec(kind="paged", streams=(Stream(name="k", shape=(1, 8)),), window=7)
    width = PageTable.width_for(spec, 40, 4, P, 10)
    for told in (True, False):
        table = PageTable(spec, PagePool(width), rows=1, width=width, page_size=P)
        table.append(0, 12), table.append(0, 10)
        before = table.listed(0), int(table.lengths[0])
        table.will_step_back(0, told)
        for count in (4, 4, 2):
            table.append(0, count)
        if not told:
            with pytest.raises(RequestError, match="has freed tokens"):
                table.truncate(0, 22)
            continue
        table.truncate(0, 22)
        assert (table.listed(0), int(table.lengths[0])) == before
        table.will_step_back(0, False)
        table.append(0, 8)
        assert min(table.listed(0)) > min(before[0]), "and then it frees again"


@pytest.mark.parametrize("name", ["as many a head", "over the model"])
def test_room_is_made_of_what_no_request_needs(name, program):
    prompts = [families.prompt(30 + i, seed=i) for i in range(6)]
    plain = Engine(program(RULES[name]), dataclasses.replace(OPTIONS, prefix_cache=False))
    wanted = run(plain, prompts)
    tight = Engine(program(RULES[name]), dataclasses.replace(OPTIONS, pages=max(t.width for t in plain._tables)))
    assert run(tight, prompts) == wanted and 0 < len(tight.prefix.entries) < 6
    assert run(tight, prompts[::-1]) == wanted[::-1]
    tight.prefix.clear()
    assert all(table.pool.available == table.pool.pages for table in tight._tables)


def test_what_nobody_sends_again_is_given_back(program):
    engine = Engine(program(KVZIP), OPTIONS)
    other = families.prompt(17, seed=8)
    run(engine, [CONTEXT, other])
    held = engine.stats().pages_cached
    assert engine.forget(CONTEXT, keep=CONTEXT) == 0
    assert engine.forget(CONTEXT) == held - engine.stats().pages_cached > 0
    assert len(engine.prefix.entries) == 1


@pytest.mark.parametrize("name", OTHERS)
def test_what_depends_on_the_question_is_refused(name, program):
    engine = Engine(program(OTHERS[name]), OPTIONS)
    assert engine.prefix is None and "depends on what came after it" in engine.prefix_refusal
    assert refusal(program(OTHERS[name]).plan) == engine.prefix_refusal and refusal(program(KVZIP).plan) is None
    with pytest.raises(RequestError, match="context: the cache compacts no prompt apart from a question"):
        engine.add_request(CONTEXT, HOW, context=22)


@pytest.mark.parametrize("context", [1, 23])
def test_a_context_is_part_of_the_prompt(context, program):
    with pytest.raises(RequestError, match=f"got {context}; allowed: 2 to the prompt's 22 tokens"):
        Engine(program(KVZIP), OPTIONS).add_request(CONTEXT, HOW, context=context)


# Without a model: what the store says of its pages.


class Rows:
    """Rows over two groups, in one of which heads keep different numbers; `content` is what a device would hold."""

    def __init__(self, rows=3, pages=14):
        self.tables, self.content = [], []
        for over in ("head", "model"):
            policy = KVzip(ratio=0.5, sinks=0, recent=1, over=over, layer=None if over == "head" else 0)
            spec = CacheSpec(kind="paged", streams=(Stream(name="k", shape=(2, 8)),), evict=policy)
            self.tables.append(table_for(spec, pages, rows=rows, width=12, page_size=P))
            self.content.append(np.full((len(self.tables[-1].tables), (pages + 1) * P), -1))
        self.store = CompactedPrompts(self.tables)
        for group, table in enumerate(self.tables):
            table.make_room = functools.partial(self.store.make_room, group)
        self.held: dict[int, list[list[list[int]]]] = {}  # tokens of a row by group and head
        self.known: dict[tuple[int, ...], list[list[list[int]]]] = {}  # the same of a prompt that is kept

    def move(self, copies):
        for one in copies:
            for content, (from_, to) in zip(self.content, one.slots, strict=True):
                for head, (source, target) in zip(content, zip(np.atleast_2d(from_), np.atleast_2d(to)), strict=True):
                    head[target] = head[source]

    def append(self, row, tokens):
        for table, content, held in zip(self.tables, self.content, self.held[row], strict=True):
            for head, slots, mine in zip(content, np.atleast_2d(table.append(row, len(tokens))), held, strict=True):
                head[slots] = tokens
                mine += tokens

    def start(self, row, prompt, draw):
        request = Request(id=0, prompt=prompt, sampling=Sampling(), stop_ids=frozenset(), row=row)
        self.held[row] = [[[] for _ in table.tables] for table in self.tables]
        self.move(self.store.borrow(request, len(prompt)))
        if request.computed:
            self.held[row] = copy.deepcopy(self.known[tuple(prompt)])
            return
        self.append(row, prompt)
        request.computed = len(prompt)
        whole, apart = self.tables
        counts = [draw(len(prompt)) for _ in apart.tables]
        whole.compact(row, len(prompt), 0)
        apart.keep(row, counts)
        self.held[row] = [[prompt[: whole.policy.kept(len(prompt))]], [prompt[:count] for count in counts]]
        self.move(self.store.insert(request))
        self.known[tuple(prompt)] = copy.deepcopy(self.held[row])

    def check(self):
        kept = list(self.store.entries.values())
        for group, (table, content) in enumerate(zip(self.tables, self.content, strict=True)):
            pools = getattr(table.pool, "heads", [table.pool])
            for h, (pool, head) in enumerate(zip(pools, content, strict=True)):
                owned = [0] * pool.pages
                for row, held in self.held.items():
                    length = int(table.lengths_by_head[h, row])
                    slots = np.arange(length)
                    assert head[table.tables[h, row, slots // P] * P + slots % P].tolist() == held[group][h]
                    for page in table.tables[h, row, : -(-length // P)]:
                        owned[page] += 1
                used = sum(count > 0 for count in owned)
                for entry in kept:
                    lent = entry.lent[group] if isinstance(entry.lent[group], list) else [entry.lent[group]]
                    for page in lent[h].pages:
                        owned[page] += 1
                assert owned == pool.references
                assert pool.available + pool.cached + used == pool.pages


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_pages_add_up_whatever_comes(data):
    rows, prompts = Rows(), [[7 * i + k for k in range(3 + 4 * i)] for i in range(4)]
    for _ in range(data.draw(st.integers(4, 30))):
        free = [row for row in range(3) if row not in rows.held]
        what = data.draw(st.sampled_from(["start", "start", "append", "end", "clear"]))
        if what == "start" and len(free) > 1:  # two rows of 15 and what they append fit
            prompt = data.draw(st.sampled_from(prompts))
            rows.start(free[0], prompt, lambda most: data.draw(st.integers(1, most)))
        elif what == "append" and rows.held:
            row = data.draw(st.sampled_from(sorted(rows.held)))
            if max(len(head) for group in rows.held[row] for head in group) < 20:
                rows.append(row, data.draw(st.lists(st.integers(50, 99), min_size=1, max_size=6)))
        elif what == "end" and rows.held:
            row = data.draw(st.sampled_from(sorted(rows.held)))
            for table in rows.tables:
                table.free(row)
            del rows.held[row]
        elif what == "clear":
            rows.store.clear()
        rows.check()
    for row in list(rows.held):
        for table in rows.tables:
            table.free(row)
    rows.held = {}
    rows.check()
    rows.store.clear()
    assert all(table.pool.available == table.pool.pages for table in rows.tables)
