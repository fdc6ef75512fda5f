"""Real blocks through one ragged step over paged caches: any chunking, batch and page order equals the full forward.

`Rows` stands for an engine: it owns page lists and lengths, and never looks into the layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optx import formats, ir, pools, tensor
from optx.cache import Address, CacheSpec, Layout, Ragged, pages_for
from optx.errors import FormatError
from optx.nn import (
    MLA,
    Attention,
    Block,
    CausalLM,
    Embed,
    GatedDelta,
    GatedMLP,
    Indexer,
    Linear,
    LinearAttention,
    Mamba1,
    Mamba2,
    RMSNorm,
    Rope,
)  # fmt: skip
from optx.pallas.ssm_scan import reference as ssm

D, VOCAB, P = 16, 40, 4
TOKENS, LONGEST, BATCH = 14, 7, 4  # of every step: one compiled program a model
WIDE = 18
LAYOUT = Layout(pages=24, page_size=P, slots=6)
WINDOW, SINKS = 6, 2


def mixer(kind: str, dtype):
    rope = Rope(theta=100.0, dim=8)
    if kind.startswith("mla"):
        small = Rope(theta=100.0, dim=4)
        made = MLA(D, heads=3, rank=8, nope_dim=4, value_dim=6, rope=small, q_rank=8, dtype=dtype)
        made.cache = made.cache.replace(window=WINDOW, sinks=SINKS) if kind == "mla_window" else made.cache
        return made
    if kind == "indexed":  # sees 5 tokens of those in the window
        small = Rope(theta=100.0, dim=4)
        indexer = Indexer(D, heads=6, head_dim=6, top_k=5, q_rank=8, rope=small, dtype=dtype)
        made = MLA(D, heads=3, rank=8, nope_dim=4, value_dim=6, rope=small, q_rank=8, indexer=indexer, dtype=dtype)
        made.cache = made.cache.replace(window=2 * WINDOW)
        return made
    if kind == "mamba2":
        return Mamba2(D, heads=4, head_dim=4, state_dim=8, groups=2, conv=4, dtype=dtype)
    if kind == "mamba1":
        return Mamba1(D, inner=24, state_dim=4, rank=3, norm=functools.partial(RMSNorm, dtype=dtype), dtype=dtype)
    if kind == "linear":
        return LinearAttention(D, heads=4, head_dim=6, dtype=dtype)
    if kind == "delta":
        return GatedDelta(D, heads=4, key_heads=2, head_dim=6, key_dim=4, conv=4, dtype=dtype)
    attention = functools.partial(Attention, D, heads=4, kv_heads=2, head_dim=8, rope=rope, dtype=dtype)
    if kind == "shared":
        return attention(share=0)
    if kind == "norm":
        return attention(norm=lambda: RMSNorm(8, dtype=dtype), softcap=3.0, bias=True)
    if kind == "gated":
        return attention(gated=True, bias=True)
    if kind == "sink_logits":
        return attention(sinks=True, window=WINDOW)
    made = attention()
    if kind == "window":
        made.cache = made.cache.replace(window=WINDOW)
    elif kind == "sinks":
        made.cache = made.cache.replace(window=WINDOW, sinks=SINKS)
    elif kind != "gqa":
        made.cache = made.cache.replace(format=formats.parse(kind))
    return made


def build(*kinds: str, dtype="float32", cache_dtype=None) -> CausalLM:
    """A model with random weights, one layer a kind; a format's name is a kind: attention with K and V stored so."""

    def block(kind):
        part = mixer(kind, dtype)
        if cache_dtype:
            part.cache = part.cache.replace(dtype=cache_dtype)
        return Block(
            norm=RMSNorm(D, dtype=dtype), mixer=part, mlp_norm=RMSNorm(D, dtype=dtype), mlp=GatedMLP(D, 24, dtype=dtype)
        )

    embed, norm = Embed(VOCAB, D, scale=4.0, dtype=dtype), RMSNorm(D, dtype=dtype)
    head = None if "norm" in kinds else Linear(D, VOCAB, dtype=dtype)
    shapes = CausalLM(embed=embed, layers=[block(kind) for kind in kinds], norm=norm, head=head, context=64)
    return ir.init_weights(shapes, scale=1.5)


EXACT = {
    "gqa": ("gqa", "gqa"),
    "norm": ("norm", "norm"),
    "window": ("window", "window"),
    "sinks": ("sinks", "sinks"),
    "sink_logits": ("sink_logits", "sink_logits"),
    "mla_window": ("mla_window", "mla_window"),
    "shared": ("gqa", "gqa", "shared"),
    "mla": ("mla", "mla"),
    "indexed": ("indexed", "indexed"),
    "mamba2": ("mamba2", "mamba2"),
    "delta": ("delta", "delta", "gated"),
    "linear": ("mamba1", "linear", "mamba1"),
    "hybrid": ("gqa", "mamba2", "sinks", "mla", "shared", "window"),
}
# Bound on the RMS difference from the full forward's logits, in their standard deviations; measured: half of it.
LOSSY = {"int8": 0.03, "int4_g4": 0.35, "int4_asym": 0.35, "fp8_e4m3": 0.1}


@functools.cache
def model_of(name: str) -> CausalLM:
    return build(*EXACT[name]) if name in EXACT else build(name, name)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def step(graph, state, tokens, ragged, address, caches):
    """-> (logits [T, V], caches); the caches are donated."""
    model = nnx.merge(graph, state)
    hidden, caches, _ = model.backbone(tokens, ragged, caches, address)
    return model.head(hidden), caches


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, state, tokens):
    return nnx.merge(graph, state)(tokens)


def full(model, tokens) -> np.ndarray:
    """Logits [n, V] of the forward without caches; one compiled length, the causal mask hides what pads it."""
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(forward(*nnx.split(model), jnp.asarray(padded)))[0, : len(tokens)]


def text(rng, length) -> list[int]:
    return rng.integers(1, VOCAB, size=length).tolist()


def poison(x):
    """NaN where a type has it, else the largest number: what nobody wrote, nobody may read."""
    return jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max)


@dataclasses.dataclass
class Row:
    """A sequence: tokens seen, pages by group in the order of appending, tokens in that listing, its state slot."""

    slot: int
    pages: list[list[int]]
    held: list[int]
    seen: int = 0


class Rows:
    """Sequences over one set of pools. Pages are handed out in random order; all that is unused is poisoned."""

    def __init__(self, model: CausalLM, seed: int = 0, forget: bool = False, tokens: int = TOKENS):
        """forget: pages that a window has passed are taken from the listing, poisoned and given to others; tokens: of
        every step."""
        self.model, self.plan, self.forget, self.tokens = model, model.cache_plan(), forget, tokens
        self.rng = np.random.default_rng(seed)
        self.step = functools.partial(step, *nnx.split(model))
        caches = jax.tree.map(poison, self.plan.init(LAYOUT))
        positions = tuple(jnp.zeros_like(p) for p in caches.positions)  # a position that every query would see
        self.caches = dataclasses.replace(caches, positions=positions)
        self.free = [self.rng.permutation(LAYOUT.pages).tolist() for _ in self.plan.keys]
        self.slots = self.rng.permutation(LAYOUT.slots).tolist()
        self.rows: dict[str, Row] = {}
        self.freed = 0

    def open(self, name: str) -> Row:
        groups = len(self.plan.keys)
        self.rows[name] = Row(self.slots.pop(), [[] for _ in range(groups)], [0] * groups)
        return self.rows[name]

    def flat(self, row: Row, group: int, first: int, count: int) -> np.ndarray:
        """Flat slots of `count` tokens from entry `first` of the listing."""
        at = np.arange(first, first + count)
        return np.asarray(row.pages[group], int)[at // P] * P + at % P

    def feed(self, **chunks: list[int]) -> dict[str, np.ndarray]:
        """One step: new tokens of some rows, in random order among idle rows and padding -> their logits [n, V]."""
        places = self.rng.permutation(BATCH)
        names = dict(zip(places, chunks))
        total = self.tokens
        tokens, rows, positions = np.full(total, VOCAB - 1), np.full(total, BATCH), np.zeros(total, int)
        starts, counts = np.full(BATCH, total - 1), np.zeros(BATCH, int)
        slots = np.full(BATCH, LAYOUT.slots)
        groups, width = len(self.plan.keys), LAYOUT.pages // 2
        tables = self.rng.integers(0, LAYOUT.pages, size=(groups, 1, BATCH, width))
        lengths = np.zeros((groups, 1, BATCH), int)
        writes = np.full((groups, total), LAYOUT.pages * P)
        at = 0
        for place in range(BATCH):
            if place not in names:
                continue
            chunk = chunks[names[place]]
            row = self.rows.get(names[place]) or self.open(names[place])
            mine, count = slice(at, at + len(chunk)), len(chunk)
            tokens[mine], rows[mine], positions[mine] = chunk, place, np.arange(row.seen, row.seen + count)
            starts[place], counts[place], slots[place] = at, count, row.slot
            for g in range(groups):
                while len(row.pages[g]) < pages_for(row.held[g] + count, P):
                    row.pages[g].append(self.free[g].pop())
                writes[g, mine] = self.flat(row, g, row.held[g], count)
                row.held[g] += count
                tables[g, 0, place, : len(row.pages[g])] = row.pages[g]
                lengths[g, 0, place] = row.held[g]
            row.seen += count
            at += count
        ints = functools.partial(jnp.asarray, dtype=jnp.int32)
        ragged = Ragged(
            rows=ints(rows), starts=ints(starts), counts=ints(counts), positions=ints(positions), longest=LONGEST
        )
        address = Address(
            tables=tuple(map(ints, tables)),
            lengths=tuple(map(ints, lengths)),
            writes=tuple(map(ints, writes)),
            slots=ints(slots),
        )
        logits, self.caches = self.step(ints(tokens), ragged, address, self.caches)
        if self.forget:
            for name in chunks:
                self.drop_passed_pages(self.rows[name])
        return {name: np.asarray(logits)[starts[p] : starts[p] + counts[p]] for p, name in names.items()}

    def run(self, name: str, tokens: list[int], chunks: list[int]) -> np.ndarray:
        """Feeds `tokens` in chunks of the given sizes, then one at a time."""
        out, at = [], 0
        for size in [*chunks, *[1] * (len(tokens) - sum(chunks))]:
            out.append(self.feed(**{name: tokens[at : at + size]})[name])
            at += size
        return np.concatenate(out)

    def drop_passed_pages(self, row: Row) -> None:
        """Takes whole pages that neither window nor sinks can see again out of the listing."""
        for g, spec in enumerate(self.plan.groups):
            if spec.window is None:
                continue
            positions = np.asarray(self.caches.positions[g])
            for page in row.pages[g][: row.held[g] // P]:
                if (positions[page] > row.seen - spec.window).any() or (positions[page] < spec.sinks).any():
                    continue
                row.pages[g].remove(page)
                row.held[g] -= P
                self.release(g, page)

    def release(self, group: int, page: int) -> None:
        self.free[group].insert(0, page)
        self.freed += 1
        layers = tuple(
            jax.tree.map(lambda x: x.at[page].set(poison(x[page])), pool) if self.plan.group(i) == group else pool
            for i, pool in enumerate(self.caches.layers)
        )
        self.caches = dataclasses.replace(self.caches, layers=layers)

    def move(self, group: int, src, dst) -> None:
        """Copies tokens; both lists are padded to one length with entries past the end of the pools."""
        end = LAYOUT.pages * P
        src, dst = (jnp.asarray([*x, *[end] * (2 * P - len(x))], jnp.int32) for x in (src, dst))
        self.caches = self.plan.move_tokens(self.caches, group, src, dst)

    def fork(self, name: str, copy: str) -> None:
        """A second row that shares whole pages and has a copy of the last one and of the states."""
        old, new = self.rows[name], self.open(copy)
        new.seen, new.held = old.seen, list(old.held)
        for g, pages in enumerate(old.pages):
            whole, rest = divmod(old.held[g], P)
            new.pages[g] = [*pages[:whole], *([self.free[g].pop()] if rest else [])]
            self.move(g, self.flat(old, g, whole * P, rest), self.flat(new, g, whole * P, rest))
        self.move_states(old.slot, new.slot)

    def move_states(self, src: int, dst: int) -> None:
        self.caches = self.plan.move_states(self.caches, jnp.asarray([src]), jnp.asarray([dst]))

    def truncate(self, name: str, seen: int) -> None:
        """Token caches step back by counting fewer tokens; what lies behind is overwritten."""
        row = self.rows[name]
        row.held = [held - (row.seen - seen) for held in row.held]
        row.seen = seen


every = pytest.mark.parametrize("name", EXACT)
CHUNKS = [[], [7, 3, 5], [1, 6, 2, 7]]


def assert_same(got, want, tolerance=1e-4):
    np.testing.assert_allclose(got, want, atol=tolerance * max(1, np.abs(want).max()))


@every
def test_chunks_then_decode_equal_the_full_forward(name, rng):
    model, tokens = model_of(name), text(rng, 21)
    want = full(model, tokens)
    assert want.std() > 0.3, "logits that hardly vary would hide mistakes"
    for seed, chunks in enumerate(CHUNKS):
        assert_same(Rows(model, seed).run("a", tokens, chunks), want)


@pytest.mark.parametrize("name", LOSSY)
def test_packed_caches_do_not_depend_on_chunking(name, rng):
    """What is stored of a token is the same in whatever chunk it came, the full forward included, and near the dense one."""
    model, tokens = model_of(name), text(rng, 19)
    one, two = (Rows(model, seed).run("a", tokens, CHUNKS[seed]) for seed in (0, 1))
    assert_same(one, two)
    assert_same(one, full(model, tokens))
    dense = ir.shallow(model)
    for i, layer in enumerate(model.layers):
        ir.put(dense, f"layers/{i}/mixer", ir.replace(layer.mixer, cache=layer.mixer.cache.replace(format=None)))
    want = full(dense, tokens)
    error = np.sqrt(np.mean((one - want) ** 2)) / want.std()
    assert 1e-4 < error < LOSSY[name], f"{error:.3f}"


@pytest.mark.parametrize("name", ["hybrid", "int4_asym"])
def test_a_ragged_batch_equals_each_row_alone(name, rng):
    """Prefill chunks and decodes of several rows in one step, rows that join late, pause and leave their place.

    Steps this wide store their tokens by a scatter, the narrow ones of the other tests one by one.
    """
    assert TOKENS <= pools.FEW < WIDE
    model = model_of(name)
    tokens = {row: text(rng, length) for row, length in (("a", 17), ("b", 9), ("c", 5), ("d", 12))}
    alone = {row: Rows(model, 5).run(row, ids, CHUNKS[1][:1] if len(ids) > 7 else []) for row, ids in tokens.items()}
    together, got = Rows(model, 6, tokens=WIDE), {row: [] for row in tokens}
    at = dict.fromkeys(tokens, 0)
    plan = [{"a": 5, "b": 1}, {"a": 1, "b": 7, "c": 5}, {"d": 3}, {"a": 1, "d": 7, "b": 1}, {"a": 7}, {"a": 3, "d": 2}]
    for chunk in plan:
        new = {row: tokens[row][at[row] : at[row] + count] for row, count in chunk.items()}
        for row, logits in together.feed(**new).items():
            got[row].append(logits)
            at[row] += len(new[row])
    assert at == {row: len(ids) for row, ids in tokens.items()}
    for row in tokens:
        assert_same(np.concatenate(got[row]), alone[row])


@pytest.mark.parametrize("name", [name for name in EXACT if name != "norm"])  # untied: the head is sound
def test_a_broken_row_harms_no_other(name, rng):
    """NaN in one row (a damaged embedding here) stays there: rows are padded with each other's tokens."""
    model = model_of(name)
    table = model.embed.table.get_value().at[3].set(jnp.nan)
    sick = ir.replace(model, embed=ir.replace(model.embed, table=table))
    tokens = [t for t in text(rng, 30) if t != 3][:9]
    rows = Rows(sick)
    got = []
    for i in range(9):
        out = rows.feed(a=tokens[i : i + 1], b=[3, 5, 6], c=[1, 3]) if i < 4 else rows.feed(b=[1], a=tokens[i : i + 1])
        got.append(out["a"])
        assert np.isnan(out["b"][0]).all()
    assert_same(np.concatenate(got), full(model, tokens))


@pytest.mark.parametrize("name", ["window", "sinks", "hybrid"])
def test_pages_that_a_window_has_passed_may_go(name, rng):
    """A compact listing of live pages gives the same logits; what was dropped is NaN by then and reused by others."""
    model, tokens = model_of(name), text(rng, 26)
    rows = Rows(model, 1, forget=True)
    rows.feed(b=text(rng, 5))
    got = rows.run("a", tokens, [7, 2, 7])
    assert rows.freed >= 4
    held = [h for h, spec in zip(rows.rows["a"].held, rows.plan.groups) if spec.window]
    assert max(held) <= WINDOW + SINKS + 2 * P, "the row keeps window, sinks and the pages they share"
    assert_same(got, full(model, tokens))


@pytest.mark.parametrize("name", ["hybrid", "int8"])
def test_fork_shares_pages_and_copies_the_last(name, rng):
    model, prompt = model_of(name), text(rng, 10)
    tails = {"a": text(rng, 5), "b": text(rng, 5)}
    alone = {row: Rows(model, 2).run(row, prompt + tail, [7, 3]) for row, tail in tails.items()}
    rows = Rows(model, 3)
    rows.run("a", prompt, [7, 3])
    rows.fork("a", "b")
    shared = [set(x) & set(y) for x, y in zip(rows.rows["a"].pages, rows.rows["b"].pages)]
    assert all(len(pages) == 10 // P for pages in shared)
    got = {row: [] for row in tails}
    for i in range(5):
        for row, logits in rows.feed(**{row: [tail[i]] for row, tail in tails.items()}).items():
            got[row].append(logits)
    for row in tails:
        assert_same(np.concatenate(got[row]), alone[row][10:])


@every
def test_step_back_and_go_on_another_way(name, rng):
    """Speculation: token caches count fewer tokens, states come back from the slot that they were saved in."""
    model, tokens = model_of(name), text(rng, 16)
    want = full(model, tokens)
    rows = Rows(model, 4)
    assert_same(rows.run("a", tokens[:9], [7]), want[:9])
    spare = rows.slots.pop()
    rows.move_states(rows.rows["a"].slot, spare)
    rows.feed(a=text(rng, 6))
    rows.truncate("a", 9)
    rows.move_states(spare, rows.rows["a"].slot)
    assert_same(np.concatenate([rows.feed(a=tokens[9:12])["a"], rows.run("a", tokens[12:], [])]), want[9:])


@pytest.mark.parametrize(
    "kinds, dtype, cache_dtype",
    [
        *((kinds, "float32", None) for kinds in EXACT.values()),
        *(((kind,), "float32", None) for kind in LOSSY),
        (EXACT["hybrid"], "bfloat16", None),
        (("gqa", "mla", "mamba2", "delta"), "float32", "bfloat16"),
        (EXACT["delta"], "bfloat16", None),
        (EXACT["linear"], "bfloat16", None),
        (("int8", "int4_asym", "fp8_e4m3"), "bfloat16", None),
        (("int8", "int4_asym", "fp8_e4m3"), "float32", "bfloat16"),
        (("int8", "int4_asym", "fp8_e4m3"), "bfloat16", "float32"),
    ],
    ids=str,
)
def test_caches_are_a_fixpoint_of_the_step(kinds, dtype, cache_dtype):
    """What comes out has the structure, shapes and types of what went in, whatever the activations' type."""
    model = build(*kinds, dtype=dtype, cache_dtype=cache_dtype)
    plan = model.cache_plan()
    caches = plan.abstract(LAYOUT)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    groups = len(plan.keys)
    ragged = Ragged(
        rows=ints((TOKENS,)), starts=ints((BATCH,)), counts=ints((BATCH,)), positions=ints((TOKENS,)), longest=LONGEST
    )
    address = Address(
        tables=(ints((1, BATCH, 8)),) * groups,
        lengths=(ints((1, BATCH)),) * groups,
        writes=(ints((TOKENS,)),) * groups,
        slots=ints((BATCH,)),
    )
    logits, out = jax.eval_shape(functools.partial(step, *nnx.split(model)), ints((TOKENS,)), ragged, address, caches)
    assert (logits.shape, logits.dtype) == ((TOKENS, VOCAB), jnp.float32)
    assert jax.tree.structure(out) == jax.tree.structure(caches)
    assert forms(out) == forms(caches)
    concrete = plan.init(LAYOUT)
    assert jax.tree.structure(concrete) == jax.tree.structure(caches) and forms(concrete) == forms(caches)


def forms(tree):
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


# Mamba-2 against its definition.


def recurrence(x, dt, a, b, c, state):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t (x) B_t, y_t = h_t C_t, a token at a time in float64."""
    x, dt, a, b, c, h = (np.asarray(t, np.float64) for t in (x, dt, a, b, c, state))
    heads = np.arange(x.shape[2]) * b.shape[2] // x.shape[2]  # group of each head
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        decay = np.exp(dt[:, t] * a)[..., None, None]
        h = decay * h + np.einsum("bn,bnh,bns->bnhs", dt[:, t], x[:, t], b[:, t, heads])
        y[:, t] = np.einsum("bnhs,bns->bnh", h, c[:, t, heads])
    return y, h


@pytest.mark.parametrize("length, groups", [(1, 2), (3, 4), (4, 1), (8, 2), (11, 1), (11, 2), (11, 4)])
def test_chunked_scan_equals_the_recurrence(length, groups, rng, monkeypatch):
    """In chunks of 4: less than one, whole ones, a ragged end; dt = 0 leaves the state alone."""
    monkeypatch.setattr(ssm, "CHUNK", 4)
    batch, heads, width, states = 2, 4, 3, 5
    x = rng.normal(size=(batch, length, heads, width))
    dt = rng.uniform(0, 2, size=(batch, length, heads))
    dt[1, length // 2 :] = 0
    a = -rng.uniform(0.1, 3, size=heads)
    b, c = rng.normal(size=(2, batch, length, groups, states))
    state = rng.normal(size=(batch, heads, width, states))
    args = [jnp.asarray(t, jnp.float32) for t in (x, dt, a, b, c, state)]
    want_y, want_state = recurrence(*args)
    y, new = jax.jit(lambda args: ssm.ssm_scan(*args))(args)
    assert y.dtype == new.dtype == jnp.float32
    np.testing.assert_allclose(y, want_y, atol=1e-4)
    np.testing.assert_allclose(new, want_state, atol=1e-4)


def test_long_decays_neither_overflow_nor_vanish(rng):
    """exp of a sum of gaps, never a quotient of exps: dt A of -40 a token underflows to 0 and not to 0 / 0."""
    shape = (1, 70, 2)
    x, b, c = rng.normal(size=(*shape, 3)), *rng.normal(size=(2, 1, 70, 1, 4))
    dt, a = np.full(shape, 10.0), np.array([-4.0, -1e-6])
    args = [jnp.asarray(t, jnp.float32) for t in (x, dt, a, b, c, np.zeros((1, 2, 3, 4)))]
    y, state = jax.jit(ssm.ssm_scan)(*args)
    want_y, want_state = recurrence(*args)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(state, want_state, rtol=1e-4, atol=1e-2)


def test_mamba2_layer_equals_its_equations(rng):
    """Projection, causal convolution, gates, skip and norm of one sequence, in float64 and a token at a time."""
    layer = ir.init_weights(Mamba2(D, heads=4, head_dim=4, state_dim=8, groups=2, conv=4))
    x = rng.normal(size=(9, D)).astype(np.float32)
    w = weights_of(layer)

    def silu(t):
        return t / (1 + np.exp(-t))

    z, xbc, dt = np.split(x @ w["in_proj/weight"], [16, 16 + 16 + 32], axis=-1)
    tail = np.concatenate([np.zeros((3, xbc.shape[1])), xbc])
    mixed = silu(np.stack([(tail[t : t + 4] * w["conv_weight"]).sum(0) for t in range(9)]) + w["conv_bias"])
    u, b, c = np.split(mixed, [16, 32], axis=-1)
    u = u.reshape(1, 9, 4, 4)
    dt = np.log1p(np.exp(dt + w["dt_bias"]))[None]
    b, c = b.reshape(1, 9, 2, 8), c.reshape(1, 9, 2, 8)
    y, _ = recurrence(u, dt, -np.exp(w["a_log"]), b, c, np.zeros((1, 4, 4, 8)))
    y = (y + w["skip"][:, None] * u).reshape(9, 16) * silu(z)
    y = rms(y, w["norm/weight"], 1e-5)
    np.testing.assert_allclose(run_alone(layer, x), y @ w["out/weight"], atol=1e-4)


# Attention against its equations: the tests above compare the code with itself, these with float64 numpy.


def weights_of(layer) -> dict[str, np.ndarray]:
    return {path: np.asarray(v.get_value(), np.float64) for path, v in ir.params(layer).items()}


def rotate(x, theta):
    """x [T, N, H] at positions 0, 1, ...: the halves of a head turn against each other by p theta^(-2i/H)."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rms(x, weight, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def attend(q, k, v, scale, window=None, sinks=0, softcap=None):
    """q [T, N, H], k and v [T, K, H] -> [T, N Hv]; query head n reads kv head n // (N / K)."""
    length, heads = q.shape[:2]
    k, v = (np.repeat(x, heads // k.shape[1], axis=1) for x in (k, v))
    logits = np.einsum("qnh,snh->nqs", q, k) * scale
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    p, s = np.arange(length)[:, None], np.arange(length)
    seen = (s <= p) & ((s > p - (window or length)) | (s < sinks))
    weights = np.where(seen, np.exp(logits), 0)
    return np.einsum("nqs,snh->qnh", weights / weights.sum(-1, keepdims=True), v).reshape(length, -1)


def run_alone(layer, x):
    return jax.jit(lambda x: layer(x, Ragged.dense(1, len(x)), None)[0])(jnp.asarray(x))


@pytest.mark.parametrize(
    "window, sinks, softcap, norm", [(None, 0, None, False), (4, 0, None, True), (4, 2, 1.5, True)]
)
def test_attention_layer_equals_its_equations(window, sinks, softcap, norm, rng):
    layer = ir.init_weights(
        Attention(
            D,
            heads=4,
            kv_heads=2,
            head_dim=8,
            rope=Rope(theta=100.0, dim=8),
            scale=0.6,
            softcap=softcap,
            bias=True,
            norm=(lambda: RMSNorm(8)) if norm else None,
        )
    )
    layer.cache = layer.cache.replace(window=window, sinks=sinks)
    x, w = rng.normal(size=(11, D)).astype(np.float32), weights_of(layer)
    q, k, v = ((x @ w[f"{n}/weight"] + w[f"{n}/bias"]).reshape(11, -1, 8) for n in "qkv")
    if norm:
        q, k = rms(q, w["q_norm/weight"]), rms(k, w["k_norm/weight"])
    out = attend(rotate(q, 100.0), rotate(k, 100.0), v, 0.6, window, sinks, softcap)
    np.testing.assert_allclose(run_alone(layer, x), out @ w["o/weight"], atol=1e-4)


@pytest.mark.parametrize("q_rank, window, sinks", [(None, None, 0), (8, 4, 1)])
def test_mla_layer_equals_its_equations(q_rank, window, sinks, rng):
    """k_h = [W_UK,h c, k_r], v_h = W_UV,h c, with one rotated part of the keys for all heads."""
    rope = Rope(theta=100.0, dim=4)
    layer = ir.init_weights(MLA(D, heads=3, rank=8, nope_dim=4, value_dim=6, rope=rope, q_rank=q_rank))
    layer.cache = layer.cache.replace(window=window, sinks=sinks)
    x, w = rng.normal(size=(11, D)).astype(np.float32), weights_of(layer)
    low = rms(x @ w["q_a/weight"], w["q_norm/weight"]) if q_rank else x
    q = (low @ w["q_b/weight" if q_rank else "q/weight"]).reshape(11, 3, 8)
    q = np.concatenate([q[..., :4], rotate(q[..., 4:], 100.0)], axis=-1)
    c, k_r = np.split(x @ w["kv_a/weight"], [8], axis=-1)
    up = (rms(c, w["kv_norm/weight"]) @ w["kv_b/weight"]).reshape(11, 3, 10)
    k = np.concatenate([up[..., :4], np.repeat(rotate(k_r[:, None], 100.0), 3, axis=1)], axis=-1)
    out = attend(q, k, up[..., 4:], 8**-0.5, window, sinks)
    np.testing.assert_allclose(run_alone(layer, x), out @ w["o/weight"], atol=1e-4)


def test_mla_absorbed_equals_expanded_with_packed_weights(rng):
    """kv_b is used both ways, absorbed over caches and expanded without, whatever it is stored as."""
    model = ir.shallow(model_of("mla"))
    for layer in model.layers:
        weight = tensor.quantize(layer.mixer.kv_b.weight.get_value(), formats.parse("int4"))
        layer.mixer.kv_b = ir.replace(layer.mixer.kv_b, weight=weight)
    tokens = text(rng, 9)
    assert_same(Rows(model).run("a", tokens, [5]), full(model, tokens))


# Specs and plans.


def test_taps_are_the_inputs_of_layers(rng):
    model, tokens, ragged = model_of("gqa"), jnp.asarray(text(rng, 6)), Ragged.dense(1, 6)

    @jax.jit
    def run():
        hidden, caches, taps = model.backbone(tokens, ragged, taps=(0, 1))
        assert caches is None and len(taps) == 2
        last, _ = model.layers[1](taps[1], ragged, None)
        return hidden, taps, model.norm(last)

    hidden, taps, last = run()
    np.testing.assert_array_equal(taps[0], model.embed(tokens))
    np.testing.assert_allclose(hidden, last, atol=1e-5)


def test_counts_hide_what_pads_a_row(rng):
    model, a, b = model_of("hybrid"), text(rng, 7), text(rng, 4)
    both = jnp.asarray([a, [*b, 1, 2, 3]])
    logits = jax.jit(lambda: model(both, jnp.asarray([7, 4])))()
    assert_same(logits[0], full(model, a))
    assert_same(logits[1, :4], full(model, b))


@pytest.mark.parametrize("rectangular", [False, True])
def test_ragged_pads_and_unpads(rectangular):
    """Rows of 2, or of 2, 0 and 3 tokens with one idle row and a padding token: what a row holds comes back."""
    if rectangular:
        ragged, x = Ragged.dense(3, 2), jnp.arange(6.0)
        assert ragged.rectangular and ragged.positions.tolist() == [0, 1] * 3
    else:
        rows, starts, counts = ([0, 0, 2, 2, 2, 3], [0, 5, 2], [2, 0, 3])
        ragged = Ragged(
            rows=jnp.asarray(rows),
            starts=jnp.asarray(starts),
            counts=jnp.asarray(counts),
            positions=jnp.asarray([4, 5, 0, 1, 2, 0]),
            longest=4,
        )
        x = jnp.arange(6.0)
    wide = jnp.stack([x, -x], axis=1)

    @jax.jit
    def run(ragged, wide):
        padded = ragged.pad(wide)
        return padded, ragged.valid, ragged.unpad(padded)

    padded, valid, back = map(np.asarray, run(ragged, wide))
    assert padded.shape == (*valid.shape, 2) == (3, ragged.longest, 2)
    real = np.asarray(ragged.rows) < 3
    np.testing.assert_array_equal(padded[valid], np.asarray(wide)[real])
    np.testing.assert_array_equal(back[real], np.asarray(wide)[real])


def test_plan_groups_layers_by_what_they_keep():
    plan = model_of("hybrid").cache_plan()
    assert plan.keys == (("tokens", None, 0, None), ("tokens", WINDOW, SINKS, None), ("tokens", WINDOW, 0, None))
    assert [plan.group(i) for i in range(6)] == [0, None, 1, 0, 0, 2]
    assert [plan.owner(i) for i in range(6)] == [0, 1, 2, 3, 0, 5]
    assert [spec.window for spec in plan.groups] == [None, WINDOW, WINDOW]
    kv, latent, state = 4 * 2 * 2 * 8, 4 * 12, 4 * (3 * (16 + 32) + 4 * 4 * 8)
    assert plan.bytes(batch=3, context=5) == 3 * (5 * (3 * kv + latent) + state)
    assert plan.bytes(batch=1, context=100) == 100 * (kv + latent) + (WINDOW + SINKS + WINDOW) * kv + state
    caches = plan.abstract(LAYOUT)
    assert caches.layers[4] == {}, "a shared layer has no pool"
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches.layers))
    spare = P * (3 * kv + latent) + state  # a page and a row that take the writes of padding
    assert held - spare == LAYOUT.pages * P * (3 * kv + latent) + LAYOUT.slots * state
    room = [dataclasses.replace(LAYOUT, pages=pages) for pages in (3, 5, 7)]
    by_group = plan.abstract(room)
    assert [x.shape for x in by_group.positions] == [(4, P), (6, P), (8, P)]
    assert [by_group.layers[i][name].shape[0] for i, name in ((0, "k"), (2, "v"), (3, "latent"), (5, "k"))] == [
        4,
        6,
        4,
        8,
    ]


def test_packed_spec_counts_scales():
    spec = model_of("int8").cache_plan().specs[0]
    assert spec.unit_bytes == 2 * 2 * (8 + 2) and str(spec) == "paged int8"
    assert model_of("int4_asym").cache_plan().specs[0].unit_bytes == 2 * 2 * (4 + 2 + 1)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"window": 0}, "window 0; allowed: at least 1"),
        ({"format": formats.Int(width=4, group=3)}, r"stream k\[2, 8\].*not a multiple of the group 3"),
        ({"kind": "state", "window": 4}, "neither window nor format"),
    ],
)
def test_specs_refuse_what_cannot_be(change, told):
    spec: CacheSpec = model_of("gqa").cache_plan().specs[0]
    with pytest.raises(FormatError, match=told):
        spec.replace(**change)


@pytest.mark.parametrize("layer, share", [(1, 1), (0, 2), (1, -1), (2, 1), (2, 0)], ids=str)
def test_plan_refuses_to_share_what_is_not_there(layer, share):
    """Itself, a later layer, a negative index, a layer that shares itself, one with another window."""
    specs = list(build("gqa", "shared", "gqa").cache_plan().specs)
    specs[layer] = specs[layer].replace(share=share)
    if (layer, share) == (2, 0):
        specs[layer] = specs[layer].replace(window=3)
    with pytest.raises(FormatError, match=f"layers/{layer}: cache shared with layer {share}"):
        dataclasses.replace(model_of("gqa").cache_plan(), specs=tuple(specs))
