"""An answer does not depend on the company: alone, batched, preempted, from the prefix cache, in chunks of any size, several
ticks a dispatch, forked, overlapped, the tokens are the same, drawn and penalized ones too."""

import dataclasses
import functools

import families
import pytest

import optx
from optx.engine.engine import Engine, EngineOptions
from optx.engine.request import Sampling
from optx.errors import QueueFull, RequestError

OPTIONS = EngineOptions(rows=3, context=48, page_size=4, chunks=(8,))
PROMPTS = [families.prompt(length, seed=length) for length in (17, 3, 21, 9)]
PROMPTS += [PROMPTS[2] + [5, 6], PROMPTS[0][:9]]
HOT = Sampling(max_tokens=14, temperature=1.0)
HOW = [
    Sampling(max_tokens=14),
    *(dataclasses.replace(HOT, seed=seed) for seed in (1, 2)),
    dataclasses.replace(HOT, seed=3, frequency_penalty=0.6, repetition_penalty=1.3, max_tokens=18),
    dataclasses.replace(HOT, seed=4, logprobs=2),
    Sampling(max_tokens=5),
]


@functools.cache
def program(name):
    return optx.compile(families.hybrid() if name == "hybrid" else families.concrete(name)).program


@functools.cache
def plain(name) -> Engine:
    return Engine(program(name), dataclasses.replace(OPTIONS, prefix_cache=False))


@functools.cache
def alone(name) -> list[list[int]]:
    found = []
    for prompt, how in zip(PROMPTS, HOW, strict=True):
        request = plain(name).add_request(prompt, how)
        plain(name).run()
        found.append(request.output)
    assert len({tuple(output) for output in found}) == len(found), "the answers differ"
    return found


VARIANTS = {
    "preempted": {"pages": 16},
    "overlapped": {"overlap": True, "ticks": 3, "single": True},
    "chunks": {"chunks": (3, 5), "ticks": 4},
    "long chunks": {"chunks": (3, 5), "long": 16, "mixed": True},
    "preempted and overlapped": {"pages": 16, "overlap": True},
    "batch_invariant": {"batch_invariant": True, "pages": 20},
    "all at once": {"pages": 18, "overlap": True, "ticks": 3, "mixed": True, "chunks": (5, 12), "single": True},
}

HYBRID = ("preempted", "overlapped")  # its mixed ticks take long to compile


@pytest.mark.parametrize(
    "name, variant",
    [*((name, variant) for name in ("llama", "gemma3") for variant in VARIANTS), *(("hybrid", v) for v in HYBRID)],
)
def test_company_changes_nothing(name, variant):
    engine = Engine(program(name), dataclasses.replace(OPTIONS, **VARIANTS[variant]))
    for order in (range(len(PROMPTS)), reversed(range(len(PROMPTS)))):
        requests = {i: engine.add_request(PROMPTS[i], HOW[i]) for i in order}
        engine.run()
        engine.check()
        assert [requests[i].output for i in range(len(PROMPTS))] == alone(name)
        assert len(requests[4].logprobs) == len(requests[4].output)
    if "pages" in VARIANTS[variant]:
        assert (engine.stats().preemptions > 0) == ("preempted" in variant or variant == "all at once")


@pytest.mark.parametrize("name", ["llama", "gemma3", "hybrid"])
@pytest.mark.parametrize("changes", [{}, {"overlap": True, "mixed": True, "ticks": 3}], ids=["plain", "overlapped"])
def test_a_group_gives_what_each_gives(name, changes):
    """Five answers in three rows, one of them penalized, beside another request."""
    engine = Engine(program(name), dataclasses.replace(OPTIONS, **changes))
    samplings = [dataclasses.replace(HOT, seed=seed, max_tokens=6) for seed in (1, 2, 3, 4)]
    samplings.insert(1, dataclasses.replace(HOW[3], max_tokens=9))
    for prompt in (PROMPTS[2], PROMPTS[1], PROMPTS[1][:1]):
        group = engine.add_group(prompt, samplings)
        beside = engine.add_request(PROMPTS[4], HOW[4])
        engine.run()
        engine.check()
        wanted = []
        for how in samplings:
            wanted.append(plain(name).add_request(prompt, how))
            plain(name).run()
        assert [request.output for request in group] == [request.output for request in wanted]
        assert beside.output == alone(name)[4]


@pytest.mark.parametrize("changes", [{}, {"ticks": 3, "overlap": True, "mixed": True}], ids=["plain", "overlapped"])
def test_a_row_that_decodes_alone_is_a_batch_of_its_own(changes):
    engine = Engine(program("llama"), dataclasses.replace(OPTIONS, single=True, **changes))
    engine.warm_up()
    step, compiles, batches = engine._stepper.__class__.__call__, engine.compiles, []

    def recorded(self, tick, way):
        batches.append(len(tick.counts) if len(tick.tokens) == len(tick.counts) else 0)
        return step(self, tick, way)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._stepper.__class__, "__call__", recorded)
        others = [engine.add_request(prompt, Sampling(max_tokens=5)) for prompt in PROMPTS[:2]]
        last = engine.add_request(PROMPTS[2], Sampling(max_tokens=17))
        engine.run()
    decodes = [size for size in batches if size]
    assert set(decodes) == {1, OPTIONS.rows} and decodes[-1] == 1
    assert engine.compiles == compiles
    for i, request in enumerate([*others, last]):
        assert request.output == _alone(PROMPTS[i], request.sampling)


def test_batch_invariant_shares_nothing():
    engine = Engine(program("llama"), dataclasses.replace(OPTIONS, batch_invariant=True, chunks=(4, 8), overlap=True))
    assert engine.options.chunks == (8,) and engine.prefix_refusal == "batch_invariant"
    group = engine.add_group(PROMPTS[2], [dataclasses.replace(HOT, seed=seed, max_tokens=6) for seed in (1, 2)])
    engine.run()
    for request, seed in zip(group, (1, 2), strict=True):
        assert request.output == _alone(PROMPTS[2], dataclasses.replace(HOT, seed=seed, max_tokens=6))
    for wrong in ({"mixed": True}, {"ticks": 4}, {"single": True}, {"speculate": optx.Speculation(method="ngram")}):
        with pytest.raises(RequestError, match=f"batch_invariant: {next(iter(wrong))} makes"):
            EngineOptions(batch_invariant=True, **wrong)


def _alone(prompt, how) -> list[int]:
    request = plain("llama").add_request(prompt, how)
    plain("llama").run()
    return request.output


def test_aborts_while_a_dispatch_is_under_way():
    engine = Engine(program("llama"), dataclasses.replace(OPTIONS, overlap=True, mixed=True, ticks=3, pages=18))
    for steps in range(1, 9):
        requests = [engine.add_request(prompt, how) for prompt, how in zip(PROMPTS, HOW, strict=True)]
        for _ in range(steps):
            engine.step()
        engine.abort(requests[steps % 3])
        engine.abort(requests[4])
        engine.run()
        engine.check()
        for i, request in enumerate(requests):
            wanted = alone("llama")[i]
            assert (
                request.output == wanted
                if request.finish != "abort"
                else request.output == wanted[: len(request.output)]
            )


def test_streams_side_by_side():
    engine = plain("llama")
    streams = [engine.stream(PROMPTS[i], HOW[i]) for i in range(3)]
    found = [[], [], []]
    while any(streams):
        for i, stream in enumerate(streams):
            token = next(stream, None) if stream else None
            if token is None:
                streams[i] = None
            else:
                found[i].append(token)
    assert found == alone("llama")[:3]


def test_a_full_queue():
    engine = Engine(program("llama"), dataclasses.replace(OPTIONS, max_waiting=3))
    requests = [engine.add_request([1, 2], HOW[5]) for _ in range(3)]
    engine.step()
    requests += [engine.add_request([1, 2], HOW[5]) for _ in range(3)]
    with pytest.raises(QueueFull, match="3 requests wait for a row and another cannot; allowed: 3; ask again later"):
        engine.add_request([1, 2])
    with pytest.raises(QueueFull, match="and 2 more cannot"):
        engine.add_group([1, 2], [HOT, HOT])
    assert issubclass(QueueFull, RequestError)
    engine.abort(requests.pop())
    more = engine.add_request([1, 2], HOW[5])
    engine.run()
    assert {request.finish for request in (*requests, more)} == {"length"}


def test_smaller_priorities_first():
    engine = plain("llama")
    order = []
    requests = [engine.add_request([1 + i, 2], HOW[5], priority=p) for i, p in enumerate((3, 2, 2, 1, 0))]
    engine.run(lambda request, token: order.append(request) if request not in order else None)
    assert order == [requests[i] for i in (4, 3, 1, 2, 0)]


def test_times_and_stats():
    engine = Engine(program("llama"), OPTIONS)
    before = engine.stats()
    assert (before.pages, before.pages_used, before.waiting, before.steps) == (36, 0, 0, 0)
    request = engine.add_request(PROMPTS[2], HOW[0])
    assert request.first_token_at is None and engine.stats().waiting == 1
    engine.step()
    assert engine.stats().running == 1 and engine.stats().pages_used == 2
    engine.run()
    assert request.arrived < request.first_token_at < request.finished_at
    again = engine.add_request(PROMPTS[2], HOW[0])
    engine.run()
    stats = engine.stats()
    assert (stats.prefix_asked_tokens, stats.prefix_hit_tokens) == (42, 20)
    assert (stats.prompt_tokens, stats.output_tokens, stats.finished["length"]) == (42, 28, 2)
    assert stats.pages_used == 0 and stats.pages_cached == 8, "21 tokens and 13 of the answer: whole pages"
    assert again.output == request.output and stats.waiting == stats.running == stats.preemptions == 0


@pytest.mark.parametrize("long", [None, 16])
def test_every_way_that_was_warmed_compiles_nothing(long):
    engine = Engine(program("llama"), dataclasses.replace(OPTIONS, mixed=True, ticks=3, long=long))
    engine.warm_up(HOW[0], HOW[3])
    compiled = engine.compiles
    assert compiled == (1 if long is None else 2) + 2 + 1, "chunks; decodes, greedy and full; the copy of a fork"
    assert engine.stats().steps == 0
    requests = [engine.add_request(prompt, how) for prompt, how in zip(PROMPTS, HOW, strict=True)]
    group = engine.add_group(PROMPTS[0], [HOW[0], HOW[0]])
    engine.run()
    assert engine.compiles == compiled
    assert [request.output for request in requests] == alone("llama")
    assert [request.output for request in group] == [alone("llama")[0]] * 2


def test_a_step_that_raises_loses_the_running_requests_only():
    engine = Engine(program("hybrid"), OPTIONS)
    engine.add_request(PROMPTS[5], HOW[5])
    engine.run()
    requests = [engine.add_request(PROMPTS[i], HOW[i]) for i in range(3)]
    stepper = engine._stepper

    class Broken:
        compiles = 0

        def __call__(self, *arguments):
            stepper(*arguments)  # takes the caches along
            raise RuntimeError("the device is gone")

    engine.step()
    later = engine.add_request(PROMPTS[5], HOW[5])
    compiled = engine.compiles
    engine._stepper = Broken()
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.step()
    engine._stepper = stepper
    assert engine.recover() == requests and {request.finish for request in requests} == {"error"}
    engine.run()
    engine.check()
    assert later.output == alone("hybrid")[5] and engine.compiles == compiled


# Pools from one budget.


@pytest.mark.parametrize("memory", [20e3, 30e3])
def test_pools_share_a_budget(memory):
    """gemma3: groups of 12 and 6 pages a row at full context, 2 and 1 layers of it."""
    full = plain("gemma3").stats().pages
    engine = Engine(program("gemma3"), dataclasses.replace(OPTIONS, memory=memory))
    held = sum(x.nbytes for x in engine._stepper._caches)
    assert memory / 2 < held <= memory and engine.stats().pages < full
    requests = [engine.add_request(prompt, how) for prompt, how in zip(PROMPTS, HOW, strict=True)]
    engine.run()
    assert [request.output for request in requests] == alone("gemma3")


def test_a_budget_is_no_more_than_what_rows_can_use():
    engine = Engine(program("llama"), dataclasses.replace(OPTIONS, memory=1e9))
    assert engine.stats().pages == plain("llama").stats().pages


@pytest.mark.parametrize(
    "memory, told",
    [
        (0.5, "engine.memory: got 0.5, and a cpu does not tell what is free; give bytes"),
        (2000, "engine.memory: 0.0 MB have no room for states of 0.0 MB and a page a group"),
        (-1, "engine.memory: got -1; allowed: bytes, or a fraction"),
    ],
)
def test_budgets_that_are_refused(memory, told):
    with pytest.raises(RequestError, match=told):
        Engine(program("llama"), dataclasses.replace(OPTIONS, memory=memory))


@pytest.mark.parametrize(
    "more, told",
    [
        ({"long": 8}, "engine.long: got 8; allowed: more than the 8 tokens of other ticks"),
        ({"long": 16, "batch_invariant": True}, "engine.batch_invariant: long makes answers depend on the batch"),
    ],
)
def test_long_ticks_that_are_refused(more, told):
    with pytest.raises(RequestError, match=told):
        EngineOptions(chunks=(8,), **more)


def test_mixed_ticks_need_room_for_prompts():
    with pytest.raises(RequestError, match="engine.mixed: 8 rows leave no room for prompts in ticks of 8 tokens"):
        EngineOptions(mixed=True, chunks=(8,))
