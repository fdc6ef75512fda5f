"""upcycle: all experts together are the dense MLP, grouped neurons and a fitted router lose less than random ones, bytes fall."""

from pathlib import Path

import calibrated
import families
import healing
import jax.numpy as jnp
import numpy as np
import pytest

import optx
from optx import ir
from optx.errors import OptxError, PassError
from optx.heal import heal
from optx.heal_loss import routers
from optx.nn import MLP, GatedMLP, JoinedGatedMLP, MoE
from optx.nn.moe import load, recorded
from optx.passes.fuse_projections import FuseProjections
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.upcycle import Upcycle, balanced, grouped, predictor, upcycle
from optx.recipe import Recipe
from optx.registry import SeenBlock, Site

GOLDENS = Path(__file__).parent.parent / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))


def shapes(family: str):
    return optx.load_config(GOLDENS / family / "config.json", dtype="float32").tree


def dense(tree) -> list[int]:
    return [i for i, layer in enumerate(tree.layers) if isinstance(layer.mlp, GatedMLP | JoinedGatedMLP | MLP)]


def through(model, text=None, **options):
    return calibrated.through(model, Recipe(structure=[Upcycle(**options)]), text)[0]


ALL = {
    "split": {"experts": 4, "top_k": 4},
    "shared": {"experts": 4, "shared": 1, "top_k": 3},
    "copy": {"experts": 3, "top_k": 2, "how": "copy"},
}


# Each family in one of the ways, in turn; llama in all.
TURNS = [(family, list(ALL)[i % len(ALL)]) for i, family in enumerate(NAMES)]


@pytest.mark.parametrize(("family", "name"), sorted({*TURNS, *(("llama", name) for name in ALL)}))
def test_all_experts_are_the_dense_model(family, name):
    """Of every family with dense MLPs, gated or not, joined, with biases or without; the others are refused."""
    model = ir.init_weights(shapes(family), seed=1)
    if not dense(model):
        with pytest.raises(OptxError, match="has no site|changed nothing: runs for every token beside the experts"):
            optx.plan(shapes(family), Recipe(structure=[Upcycle(**ALL[name])]))
        return
    tokens = np.random.default_rng(0).integers(0, model.embed.table.get_value().shape[0], 20)
    tree = through(model, **ALL[name])
    assert all(isinstance(tree.layers[i].mlp, MoE) for i in dense(model))
    assert families.relative(families.forward(tree, tokens), families.forward(model, tokens)) < 1e-4


def test_biases_are_added_once_whatever_is_chosen():
    """Neurons that give nothing leave the output's bias, with any experts taken."""
    model = families.concrete("llama", mlp_bias=True)
    tree = ir.shallow(model)
    for layer in tree.layers:
        down = ir.replace(layer.mlp.down, weight=jnp.zeros_like(layer.mlp.down.weight.get_value()))
        layer.mlp = ir.replace(layer.mlp, down=down)
    for options in ({"experts": 8, "top_k": 2}, {"experts": 8, "top_k": 2, "shared": 1}):
        new, prompt = through(tree, **options), families.prompt(20)
        assert families.relative(families.forward(new, prompt), families.forward(tree, prompt)) < 1e-5


def test_noise_is_relative_and_seeded():
    model, prompt = families.concrete("llama"), families.prompt(20)
    want, copies = families.forward(model, prompt), {"experts": 3, "top_k": 2, "how": "copy"}
    small, large, again, other = (
        families.forward(through(model, **copies, noise=noise, seed=seed), prompt)
        for noise, seed in ((0.01, 0), (0.1, 0), (0.1, 0), (0.1, 1))
    )
    assert 1e-4 < families.relative(small, want) < families.relative(large, want) < 0.5
    assert np.array_equal(large, again) and not np.allclose(large, other)


# Grouping and routing.


def clustered(seed: int = 0, groups: int = 4, d: int = 16, f: int = 64) -> tuple[GatedMLP, jnp.ndarray, np.ndarray]:
    """An MLP whose neurons, in random order, belong to groups of which a token drives one; the inputs; each neuron's group."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.normal(size=(d, d)))[0][:, :groups] * 6
    group = rng.permutation(np.arange(f) % groups)
    mlp = ir.init_weights(GatedMLP(d, f), seed)
    gate = centres[:, group] + 0.1 * rng.normal(size=(d, f)) - 3 * centres.sum(1, keepdims=True) / 36
    mlp = ir.replace(mlp, gate=ir.replace(mlp.gate, weight=jnp.asarray(gate, jnp.float32)))
    of_token = rng.integers(0, groups, 3000)
    x = centres[:, of_token].T / 6 + 0.15 * rng.normal(size=(3000, d))
    return mlp, jnp.asarray(x, jnp.float32), group


def applied(mlp, x, **options) -> MoE:
    return upcycle(
        Site(path="layers/0/mlp", layers=1, seen=SeenBlock(parts={}, inputs=((x,),))), mlp, Upcycle(**options)
    )


def lost(new, mlp, x) -> float:
    return families.relative(new(x), mlp(x))


def with_router(new: MoE, seed: int) -> MoE:
    drawn = jnp.asarray(np.random.default_rng(seed).normal(size=new.router.weight.get_value().shape), jnp.float32)
    return ir.replace(new, router=ir.replace(new.router, weight=drawn, bias=jnp.zeros(new.router.experts)))


def test_groups_are_found_and_predicted():
    mlp, x, group = clustered()
    seen, held = x[:2000], x[2000:]
    found = applied(mlp, seen, experts=4, top_k=1)
    columns = np.asarray(mlp.down.weight.get_value())
    rows = [{tuple(row) for row in np.asarray(one)} for one in found.experts.down.weight.get_value()]
    assert sorted(map(sorted, rows)) == sorted(sorted(map(tuple, columns[group == g])) for g in range(4))
    random = applied(mlp, seen, experts=4, top_k=1, groups="random")
    assert lost(found, mlp, held) < 0.2 < 0.6 < lost(with_router(random, 0), mlp, held)
    assert lost(found, mlp, held) < 0.4 * lost(random, mlp, held), "the same router on other groups"
    assert lost(found, mlp, held) < 0.4 * lost(with_router(found, 0), mlp, held), "other routers on the same groups"


def test_the_busiest_neurons_are_shared():
    mlp, x, _ = clustered()
    up = np.asarray(mlp.up.weight.get_value()).copy()
    busy = [3, 17, 20, 31, 40, 44, 59, 61]
    up[:, busy] = 30 * np.sign(np.asarray(mlp.gate.weight.get_value()))[:, busy]
    mlp = ir.replace(mlp, up=ir.replace(mlp.up, weight=jnp.asarray(up)))
    new = applied(mlp, x, experts=8, shared=1, top_k=2)
    assert np.array_equal(new.shared.up.weight.get_value(), up[:, busy])
    assert new.experts.down.weight.get_value().shape == (7, 8, 16)


def test_grouping_captures_energy_and_is_balanced():
    energy = np.square(np.random.default_rng(0).normal(size=(500, 40))) * (
        1 + 30 * (np.arange(40) % 5 == np.arange(500)[:, None] % 5)
    )
    start = np.random.default_rng(1).permutation(40) % 5

    def held(owners):
        return np.sort(energy @ np.eye(5)[owners], axis=1)[:, -1].sum() / energy.sum()

    owners = grouped(energy, start, 1)
    assert np.bincount(owners).tolist() == [8] * 5
    assert held(start) < 0.5 and held(owners) > 0.85
    gain = np.array([[9, 1.0], [8, 0], [7, 6.5], [6, 5.9]])
    assert balanced(gain, 2).tolist() == [0, 0, 1, 1], "what loses least goes where room is"


def test_the_router_is_a_regression():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(400, 6)) + 2, rng.normal(size=(6, 3))
    wanted = x @ w + np.array([5, 1, 2.0])
    weight, bias = predictor(x, wanted)
    assert families.relative(x @ weight + bias, (wanted - wanted.mean()) / wanted.std()) < 1e-2


# In the compiler.


def test_before_expected():
    planned = optx.plan(families.abstract("llama"), Recipe(structure=[Upcycle(experts=8, shared=1, top_k=1)]))
    assert planned.records[0].diff.splitlines() == [
        "-layers/0-1/mlp: GatedMLP activation=silu",
        "-layers/0-1/mlp/gate: Linear f32[32, 64]",
        "-layers/0-1/mlp/up: Linear f32[32, 64]",
        "-layers/0-1/mlp/down: Linear f32[64, 32]",
        "+layers/0-1/mlp: MoE",
        "+layers/0-1/mlp/router: Router f32[32, 7] bias=f32[7] selection_bias=f32[7] gain=f32[7] experts=7 top_k=1 "
        "score=sigmoid normalized=False scale=1 groups=1 kept=1",
        "+layers/0-1/mlp/experts: Experts glu=silu gated=True experts=7 active=0.142857",
        "+layers/0-1/mlp/experts/gate_up: GroupedLinear f32[7, 32, 16] experts=7",
        "+layers/0-1/mlp/experts/down: GroupedLinear f32[7, 8, 32] experts=7",
        "+layers/0-1/mlp/shared: GatedMLP activation=silu",
        "+layers/0-1/mlp/shared/gate: Linear f32[32, 8]",
        "+layers/0-1/mlp/shared/up: Linear f32[32, 8]",
        "+layers/0-1/mlp/shared/down: Linear f32[8, 32]",
    ]


def test_weights_read_a_token_fall():
    """Of 8 parts of 64 neurons a token takes 2: their weights alone at batch 1; at batch B the shared one and 7 (1 - (6/7)^B)."""
    planned = optx.plan(families.abstract("llama"), Recipe(structure=[Upcycle(experts=8, shared=1, top_k=1)]))
    old, new = (ir.get(tree, "layers/0/mlp") for tree in planned.trees)
    part, router = 3 * families.D * 8 * 4, (families.D + 3) * 7 * 4
    assert ir.weight_bytes(old) == 8 * part and ir.weight_bytes(new) == 8 * part + router
    for tokens in (1, 2, 5, 100):
        assert ir.active_bytes(new, tokens) == round(part + router + 7 * part * (1 - (6 / 7) ** tokens))
    assert ir.active_bytes(new, 1) == 2 * part + router


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"experts": 7, "top_k": 2},
            r"layers/1/mlp: 64 hidden neurons do not divide into 7 experts; allowed: .*\[2, 4, 8, 16\]",
        ),
        ({"experts": 8, "top_k": 9}, "top_k 9 of 8 experts, 0 of them shared; allowed: 1 to experts - shared"),
        ({"experts": 8, "top_k": 8, "shared": 1}, "top_k 8 of 8 experts, 1 of them shared"),
        ({"experts": 8, "top_k": 0}, "top_k 0 of 8"),
        ({"experts": 4, "top_k": 1, "shared": 4}, "4 of them shared"),
        ({"experts": 4, "top_k": 1, "shared": 1, "how": "copy"}, "shared 1; allowed with copy: 0"),
        ({"experts": 4, "top_k": 1, "noise": 0.1}, "noise 0.1; allowed with split: 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(PassError, match=message):
        optx.plan(families.abstract("llama"), Recipe(structure=[Upcycle(**options)]))


def test_calibration_text_is_asked_for():
    with pytest.raises(OptxError, match="inputs"):
        optx.compile(families.concrete("llama"), Recipe(structure=[Upcycle(experts=8, top_k=2)]), target="cpu")


def test_packed_weights_are_refused():
    packed, _ = calibrated.through(families.concrete("llama"), Recipe(weights=[QuantizeWeights(format="int8")]))
    with pytest.raises(PassError, match="wants dense weights"):
        upcycle(Site(path="layers/0/mlp", layers=2), packed.layers[0].mlp, Upcycle(experts=8, top_k=2))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a compiled model on its way through a file, its text)."""
    folder = tmp_path_factory.mktemp("upcycle")
    path, _ = families.hf_dir(folder / "llama", "llama", add_bos=True)
    recipe = Recipe(
        structure=[Upcycle(experts=8, shared=1, top_k=2)],
        weights=[QuantizeWeights(format="int8", match=".*/mlp/experts/.*")],
        lower=[FuseProjections()],
    )
    return optx.compile(str(path), recipe, target="cpu", calibration=healing.TEXT), folder


def test_the_engine_decodes_what_the_forward_says(made):
    compiled, _ = made
    prompt = families.prompt(9)
    answer = compiled.generate([prompt], optx.Sampling(max_tokens=6))[0]
    ids = list(prompt)
    for token in answer:
        assert token == int(np.asarray(compiled.logits(np.asarray([ids], np.int32)))[0, -1].argmax())
        ids.append(token)


def test_save_and_load(made):
    compiled, folder = made
    optx.export(compiled, folder / "out")
    again = optx.load(str(folder / "out")).load()
    prompt = families.prompt(12)
    assert np.array_equal(families.forward(again, prompt), families.forward(compiled.tree, prompt))


def imbalance(tree, tokens) -> float:
    """Load of the busiest expert over the mean, on average over layers."""
    with recorded() as routings:
        tree(jnp.asarray(tokens))
    return float(np.mean([float(load(r).max() / load(r).mean()) for r in routings]))


@pytest.mark.slow
def test_healing_evens_loads_and_moves_the_router(tmp_path):
    """Selection biases alone keep the balance: the same run without them does not."""
    source = healing.source()
    teacher = source.load()
    student = through(teacher, experts=8, top_k=2)
    for layer in student.layers:  # two experts take nearly all
        bias = layer.mlp.router.bias.get_value().at[:2].add(2.0)
        layer.mlp = ir.replace(layer.mlp, router=ir.replace(layer.mlp.router, bias=bias))
    assert all(routers(student)), "a zero bias where the conversion made the router"
    tokens = np.asarray(source.tokenizer.encode(healing.TEXT)[:512], np.int32).reshape(4, -1)
    found = {}
    for balance in (0.0, 0.05):
        options = healing.options(tmp_path, balance=balance, steps=30, every=30, converted=0.0, lr=1e-3, others=1.0)
        out, won = heal(source, teacher, student, options, folder=tmp_path / str(balance))
        found[balance] = imbalance(out, tokens), won.kl, out
    before, kept, evened = imbalance(student, tokens), found[0.0][0], found[0.05][0]
    assert before > 3 and evened < 0.7 * min(before, kept), (before, kept, evened)
    first, last = found[0.05][1]
    assert last < first, "healing wins while loads even out"
    moved = found[0.05][2].layers[0].mlp.router
    assert np.abs(moved.gain.get_value()).max() > 1e-4
    assert not np.array_equal(moved.weight.get_value(), student.layers[0].mlp.router.weight.get_value())
