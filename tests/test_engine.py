"""The engine: many requests at once give what each would alone, pages are neither lost nor shared by accident."""

import dataclasses
from unittest import mock

import families
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

import optx
from optx.cache import CacheSpec, Stream
from optx.engine import xla
from optx.engine.engine import Engine, EngineOptions
from optx.engine.pages import OutOfPages, PagePool, PageTable
from optx.engine.request import Request, Sampling
from optx.engine.sampling import sample
from optx.errors import LoweringError, RequestError
from optx.generate import generate
from optx.pallas import late

OPTIONS = EngineOptions(rows=3, context=48, page_size=4, chunks=(4, 8))
MODELS = {
    **{family: lambda family=family: families.concrete(family) for family in families.FAMILIES},
    "hybrid": families.hybrid,
}
PROMPTS = [families.prompt(length, seed=length) for length in (3, 21, 9, 1, 8)]  # more than rows, longer than chunks
GREEDY = Sampling(max_tokens=6)


@pytest.fixture(scope="module")
def models():
    """Each model and an engine over it, made once."""
    made = {}

    def get(name):
        if name not in made:
            model = MODELS[name]()
            made[name] = model, Engine(optx.compile(model).program, OPTIONS)
        return made[name]

    return get


@pytest.fixture
def llama(models):
    """An idle engine that must have no page missing afterwards."""
    engine = models("llama")[1]
    engine.check()
    yield engine
    engine.check()


@pytest.fixture(scope="module")
def served():
    """A compiled model with a tokenizer."""
    source = dataclasses.replace(optx.api.from_module(families.concrete("llama")), tokenizer=families.tokenizer())
    return optx.compile(source)


def run(engine, prompts, sampling=GREEDY) -> list[list[int]]:
    each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
    requests = [engine.add_request(prompt, how) for prompt, how in zip(prompts, each, strict=True)]
    engine.run()
    engine.check()
    return [request.output for request in requests]


# Greedy decoding.


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_argmax_of_the_whole_forward(name, models):
    """Token by token, for prompts longer than the chunks and more requests than rows."""
    model, engine = models(name)
    compiled = optx.compile(model)
    for prompt, output in zip(PROMPTS, run(engine, PROMPTS), strict=True):
        tokens = prompt + output
        # Plain numpy, but for the parts that it does not have: latents, states, int8 keys.
        logits = np.asarray(compiled.logits([tokens])[0]) if name == "hybrid" else families.oracle(model, tokens)
        assert output == logits.argmax(-1)[len(prompt) - 1 : -1].tolist()
        assert len(output) == GREEDY.max_tokens


@pytest.mark.parametrize("name", ["gemma3", "hybrid"])
def test_a_ragged_batch_gives_what_each_gives_alone(name, models):
    engine = models(name)[1]
    together = run(engine, PROMPTS)
    assert [run(engine, [prompt])[0] for prompt in PROMPTS] == together
    assert run(engine, PROMPTS[::-1]) == together[::-1]
    assert len({tuple(output) for output in together}) > 2, "the prompts matter"


def test_debug_checks_page_tables(models):
    model, engine = models("llama")
    debug = Engine(optx.compile(model).program, dataclasses.replace(OPTIONS, debug=True))
    assert run(debug, PROMPTS[:2]) == run(engine, PROMPTS[:2])
    debug.add_request(PROMPTS[1], GREEDY)
    debug.step()
    debug._tables[0].table += 10**6
    with pytest.raises(LoweringError, match=r"the table lists pages \d+ to \d+; allowed: 0 to \d+"):
        debug.run()


def test_requests_that_come_while_others_run(llama):
    alone = run(llama, PROMPTS)
    first = llama.add_request(PROMPTS[0], GREEDY)
    while len(first.output) < 3:
        llama.step()
    later = [llama.add_request(prompt, GREEDY) for prompt in PROMPTS[1:]]
    llama.run()
    assert [request.output for request in (first, *later)] == alone


def test_step_hands_out_every_token_once(llama):
    requests = [llama.add_request(prompt, GREEDY) for prompt in PROMPTS]
    seen = {request.id: [] for request in requests}
    llama.run(lambda request, token: seen[request.id].append(token))
    assert seen == {request.id: request.output for request in requests}
    assert {request.finish for request in requests} == {"length"} and llama.idle
    assert llama.step() == []


def test_stream_yields_one_answer_and_ends_it_when_closed(llama):
    (want,) = run(llama, [PROMPTS[1]])
    assert list(llama.stream(PROMPTS[1], GREEDY)) == want
    stream = llama.stream(PROMPTS[1], GREEDY)
    assert next(stream) == want[0]
    assert not llama.idle
    stream.close()
    assert llama.idle


def test_an_answer_ends_with_the_context(llama):
    prompt = families.prompt(OPTIONS.context - 3)
    request = llama.add_request(prompt, Sampling(max_tokens=50))
    llama.run()
    assert len(request.output) == 3 and request.finish == "length"
    assert run(llama, [families.prompt(OPTIONS.context - 1)], Sampling(max_tokens=50))[0]


def test_ticks_that_are_no_graphs(models, llama):
    """One a dispatch, traced as kernels that overlap ask for: the same tokens."""
    seen = []
    program = optx.compile(models("llama")[0]).program
    traced = lambda step: seen.append(step) or late.overlapped(step)  # noqa: E731
    apart = dataclasses.replace(OPTIONS, graphs=False, overlap=True)
    with mock.patch.object(type(program), "traced", staticmethod(traced)):
        engine = Engine(program, apart)
        assert list(engine.stream(PROMPTS[1], GREEDY)) == list(llama.stream(PROMPTS[1], GREEDY))
    assert engine._ticks == 1 and seen and not late.overlapping()


def test_options_of_xla_that_it_does_not_know_are_left_out(monkeypatch):
    assert all(xla.has(*option) for option in xla.UNCUT.items()) and not xla.has("xla_gpu_of_another_day", 1)
    assert xla.options(graphs=True) is None, "they are a GPU's"
    monkeypatch.setattr(xla.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(xla, "UNCUT", xla.UNCUT | {"xla_gpu_of_another_day": 1})
    graphs = {"xla_gpu_enable_command_buffer": xla.COMMANDS}
    assert xla.options(graphs=True) == graphs | {"xla_gpu_experimental_force_split_k": 1}
    assert xla.options(graphs=False)["xla_gpu_enable_command_buffer"] == ""


def test_a_small_cache_makes_requests_wait_and_changes_no_answer(models):
    """12 pages hold one row at full context: rows are admitted only when they can grow to their end."""
    model, engine = models("llama")
    small = Engine(optx.compile(model).program, dataclasses.replace(OPTIONS, pages=13))
    prompts, how = [*PROMPTS, families.prompt(40)], Sampling(max_tokens=8)
    assert run(small, prompts, how) == run(engine, prompts, how)


def test_a_request_larger_than_the_cache_is_refused(models):
    program = optx.compile(models("llama")[0]).program
    engine = Engine(program, dataclasses.replace(OPTIONS, pages=3))
    with pytest.raises(RequestError, match="may take 4 cache pages of 4 tokens and the cache has 3; lower max_tokens"):
        engine.add_request(families.prompt(9), Sampling(max_tokens=4))
    assert engine.idle
    engine.add_request(families.prompt(8), Sampling(max_tokens=4))


# Sampling.


def test_seeds(models):
    """Equal seeds and prompts give equal tokens, alone and beside others."""
    engine = models("llama")[1]
    hot = [Sampling(max_tokens=8, temperature=1.5, seed=seed) for seed in (7, 7, 8)]
    prompt = families.prompt(5)
    same, again, other = run(engine, [prompt] * 3, hot)
    assert same == again != other
    assert run(engine, [prompt], hot[0]) == [same]
    beside = [Sampling(max_tokens=3), hot[2], Sampling(max_tokens=8, temperature=0.3), hot[0]]
    mixed = run(engine, [PROMPTS[0], prompt, PROMPTS[1], prompt], beside)
    assert mixed[3] == same and mixed[1] == other
    assert mixed[0] == run(engine, [PROMPTS[0]], Sampling(max_tokens=3))[0], "a greedy row stays greedy among others"


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_what_leaves_one_token_is_greedy(how, llama):
    sampling = Sampling(**{"max_tokens": 6, "temperature": 2.0, "seed": 3, **how})
    assert run(llama, PROMPTS, sampling) == run(llama, PROMPTS)


LOGITS = np.array([2.0, 1.0, 0.5, 0.0, 0.0, -0.5, -1.0, -30.0])


def expected(temperature, top_k, top_p):
    """The distribution by definition: sorted, cut to top_k, then to the smallest set with top_p of what is left; what is as
    likely as the last one kept stays too."""
    p = np.exp(LOGITS / temperature)
    order = np.argsort(-p, kind="stable")
    order = order[p[order] >= p[order][top_k - 1]] if top_k else order
    keep = np.zeros(len(p), bool)
    mass = 0.0
    for token in order:
        if mass >= top_p * p[order].sum():
            break
        keep[token] = True
        mass += p[token]
    p = np.where(p >= p[keep].min(), p, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (2.0, 0, 1.0),
        (1.0, 3, 1.0),
        (1.0, 0, 0.7),
        (1.5, 4, 0.8),
        (1.0, 2, 0.95),
        (0.7, 1, 1.0),
    ],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    """Chi-square over 4096 rows with a seed each; the seeds are fixed, so this passes or fails for good."""
    n = 4096
    columns = (jnp.full(n, temperature), jnp.full(n, top_k, jnp.int32), jnp.full(n, top_p))
    logits = jnp.tile(jnp.asarray(LOGITS, jnp.float32), (n, 1))
    drawn = jax.jit(sample)(logits, *columns, jnp.arange(n, dtype=jnp.uint32), jnp.full(n, 5, jnp.int32))
    counts = np.bincount(np.asarray(drawn), minlength=len(LOGITS))
    want = expected(temperature, top_k, top_p) * n
    assert counts[want == 0].sum() == 0
    large = want >= 5
    counts, want = (np.append(x[large], x[~large].sum()) for x in (counts, want))
    keep = want > 0
    if keep.sum() > 1:
        assert scipy.stats.chisquare(counts[keep], want[keep]).pvalue > 1e-3


def test_a_draw_depends_on_seed_and_step_alone():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 50)), jnp.float32)
    columns = (jnp.full(6, 1.0), jnp.zeros(6, jnp.int32), jnp.ones(6))
    seeds, steps = jnp.arange(6, dtype=jnp.uint32), jnp.arange(6, dtype=jnp.int32)
    draw = jax.jit(sample)
    together = np.asarray(draw(logits, *columns, seeds, steps))
    for i in range(6):
        one = draw(*(x[i : i + 1] for x in (logits, *columns, seeds, steps)))
        assert int(one[0]) == together[i]
    draws = [int(draw(logits[:1], *(c[:1] for c in columns), seeds[:1], steps[:1] + i)[0]) for i in range(20)]
    assert len(set(draws)) > 5, "every step draws anew"


# Ends.


def test_stop_ids(llama):
    (whole,) = run(llama, [PROMPTS[1]])
    at = next(i for i in range(1, 6) if whole[i] not in whole[:i])
    request = llama.add_request(PROMPTS[1], Sampling(max_tokens=6, stop_ids=[whole[at]]))
    llama.run()
    assert request.output == whole[: at + 1] and request.finish == "stop"


def test_the_models_own_end(models):
    model, engine = models("llama")
    (whole,) = run(engine, [PROMPTS[1]])
    ending = Engine(optx.compile(model).program, OPTIONS, eos_ids=[whole[2]])
    first = whole.index(whole[2])
    assert run(ending, [PROMPTS[1]]) == [whole[: first + 1]]
    assert run(ending, [PROMPTS[1]], Sampling(max_tokens=6, ignore_eos=True)) == [whole]


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding", "finished"])
def test_abort_frees_what_a_request_held(when, llama):
    others = [llama.add_request(PROMPTS[0], Sampling(max_tokens=12)) for _ in range(3 if when == "waiting" else 1)]
    request = llama.add_request(families.prompt(21, seed=99 + len(when)), GREEDY, priority=1)  # nothing of it is cached
    if when == "waiting":
        llama.step()
        assert request.row < 0
    elif when == "prefilling":
        while not request.computed:
            llama.step()
        assert request.computed < len(request.prompt)
    else:
        while not (request.finish if when == "finished" else request.output):
            llama.step()
    llama.abort(request)
    assert request.finish == ("length" if when == "finished" else "abort")
    llama.abort(request)
    llama.run()
    assert len({tuple(other.output) for other in others}) == 1 and len(others[0].output) == 12
    assert others[0].output == run(llama, [PROMPTS[0]], Sampling(max_tokens=12))[0]


# Several ticks a dispatch.


@pytest.mark.parametrize("name", ["llama", "gemma3", "hybrid"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ticks_of_one_dispatch_are_ticks(name, temperature, models):
    """Rows with limits of their own, among them fewer and more than a dispatch has ticks."""
    model, engine = models(name)
    several = Engine(optx.compile(model).program, dataclasses.replace(OPTIONS, ticks=5))
    each = [Sampling(max_tokens=n, temperature=temperature, seed=n) for n in (11, 2, 1, 5, 14)]
    wanted = run(engine, PROMPTS, each)
    dispatches = count(several)
    assert run(several, PROMPTS, each) == wanted
    assert [len(output) for output in wanted] == [11, 2, 1, 5, 14]
    dispatches.clear()
    assert run(several, PROMPTS[:2], each[:2]) == wanted[:2]
    assert dispatches[-2] == 5 and dispatches[-1] > 1 and sum(dispatches) < 20, (
        "tokens after the prompts' first, by fives"
    )


def count(engine) -> list[int]:
    """Grows by the ticks that each dispatch runs, at most."""
    found, stepper = [], engine._stepper

    class Counted:
        compiles = property(lambda self: stepper.compiles)

        def __call__(self, tick, way):
            found.append(min(tick.ticks, max(1, int(tick.limits.max()))))
            return stepper(tick, way)

    engine._stepper = Counted()
    return found


def test_a_stop_id_ends_a_row_inside_a_dispatch(models):
    model, engine = models("llama")
    several = Engine(optx.compile(model).program, dataclasses.replace(OPTIONS, ticks=8))
    free = run(several, PROMPTS[:3], Sampling(max_tokens=12))
    stop = next(token for i, token in enumerate(free[0]) if i > 1 and token not in free[0][:i])
    how = Sampling(max_tokens=12, stop_ids=(stop,))
    stopped = run(several, PROMPTS[:3], how)
    assert stopped == run(engine, PROMPTS[:3], how)
    assert stopped[0] == free[0][: free[0].index(stop) + 1] and len(stopped[0]) < 12
    many = Sampling(max_tokens=12, stop_ids=(stop, *range(10**6, 10**6 + 20)))
    assert run(several, PROMPTS[:3], many) == stopped, "more stop ids than the device looks for"


def test_the_host_looks_at_every_token_while_others_wait_or_a_text_may_stop(models):
    several = Engine(optx.compile(models("llama")[0]).program, dataclasses.replace(OPTIONS, ticks=4))
    ticks = count(several)
    run(several, [PROMPTS[0]], Sampling(max_tokens=9, stop=("never",)))
    assert set(ticks) == {1}
    requests = [several.add_request(PROMPTS[0], Sampling(max_tokens=9)) for _ in range(4)]
    ticks.clear()
    while requests[3].row < 0:
        several.step()
    assert set(ticks) == {1}, "one more request than rows"
    several.run()
    assert 4 in ticks


# Prompts and decodes in one tick.


@pytest.mark.parametrize("name", ["llama", "gemma3", "hybrid"])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_mixed_tick_changes_no_token(name, prefix_cache, models):
    model, engine = models(name)
    options = dataclasses.replace(OPTIONS, mixed=True, ticks=3, prefix_cache=prefix_cache)
    mixed = Engine(optx.compile(model).program, options)
    each = [Sampling(max_tokens=n, temperature=n % 2, seed=n, logprobs=None if n % 3 else 2) for n in (11, 2, 6, 5, 9)]
    wanted = run(engine, PROMPTS, each)
    assert run(mixed, PROMPTS, each) == wanted
    assert run(mixed, PROMPTS[::-1], each[::-1]) == wanted[::-1]


def test_rows_go_on_while_a_prompt_is_read(models):
    mixed = Engine(optx.compile(models("llama")[0]).program, dataclasses.replace(OPTIONS, mixed=True))
    first = mixed.add_request(PROMPTS[0], Sampling(max_tokens=12))
    mixed.step()
    second = mixed.add_request(families.prompt(30), GREEDY)
    ticks = 0
    while not second.output:
        before = len(first.output)
        mixed.step()
        ticks += 1
        assert len(first.output) == before + 1
    assert ticks == 5, "30 tokens, seven a tick beside the running row"
    mixed.run()


# Compiles.


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("greedy, context, ticks", [(True, 48, 1), (False, 48, 1), (True, 7, 1), (True, 48, 4)])
def test_nothing_compiles_after_warm_up(greedy, context, ticks, mixed, models):
    """A context of 7 has no room for a chunk of 8, but a prompt of 6 is padded to one."""
    options = dataclasses.replace(OPTIONS, context=context, ticks=ticks, mixed=mixed)
    engine = Engine(optx.compile(models("llama")[0]).program, options)
    engine.warm_up(Sampling(temperature=0.0 if greedy else 1.0))
    engine.check()
    compiled = engine.compiles
    assert compiled == 3 + 1  # chunks, decodes, the copy of a fork
    sampling = Sampling(max_tokens=4, temperature=0.0 if greedy else 1.0)
    longest = context - 1
    run(engine, [families.prompt(length) for length in (1, 3, 4, 5, longest, 2)], sampling)
    assert engine.compiles == compiled


def test_generate_reuses_the_engine_of_its_size(served):
    how = Sampling(max_tokens=3, ignore_eos=True)
    served.generate("abc", how)
    engine = next(iter(served._engines.values()))
    compiled = engine.compiles
    served.generate("another", how)
    assert list(served._engines.values()) == [engine] and engine.compiles == compiled


# Text.


class Script:
    """An engine that says what it is told: a list of token ids a request."""

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []

    def add_request(self, prompt, sampling):
        request = Request(
            id=len(self.requests), prompt=prompt, sampling=sampling, stop_ids=frozenset(sampling.stop_ids)
        )
        self.requests.append(request)
        return request

    def step(self):
        out = []
        for request, answer in zip(self.requests, self.answers):
            if request.finish is None:
                token = answer[len(request.output)]
                request.output.append(token)
                if token in request.stop_ids:
                    request.finish = "stop"
                elif len(request.output) in (len(answer), request.sampling.max_tokens):
                    request.finish = "length"
                out.append((request, token))
        return out

    def abort(self, request):
        request.finish = request.finish or "abort"


def say(*texts, **sampling):
    """Completions of answers told, and what on_text was given."""
    tokenizer = families.tokenizer()
    engine = Script(*(text if isinstance(text, list) else tokenizer.encode(text) for text in texts))
    given = [[] for _ in texts]
    done = generate(engine, tokenizer, ["p"] * len(texts), Sampling(**sampling), lambda i, text: given[i].append(text))
    assert ["".join(parts) for parts in given] == [answer.text for answer in done], "what was given is the text"
    assert all(all(parts) for parts in given), "no empty text is given"
    return done, given


@pytest.mark.parametrize(
    "text, stop, want",
    [
        ("one two three", "two", "one "),
        ("one two three", ("three", "two"), "one "),
        ("one two three", ("four",), "one two three"),
        ("one", "one", ""),
        ("aab aaab", "aaab", "aab "),
        ("ababac", "abac", "ab"),
        ("ends in the midst of st", "stop", "ends in the midst of st"),
        ("x\n\ny", ("\n\n", "\n"), "x"),
        ("Größe — 世界 🤽 now", "界", "Größe — 世"),
        ("a🤽b", "🤽", "a"),
        ("", "x", ""),
    ],
)
def test_stop_texts_end_the_answer_and_are_not_in_it(text, stop, want):
    """Every token is one byte, so that each stop text spans tokens."""
    ((answer,), _) = say(text or [families.EOS], stop=stop, max_tokens=100, stop_ids=(families.EOS,))
    assert answer.text == want
    assert answer.finish == ("stop" if want != text or not text else "length")


def test_the_rest_of_the_answer_is_not_decoded_after_a_stop_text():
    ((answer,), _) = say("one two three", stop="two", max_tokens=100)
    assert len(answer.token_ids) == len("one two")


def test_text_is_given_as_soon_as_no_stop_text_can_take_it_back():
    _, ((*given,),) = say("hello", stop=("zz",), max_tokens=100)
    assert given == ["h", "e", "l", "l", "o"]
    _, ((*given,),) = say("abcabd", stop=("abx",), max_tokens=100)
    assert given == ["abc", "abd"]


def test_characters_come_whole():
    _, ((*given,),) = say("ä🤽", max_tokens=100)
    assert given == ["ä", "🤽"]
    (answer,), ((*given,),) = say(families.tokenizer().encode("a🤽")[:3], max_tokens=100)
    assert given == ["a", "\ufffd"] and answer.text == "a\ufffd"


def test_special_tokens_are_no_text():
    (answer,), _ = say([families.BOS, *families.tokenizer().encode("a"), families.EOS], stop_ids=(families.EOS,))
    assert answer.text == "a" and answer.token_ids[-1] == families.EOS and answer.finish == "stop"


def test_answers_in_a_batch_end_each_on_their_own():
    done, _ = say("first answer", "second, stop here", "third", stop="stop", max_tokens=100)
    assert [(answer.text, answer.finish) for answer in done] == [
        ("first answer", "length"),
        ("second, ", "stop"),
        ("third", "length"),
    ]
    assert [answer.prompt_tokens for answer in done] == [1, 1, 1]


def test_a_callback_that_fails_ends_all_requests(llama):
    def fail(index, text):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        generate(llama, families.tokenizer(), ["abc", "d"], GREEDY, fail)
    assert llama.idle


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_on_text_and_stop_texts_with_a_real_model(temperature, served):
    sampling = Sampling(max_tokens=12, temperature=temperature, seed=5, ignore_eos=True)
    prompts = ["The first", "ünï"]
    given = {0: "", 1: ""}

    def collect(index, text):
        given[index] += text

    whole = served.generate(prompts, sampling, collect)
    assert list(given.values()) == whole
    text = max(whole, key=lambda text: len(text.replace("\ufffd", "")))
    stop = next(text[i : i + 2] for i in range(1, len(text) - 1) if "\ufffd" not in text[i : i + 2])
    stopped = served.generate(prompts, dataclasses.replace(sampling, stop=stop))
    for before, after in zip(whole, stopped, strict=True):
        assert after == before.split(stop)[0]
    assert stopped != whole


def test_text_for_text_and_ids_for_ids(served):
    how = Sampling(max_tokens=3, ignore_eos=True)
    ids = served.tokenizer.encode("abc")
    (answer,) = served.generate(["abc"], how)
    assert served.generate("abc", how) == [answer]
    for prompt in (ids, np.asarray(ids), tuple(ids), np.asarray(ids, np.uint16)):
        (output,) = served.generate(prompt, how)
        assert all(type(token) is int for token in output) and served.tokenizer.decode(output) == answer
    assert served.generate([ids, "abc"], how) == [output, answer]
    assert served.generate([], how) == []
    (completion,) = served.complete(["abc"], how)
    assert completion.token_ids == tuple(output) and completion.prompt_tokens == 3 and completion.finish == "length"


# Refusals.


@pytest.mark.parametrize(
    "prompt, told",
    [
        ([], "the prompt is empty; give at least one token"),
        (families.prompt(48), "the prompt has 48 tokens and the context is 48; shorten it to 47"),
        ([1, 264], "token id 264 is outside the vocabulary; allowed: 0 to 263"),
        ([-1], "token id -1 is outside the vocabulary"),
        ([10**30], "is outside the vocabulary"),
        ([1.5], r"the prompt is \[1.5\]; allowed: text, or a list of token ids"),
        (["a"], r"the prompt is \['a'\]; allowed: text, or a list of token ids"),
        ("abc", "the prompt is 'abc'; allowed: text, or a list of token ids"),
        (None, "the prompt is None; allowed: text, or a list of token ids"),
        (5, "the prompt is 5; allowed"),
    ],
)
def test_prompts_that_the_engine_refuses(prompt, told, llama):
    with pytest.raises(RequestError, match=told):
        llama.add_request(prompt)
    assert llama.idle


@pytest.mark.parametrize(
    "prompts, told",
    [
        ("", "the prompt is empty"),
        (["fine", ""], "the prompt is empty"),
        ([[1, 2], []], "the prompt is empty"),
        ("x" * 128, "the prompt has 128 tokens and the context is 128; shorten it to 127"),
        (["fine", "x" * 500], "the prompt has 500 tokens"),
        ("a\ud800b", r"text: got a lone surrogate '\\ud800' at character 1"),
        ([[1, 2], [3, 264]], "token id 264 is outside the vocabulary; allowed: 0 to 263"),
        ([[1], [2] * 128], "the prompt has 128 tokens and the context is 128"),
        ([-5], "token id -5 is outside the vocabulary"),
        ([[2**70]], "is outside the vocabulary"),
        ([None], "the prompt is None; allowed: text, or a list of token ids"),
        ([[0.5]], "allowed: text, or a list of token ids"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_prompts_that_generate_refuses_before_anything_runs(prompts, told, served, monkeypatch):
    monkeypatch.setattr(Engine, "step", lambda self: pytest.fail("ran"))
    with pytest.raises(RequestError, match=told):
        served.generate(prompts)
    for engine in served._engines.values():
        engine.check()


@pytest.mark.parametrize(
    "tokens, told",
    [
        ([1, 2], r"logits: tokens int64\[2\]; allowed: int\[B, T\], not empty"),
        ([[]], r"logits: tokens float64\[1, 0\]"),
        ([[0.5]], r"logits: tokens float64\[1, 1\]"),
        ([[1, 2], [3]], "logits: tokens are rows of different lengths"),
        ([[1, 264]], "token id 264 is outside the vocabulary"),
        ([[-1]], "token id -1 is outside the vocabulary"),
        (np.zeros((1, 129), np.int32), "logits: 129 tokens; the context is 128"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_tokens_that_logits_refuses(tokens, told, served):
    with pytest.raises(RequestError, match=told):
        served.logits(tokens)


def test_without_a_tokenizer(models):
    compiled = optx.compile(models("llama")[0])
    with pytest.raises(RequestError, match="the model has no tokenizer: give token ids in place of text"):
        compiled.generate("abc")
    with pytest.raises(RequestError, match="sampling.stop needs a tokenizer; use stop_ids"):
        compiled.generate([1, 2], Sampling(stop="x"))
    assert compiled.complete([[1, 2]], Sampling(max_tokens=2))[0].text == ""


@pytest.mark.parametrize(
    "field, value",
    [
        *(("max_tokens", value) for value in (0, -1, 2.5, "5", None, True)),
        *(("temperature", value) for value in (-0.1, float("nan"), float("inf"), "hot", None)),
        *(("top_k", value) for value in (-1, 1.5, None)),
        *(("top_p", value) for value in (0, -0.5, 1.01, float("nan"), "x")),
        *(("seed", value) for value in (-1, 2**32, 0.5, None)),
        *(("stop", value) for value in ("", ("a", ""), (1,), None, 3)),
        *(("stop_ids", value) for value in (("a",), (1.5,), 3, None)),
    ],
    ids=repr,
)
def test_sampling_values_out_of_range(field, value):
    with pytest.raises(RequestError, match=f"^sampling.{field}: got .*; allowed: "):
        Sampling(**{field: value})


def test_sampling_values_at_their_edges():
    Sampling(max_tokens=1, temperature=0, top_k=0, top_p=1, seed=2**32 - 1)
    assert Sampling(stop="ab").stop == ("ab",) and Sampling(stop=["a", "b"], stop_ids=[1]).stop_ids == (1,)
    assert Sampling(top_p=np.float32(0.5), seed=np.int64(3), temperature=1)
    assert hash(Sampling(stop=["a"], stop_ids={5})) == hash(Sampling(stop=("a",), stop_ids=(5,)))


@pytest.mark.parametrize(
    "options",
    [
        {"rows": 0},
        {"page_size": 0},
        {"pages": 0},
        {"context": 0},
        {"chunks": ()},
        {"chunks": (8, 4)},
        {"chunks": (0, 4)},
    ],
    ids=str,
)
def test_engine_options_out_of_range(options):
    with pytest.raises(RequestError, match=f"^engine.{next(iter(options))}: got "):
        EngineOptions(**options)


# Pages, against positions by row written down.


def spec_of(window, sinks) -> CacheSpec:
    return CacheSpec(kind="paged", streams=(Stream(name="k", shape=(1, 2)),), window=window, sinks=sinks)


ROWS, CHUNK, CONTEXT = 3, 5, 60


class Oracle:
    """A page table beside the memory that it addresses, and what every row must find there."""

    def __init__(self, window, sinks, page_size, pages):
        spec = spec_of(window, sinks)
        self.window, self.sinks = window, sinks
        self.pool = PagePool(pages)
        width = PageTable.width_for(spec, CONTEXT, CHUNK, page_size)
        self.table = PageTable(spec, self.pool, rows=ROWS, width=width, page_size=page_size)
        self.memory: dict[int, tuple[int, int]] = {}  # slot -> (position, what was written)
        self.rows: list[dict[int, int]] = [{} for _ in range(ROWS)]  # position -> what was written
        self.written = 0

    def listing(self, row) -> list[int]:
        size, table = self.table.page_size, self.table
        return [int(table.table[row, i // size]) * size + i % size for i in range(int(table.lengths[row]))]

    def append(self, row, count):
        start = len(self.rows[row])
        count = min(count, CONTEXT - start)
        if not count:
            return
        before = [self.memory[slot] for slot in self.listing(row)]
        try:
            slots = self.table.append(row, count)
        except OutOfPages:
            after = [self.memory[slot] for slot in self.listing(row)]
            assert set(after) <= set(before) and self.visible(row, start) <= {position for position, _ in after}
            return
        assert len(slots) == count
        for offset, slot in enumerate(slots):
            assert self.pool.references[slot // self.table.page_size] == 1, "a shared page is written"
            self.written += 1
            self.memory[int(slot)] = start + offset, self.written
            self.rows[row][start + offset] = self.written
        held = {self.memory[slot][0] for slot in self.listing(row)}
        assert held >= set().union(*(self.visible(row, query) for query in range(start, start + count)))

    def visible(self, row, query) -> set[int]:
        """Positions that a query sees and the row has."""
        last = min(query, len(self.rows[row]) - 1)
        seen = range(last + 1)
        return {p for p in seen if self.window is None or p > query - self.window or p < self.sinks}

    def free(self, row):
        self.table.free(row)
        self.rows[row] = {}

    def fork(self, row, new):
        if self.rows[new] or not self.rows[row]:
            return
        try:
            source, target = self.table.fork(row, new)
        except OutOfPages:
            return
        for a, b in zip(source, target, strict=True):
            self.memory[int(b)] = self.memory[int(a)]
        self.rows[new] = dict(self.rows[row])
        assert [self.memory[slot] for slot in self.listing(new)] == [self.memory[slot] for slot in self.listing(row)]

    def truncate(self, row, tokens):
        have = len(self.rows[row])
        tokens = min(tokens, have)
        try:
            self.table.truncate(row, tokens)
        except RequestError:
            assert self.window is not None and tokens < have, "only a window takes the way back"
            return
        self.rows[row] = {p: value for p, value in self.rows[row].items() if p < tokens}
        held = {self.memory[slot][0] for slot in self.listing(row)}
        assert held >= self.visible(row, tokens), "what the next query sees is there"

    def check(self):
        used = np.zeros(self.pool.pages, int)
        for row in range(ROWS):
            slots = self.listing(row)
            found = [self.memory[slot] for slot in slots]
            positions = [position for position, _ in found]
            assert len(set(positions)) == len(positions) and sorted(positions) == positions
            for position, value in found:
                assert self.rows[row].get(position) == value, "a row reads what it did not write"
            if self.window is None:
                assert len(found) == len(self.rows[row])
            pages = self.table.table[row, : self.table.pages_of(row)]
            assert len(set(pages.tolist())) == len(pages) <= self.table.width
            np.add.at(used, pages, 1)
        np.testing.assert_array_equal(self.pool.references, used)
        assert self.pool.available + np.count_nonzero(used) == self.pool.pages


rows = st.integers(0, ROWS - 1)
actions = st.one_of(
    st.tuples(st.just("append"), rows, st.integers(1, CHUNK)),
    st.tuples(st.just("append"), rows, st.integers(1, CHUNK)),  # twice as likely as the others
    st.tuples(st.just("truncate"), rows, st.integers(0, CONTEXT)),
    st.tuples(st.just("fork"), rows, rows),
    st.tuples(st.just("free"), rows),
)


@hypothesis.given(
    window=st.none() | st.integers(1, 9),
    sinks=st.integers(0, 5),
    page_size=st.sampled_from([1, 2, 4]),
    pages=st.integers(4, 60),
    steps=st.lists(actions, max_size=60),
)
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_pages_hold_what_rows_wrote(window, sinks, page_size, pages, steps):
    oracle = Oracle(window, sinks if window else 0, page_size, pages)
    for name, *arguments in steps:
        getattr(oracle, name)(*arguments)
        oracle.check()
    for row in range(ROWS):
        oracle.free(row)
    oracle.check()
    assert oracle.pool.available == pages


def test_a_window_holds_few_pages_however_long_the_row():
    oracle = Oracle(5, 2, 4, 20)
    for _ in range(CONTEXT // CHUNK):
        oracle.append(0, CHUNK)
        oracle.check()
    assert oracle.table.pages_of(0) <= 4 < CONTEXT // 4


def test_a_full_pool_says_so_and_takes_nothing():
    table = PageTable(spec_of(None, 0), PagePool(2), rows=2, width=4, page_size=4)
    table.append(0, 4)
    with pytest.raises(OutOfPages, match="a row needs 2 more cache pages of 4 tokens and 1 are free"):
        table.append(1, 5)
    assert table.pool.available == 1 and table.lengths[1] == 0
    table.append(1, 4)
    with pytest.raises(OutOfPages, match="all 2 cache pages are in use"):
        table.pool.allocate()
    assert issubclass(OutOfPages, RequestError)


@pytest.mark.parametrize("tokens", [-1, 11])
def test_truncating_to_what_never_was(tokens):
    table = PageTable(spec_of(None, 0), PagePool(4), rows=1, width=4, page_size=4)
    table.append(0, 10)
    with pytest.raises(RequestError, match=f"cannot truncate to {tokens} tokens; allowed: 0 to 10"):
        table.truncate(0, tokens)


def test_stepping_back_past_a_window():
    table = PageTable(spec_of(4, 0), PagePool(8), rows=1, width=8, page_size=2)
    for _ in range(12):
        table.append(0, 1)
    table.truncate(0, 11)
    with pytest.raises(
        RequestError, match="cannot step back to 3 of 11 tokens: the window of 4 has freed tokens before"
    ):
        table.truncate(0, 3)
