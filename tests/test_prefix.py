"""Cached prefixes: answers do not change, hits are what they should be, no page is lost, rows and tree never write the same."""

import dataclasses
import functools

import families
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import optx
from optx.cache import CacheSpec, Stream
from optx.engine.engine import Engine, EngineOptions
from optx.engine.pages import PagePool, PageTable
from optx.engine.prefix import PrefixCache
from optx.engine.request import Sampling

P = 4
OPTIONS = EngineOptions(rows=3, context=64, page_size=P, chunks=(4, 8))
SHARED = families.prompt(22, seed=1)
TAILS = [families.prompt(n, seed=n) for n in (3, 5, 2, 7)]
GREEDY = Sampling(max_tokens=6)


@functools.cache
def compiled(name):
    return optx.compile(families.concrete(name) if name != "hybrid" else families.hybrid())


def engine(name, **changes) -> Engine:
    return Engine(compiled(name).program, dataclasses.replace(OPTIONS, **changes))


def run(engine, prompts, sampling=GREEDY):
    requests = [engine.add_request(prompt, sampling) for prompt in prompts]
    engine.run()
    engine.check()
    return [request.output for request in requests]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_without_a_cache(name, temperature):
    """gemma3 has windows shorter than the shared prefix."""
    how = dataclasses.replace(GREEDY, temperature=temperature, seed=3)
    prompts = [SHARED + tail for tail in TAILS] + [SHARED, SHARED[:9], SHARED + TAILS[0]]
    plain, cached = engine(name, prefix_cache=False), engine(name)
    wanted = run(plain, prompts, how)
    assert plain.prefix is None and plain.prefix_refusal == "switched off"
    assert run(cached, prompts[:1], how) == wanted[:1] and cached.prefix.hits == 0
    assert run(cached, prompts[1:2], how) == wanted[1:2] and cached.prefix.hits == 20, "five pages of four"
    assert run(cached, prompts, how) == wanted
    assert run(cached, prompts[::-1], how) == wanted[::-1]


def test_a_conversation_goes_on_from_its_answers():
    served = engine("llama")
    turn = list(SHARED)
    for _ in range(3):
        (output,) = run(served, [turn])
        turn = turn + output + TAILS[0][:2]
    # 22 tokens; 22 + 6 + 2, of which 27 were computed: 6 pages of them; 38, of which 35 were.
    assert served.prefix.hits == 24 + 32
    assert run(engine("llama", prefix_cache=False), [turn]) == run(served, [turn])


def test_a_whole_prompt_leaves_one_token_to_compute():
    served = engine("llama")
    prompt = SHARED[:16]
    first = run(served, [prompt])
    assert run(served, [prompt]) == first and served.prefix.hits == 12


def test_states_refuse_with_a_reason():
    served = engine("hybrid")
    assert served.prefix is None and "a state" in served.prefix_refusal


def test_penalized_rows_meet_their_whole_prompt():
    how = dataclasses.replace(GREEDY, repetition_penalty=1.5)
    served = engine("llama")
    wanted = run(engine("llama", prefix_cache=False), [SHARED], how)
    run(served, [SHARED])
    assert run(served, [SHARED], how) == wanted and served.prefix.asked == len(SHARED)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_full_pool_gives_the_oldest_prefixes_back(name):
    """Room for one long request at a time: every admission has to evict."""
    tight = engine(name, pages=16)
    prompts = [families.prompt(length, seed=length) for length in (40, 44, 36, 50, 41, 40)]
    assert run(tight, prompts) == run(engine(name, prefix_cache=False), prompts)
    assert all(table.pool.available < table.pool.pages for table in tight._tables[:1]), "what fits stays"
    tight.prefix.clear()
    assert all(table.pool.available == table.pool.pages for table in tight._tables)


# Without a model: what the tree says of its pages.


def spec(window=None, sinks=0):
    return CacheSpec(kind="paged", streams=(Stream(name="k", shape=(1, 8)),), window=window, sinks=sinks)


class Rows:
    """Rows over two groups, one with a window; `content` is what a device would hold, to see that nothing is overwritten."""

    def __init__(self, rows=4, pages=24, context=48):
        self.tables = []
        for one in (spec(), spec(window=7, sinks=2)):
            width = PageTable.width_for(one, context, 8, P)
            self.tables.append(PageTable(one, PagePool(pages), rows=rows, width=width, page_size=P))
        self.tree = PrefixCache(self.tables)
        for group, table in enumerate(self.tables):
            table.make_room = functools.partial(self.tree.make_room, group)
        self.tokens: dict[int, list[int]] = {}
        self.content = [np.full(pages * P, -1) for _ in self.tables]

    def start(self, row, tokens):
        found = self.tree.match(self.tree.keys(tokens), len(tokens))
        self.tokens[row] = list(tokens[: self.tree.adopt(row, found)])
        for at in range(len(self.tokens[row]), len(tokens), 5):
            self.append(row, tokens[at : at + 5])

    def append(self, row, tokens):
        for table, content in zip(self.tables, self.content, strict=True):
            slots = table.append(row, len(tokens))
            assert all(table.pool.references[slot // P] == 1 for slot in slots), "a page with two owners is written"
            content[slots] = tokens
        self.tokens[row] += tokens

    def end(self, row, keep):
        if keep:
            self.tree.insert(row, self.tree.keys(self.tokens[row]))
        for table in self.tables:
            table.free(row)
        del self.tokens[row]

    def check(self):
        for group, (table, content) in enumerate(zip(self.tables, self.content, strict=True)):
            used = set()
            for row, tokens in self.tokens.items():
                length = int(table.lengths[row])
                slots = np.arange(length)
                where = table.table[row, slots // P] * P + slots % P
                positions = table._first[row, slots // P] + slots % P
                np.testing.assert_array_equal(content[where], np.asarray(tokens)[positions], "not the row's tokens")
                needed = (
                    range(len(tokens))
                    if table.window is None
                    else range(max(0, len(tokens) - table.window), len(tokens))
                )
                assert set(needed) <= set(positions.tolist()), "a token that the next one sees is missing"
                used |= set(table.table[row, : table.pages_of(row)].tolist())
            assert table.pool.available + self.tree.cached(group) + len(used) == table.pool.pages
            assert not used & set(table.pool._free)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_pages_add_up_whatever_comes(data):
    rows = Rows()
    for _ in range(data.draw(st.integers(5, 40))):
        free = [row for row in range(4) if row not in rows.tokens]
        what = data.draw(st.sampled_from(["start", "append", "end", "abort", "clear"]))
        if what == "start" and free and len(rows.tokens) < 2:
            # Few distinct tokens, so that prompts begin alike.
            rows.start(free[0], data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=36)))
        elif rows.tokens and what in ("append", "end", "abort"):
            row = data.draw(st.sampled_from(sorted(rows.tokens)))
            if what == "append" and len(rows.tokens[row]) < 40:
                rows.append(row, data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=6)))
            elif what != "append":
                rows.end(row, keep=what == "end")
        elif what == "clear":
            rows.tree.clear()
        rows.check()
    for row in list(rows.tokens):
        rows.end(row, keep=True)
    rows.check()
    rows.tree.clear()
    assert all(table.pool.available == table.pool.pages for table in rows.tables)
