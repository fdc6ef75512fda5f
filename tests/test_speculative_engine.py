"""An engine that speculates gives the answers of one that does not, token for token, whatever drafts."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mtp
import tiny

import optx
from optx.cache import Address, Ragged
from optx.engine.drafting import propose
from optx.engine.engine import Engine
from optx.engine.options import EngineOptions
from optx.engine.request import Sampling
from optx.engine.speculation import BURST, Speculation
from optx.engine.step import Tick
from optx.errors import RequestError

OPTIONS = EngineOptions(rows=3, context=64, page_size=4, chunks=(17,))
SCARCE = dataclasses.replace(OPTIONS, pages=18)  # less than the rows grow to: the engine that speculates also preempts
REPEATING = [7, 8, 9, 7, 8, 9, 7, 8]
WORDS = 90  # ids that all vocabularies have
PROMPTS = [REPEATING, *([t % WORDS for t in families.prompt(n, seed=n)] for n in (21, 1, 9))]  # more than rows
GREEDY = Sampling(max_tokens=24)
MIXED = [
    GREEDY,
    Sampling(max_tokens=17, temperature=0.9, top_p=0.9, seed=3),
    Sampling(max_tokens=12, temperature=0.7, top_k=20, seed=5),
    Sampling(max_tokens=9),
]
PENALIZED = [
    Sampling(max_tokens=14, temperature=0.8, seed=1, repetition_penalty=1.2, frequency_penalty=0.4, logprobs=2),
    Sampling(max_tokens=11, presence_penalty=0.5, logit_bias={7: 2.0}),
    GREEDY,
    Sampling(max_tokens=10, logprobs=0),
]


MODELS: dict[str, optx.Compiled] = {}


def compiled(name: str) -> optx.Compiled:
    if name not in MODELS:
        MODELS[name] = optx.compile(families.hybrid() if name == "hybrid" else families.concrete(name))
    return MODELS[name]


@pytest.fixture(scope="module", autouse=True)
def golden(tmp_path_factory):
    """DeepSeek-V3 with an MTP module of random weights."""
    folder = test_mtp.write(tmp_path_factory.mktemp("mtp") / "model", test_mtp.draw(np.random.default_rng(0)))
    MODELS["mtp"] = optx.compile(optx.load(folder, dtype="float32"))


HOW = {  # method: (the model, how it drafts)
    "ngram": lambda: ("llama", Speculation(tokens=3, least=1, always=True)),
    "itself": lambda: ("llama", Speculation(method="draft", tokens=3, draft=compiled("llama"), always=True)),
    "another": lambda: ("gemma3", Speculation(method="draft", tokens=4, draft=compiled("llama"), always=True)),
    "mtp": lambda: ("mtp", Speculation(method="mtp", tokens=2, always=True)),
}


@functools.cache
def plain(name: str) -> Engine:
    engine = Engine(compiled(name).program, OPTIONS)
    engine.warm_up(PENALIZED[0] if name == "llama" else MIXED[1])  # one program for all ways of sampling
    return engine


@functools.cache
def fast(method: str, options: EngineOptions = SCARCE) -> Engine:
    name, how = HOW[method]()
    engine = Engine(compiled(name).program, dataclasses.replace(options, speculate=how))
    if options is SCARCE:
        engine.warm_up(PENALIZED[0] if name == "llama" else MIXED[1])
    return engine


def both(method: str, options: EngineOptions = SCARCE) -> tuple[Engine, Engine]:
    return fast(method, options), plain(HOW[method]()[0])


@dataclasses.dataclass
class Since:
    """What an engine counted from here on."""

    engine: Engine

    def __post_init__(self):
        self._before = self.engine.stats()

    def __getattr__(self, name):
        return getattr(self.engine.stats(), name) - getattr(self._before, name)


def run(engine, samplings, prompts=PROMPTS):
    requests = [engine.add_request(prompt, s) for prompt, s in zip(prompts, samplings, strict=True)]
    engine.run()
    engine.check()
    return requests


def facts(requests):
    return [(request.output, request.finish) for request in requests]


@pytest.mark.parametrize(
    "method, samplings",
    [*((method, MIXED) for method in HOW), *((method, PENALIZED) for method in ("ngram", "itself"))],
    ids=lambda x: x if isinstance(x, str) else "seeded" if x is MIXED else "penalized",
)
def test_answers_are_those_of_the_plain_engine(method, samplings):
    one, other = both(method)
    since = Since(one)
    found, wanted = run(one, samplings), run(other, samplings)
    assert facts(found) == facts(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert len(mine.logprobs) == len(theirs.logprobs)
        for x, y in zip(mine.logprobs, theirs.logprobs, strict=True):
            assert x.chosen == pytest.approx(y.chosen, abs=1e-4)
            assert [token for token, _ in x.top] == [token for token, _ in y.top]
    assert since.drafted > 0 and 0 <= since.accepted <= since.drafted


def test_a_model_that_drafts_for_itself_is_always_right():
    """So every tick gives all that it may: also across page boundaries, in batches, with seeds."""
    engine = fast("itself")
    since = Since(engine)
    run(engine, MIXED)
    assert since.accepted == since.drafted > 30
    since = Since(engine)
    run(engine, [Sampling(max_tokens=25)], [families.prompt(5, seed=77)])
    assert since.steps == 1 + 24 // 4


def test_ngrams_save_ticks_on_text_that_repeats():
    one, other = map(Since, both("ngram"))
    assert facts(run(one.engine, [GREEDY], [REPEATING])) == facts(run(other.engine, [GREEDY], [REPEATING]))
    assert other.steps - one.steps == one.accepted > 0


@pytest.mark.parametrize("method", ["itself", "ngram"])
def test_an_answer_ends_in_the_middle_of_accepted_drafts(method):
    one, other = both(method)
    (whole,) = run(other, [Sampling(max_tokens=20)], [REPEATING])
    for most in range(1, 8):
        (found,) = run(one, [Sampling(max_tokens=most)], [REPEATING])
        assert (found.output, found.finish) == (whole.output[:most], "length")
    for stop in sorted(set(whole.output)):
        end = whole.output.index(stop) + 1
        (found,) = run(one, [Sampling(max_tokens=20, stop_ids=(stop,))], [REPEATING])
        assert (found.output, found.finish) == (whole.output[:end], "stop")


def test_rows_with_stop_texts_get_no_drafts():
    engine = fast("itself")
    since = Since(engine)
    watched, free = (engine.add_request(REPEATING, Sampling(max_tokens=8, stop=stop)) for stop in ("x", ()))
    while free.finish is None:
        given = len(watched.output)
        engine.step()
        assert len(watched.output) - given <= 1
    assert since.accepted > 0
    engine.run()
    assert watched.output == free.output


@pytest.mark.parametrize("method", ["ngram", "itself", "mtp"])
def test_preempted_rows_and_cached_prefixes(method):
    """A pool of few pages, twice the same prompts: pages given back and taken again hold what they should."""
    engine, other = both(method)
    wanted, since = facts(run(other, [GREEDY] * 4)), Since(engine)
    for _ in range(2):
        assert facts(run(engine, [GREEDY] * 4)) == wanted
    assert since.preemptions > 0 and since.prefix_hit_tokens > 0 and since.drafted > 0
    assert engine.stats().pages_used == 0


def test_forks_mixed_ticks_and_overlap_with_nothing_compiled():
    samplings = [Sampling(max_tokens=10 + i, temperature=0.8, seed=i) for i in range(3)]
    engine, other = both("itself", dataclasses.replace(OPTIONS, rows=4, mixed=True, overlap=True, ticks=3))
    engine.warm_up(GREEDY, MIXED[1])
    compiles, since, found = engine.compiles, Since(engine), []
    for each in (engine, other):
        first = each.add_group(PROMPTS[1], samplings)
        later = [each.add_request(prompt, how) for prompt, how in zip(PROMPTS, MIXED, strict=True)]
        each.run()
        each.check()
        found.append(facts([*first, *later]))
    assert found[0] == found[1]
    assert engine.compiles == compiles and since.accepted == since.drafted > 0


def test_it_stops_drafting_where_that_is_a_loss(monkeypatch):
    """Drafts of another model with random weights are never right."""
    engine, other = both("another")
    governor = engine.speculator.governor
    monkeypatch.setattr(governor, "always", False)
    monkeypatch.setattr(governor, "gain", 5.0)
    run(engine, [Sampling(max_tokens=50)] * 3, PROMPTS[:1] * 3)
    assert governor.gain < governor.cost(3)
    since = Since(engine)
    (found,) = run(engine, [Sampling(max_tokens=40)], PROMPTS[:1])
    assert since.drafted <= BURST * 4, "a look now and then"
    assert found.output == run(other, [Sampling(max_tokens=40)], PROMPTS[:1])[0].output


def test_the_module_drafts_what_its_equations_say(monkeypatch):
    """After chunks, verify ticks and plain ones: the caches and the state carried give the module's own first draft."""
    engine, tree, ragged = fast("mtp"), compiled("mtp").tree, Ragged.dense(1, 55)

    @jax.jit
    def first_draft(text):
        """text int32[56] -> the module's choice two tokens after each place."""
        hidden, _, _ = tree.backbone(text[:-1], ragged)
        drafted, _ = tree.draft(hidden, tree.embed(text[1:]), ragged, None)
        return jnp.argmax(tree.head(drafted), axis=-1)

    request, governor = engine.add_request(PROMPTS[1], Sampling(max_tokens=30)), engine.speculator.governor
    for steps, always in ((3, True), (2, False), (3, True)):
        monkeypatch.setattr(governor, "always", always)
        monkeypatch.setattr(governor, "gain", 0.0)
        for _ in range(steps):
            engine.step()
        text = [*request.prompt, *request.output]
        assert _draft(engine, request) == int(first_draft(jnp.asarray(text + [0] * (56 - len(text))))[len(text) - 2])
    engine.abort(request)


def _draft(engine, request) -> int:
    """The first draft that the next verify tick would make."""
    table, at = engine._tables[0], request.computed
    slots, row = table.append(request.row, 2), np.asarray([request.row])
    tick = Tick(
        tokens=np.full(2, -1), counts=np.asarray([2]), starts=np.asarray([at]), slots=row, seeds=np.zeros(1, np.uint32),
        tables=(table.table[None, row],), lengths=(table.lengths[None, row],), writes=(slots[None],),
        limits=None, stops=None, prompts=None, biased=None, sampling=np.zeros((1, 7), np.float32),
    )  # fmt: skip
    tick = Tick(**jax.tree.map(jnp.asarray, dataclasses.asdict(tick)))
    table.truncate(request.row, at)
    stepper = engine._stepper
    models = stepper.program.merge(stepper.program.leaves)
    address = Address(tables=tick.tables, lengths=tick.lengths, writes=(tick.writes[0][0],), slots=tick.slots)
    newest = jnp.asarray(request.output[-1:], jnp.int32)
    before = stepper._state.hidden[request.row][None]
    run = jax.jit(lambda *args: propose(models, "greedy", tick, address, *args)[0])
    return int(run(stepper.caches, newest, before)[0, 1])


def test_text_in_text_out(tmp_path):
    model = optx.compile(optx.load(tiny.checkpoint(tmp_path / "tiny")))
    how, prompt = Sampling(max_tokens=9, temperature=0.8, seed=4), "The quick brown"
    wanted = model.generate(prompt, how)
    assert model.generate(prompt, how, speculate=Speculation(method="draft", draft=model)) == wanted
    source = dataclasses.replace(optx.api.from_module(families.concrete("llama")), tokenizer=families.tokenizer())
    with pytest.raises(RequestError, match=r"speculate.draft: \d.*% of the model's tokens have the same id"):
        optx.compile(source).engine(speculate=Speculation(method="draft", draft=model))


def test_refusals_say_why():
    with pytest.raises(RequestError, match="layers with a state"):
        Engine(compiled("hybrid").program, dataclasses.replace(OPTIONS, speculate=Speculation()))
    with pytest.raises(RequestError, match="has no MTP module"):
        Engine(compiled("llama").program, dataclasses.replace(OPTIONS, speculate=Speculation(method="mtp")))
    wide = optx.compile(families.concrete("llama", vocab_size=300))
    with pytest.raises(RequestError, match="264 tokens and the draft model's 300"):
        compiled("llama").engine(speculate=Speculation(method="draft", draft=wide))
