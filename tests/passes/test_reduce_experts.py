"""reduce_experts: experts that nobody takes and equal ones go without a trace, those that matter stay, clear refusals."""

from pathlib import Path

import calibrated
import families
import healing
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optx
from optx import ir
from optx.cache import Ragged
from optx.errors import OptxError, PassError
from optx.nn import Experts, MoE, Router
from optx.passes import reduce_experts as module
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.reduce_experts import ReduceExperts, alike, best, mean_outputs, reduce_experts
from optx.recipe import Recipe
from optx.registry import SeenBlock, Site

GOLDENS = Path(__file__).parent.parent / "goldens"


def shapes(family: str):
    return optx.load_config(GOLDENS / family / "config.json", dtype="float32").tree


def mixtures(tree) -> list[MoE]:
    return [layer.mlp for layer in tree.layers if isinstance(layer.mlp, MoE)]


NAMES = [path.parent.name for path in sorted(GOLDENS.glob("*/config.json")) if mixtures(shapes(path.parent.name))]


def through(model, **options):
    rule, text = ReduceExperts(**options), calibrated.windows(model)
    rule = rule.resolved(model, text) if rule.unresolved else rule
    return calibrated.through(model, Recipe(structure=[rule]), text)[0]


def core(moe: MoE) -> Experts:
    return next(part for _, part in ir.walk(moe.experts) if isinstance(part, Experts))


def changed(model, change):
    """The model with change(moe) in place of every mixture."""
    tree = ir.shallow(model)
    for layer in tree.layers:
        layer.mlp = change(layer.mlp) if isinstance(layer.mlp, MoE) else layer.mlp
    return tree


def prompt_of(model, length: int = 20):
    return np.random.default_rng(0).integers(0, model.embed.table.get_value().shape[0], length)


# Exactness.


def idle(moe: MoE, experts) -> MoE:
    """With a router that chooses none of `experts`."""
    bias = jnp.zeros(moe.router.experts).at[jnp.asarray(experts)].set(-1e3)
    router = ir.replace(moe.router, bias=nnx.Param(bias, axes=("experts",)))
    if router.selection_bias is not None:
        router = ir.replace(router, selection_bias=router.selection_bias.get_value() + bias)
    return ir.replace(moe, router=router)


@pytest.mark.parametrize("family", NAMES)
def test_experts_that_no_token_takes_are_pruned_exactly(family):
    """Biases, latent and shared experts, scores not normalized; where groups leave too few to choose from it is refused."""
    model, router = ir.init_weights(shapes(family), seed=1), mixtures(shapes(family))[0].router
    gone = [1] if router.groups == 1 else [0, 3, 5, 7]
    model = changed(model, lambda moe: idle(moe, gone))
    keep = router.experts - len(gone)
    if router.groups > 1:
        with pytest.raises(
            OptxError, match="a token takes 3 experts, and 4 stay in 2 of 4 groups; allowed: at least 8"
        ):
            through(model, keep=keep)
        return
    tree, tokens = through(model, keep=keep), calibrated.windows(model)[0][0]
    assert {core(moe).experts for moe in mixtures(tree)} == {keep}
    assert families.relative(families.forward(tree, tokens), families.forward(model, tokens)) < 1e-4


def permuted(moe: MoE, pairs) -> MoE:
    """Of each pair the second expert is the first one, its neurons in another order."""
    rng, experts = np.random.default_rng(0), core(moe)
    width, parts = experts.down.weight.get_value().shape[1], {}
    orders = [rng.permutation(width) for _ in pairs]
    for name in ("gate_up", "up", "down"):
        if (part := getattr(experts, name)) is None:
            continue
        weight, bias = (None if v is None else np.array(v.get_value()) for v in (part.weight, part.bias))
        for (one, two), order in zip(pairs, orders, strict=True):
            columns = {"gate_up": np.concatenate([order, order + width]), "up": order, "down": slice(None)}[name]
            weight[two] = weight[one][order] if name == "down" else weight[one][:, columns]
            if bias is not None:
                bias[two] = bias[one][columns]
        more = {} if bias is None else {"bias": jnp.asarray(bias)}
        parts[name] = ir.replace(part, weight=jnp.asarray(weight), **more)
    new = ir.replace(experts, **parts)
    return ir.replace(moe, experts=new if moe.experts is experts else ir.replace(moe.experts, inner=new))


@pytest.mark.parametrize("family", NAMES)
def test_equal_experts_merge_exactly(family):
    """Also where a token takes both of a pair, and routers with biases and groups."""
    count = mixtures(shapes(family))[0].router.experts
    model = changed(ir.init_weights(shapes(family), seed=1), lambda moe: permuted(moe, [(0, 3), (2, 1)]))
    tree, tokens = through(model, keep=count - 2, how="merge"), prompt_of(model)
    for moe in mixtures(tree):
        assert moe.merged[0] == moe.merged[3] and moe.merged[1] == moe.merged[2] and len(set(moe.merged)) == count - 2
        assert moe.router.experts == count and core(moe).experts == count - 2
    assert families.relative(families.forward(tree, tokens), families.forward(model, tokens)) < 1e-4


def test_neurons_are_matched_before_they_are_averaged():
    model = changed(ir.init_weights(shapes("mixtral"), seed=1), lambda moe: permuted(moe, [(0, 3), (2, 1)]))
    tree, tokens = through(model, keep=3, how="merge", align=False), prompt_of(model)
    assert families.relative(families.forward(tree, tokens), families.forward(model, tokens)) > 1e-2


def test_means_are_weighted_by_tokens():
    """Two experts in one: the mean of their weights by the tokens that each got."""
    moe = ir.init_weights(MoE(Router(8, 2, top_k=1), Experts(2, 8, 4)), 0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 8)), jnp.float32)
    site = Site(path="layers/0/mlp", layers=1, seen=SeenBlock(parts={}, inputs=((x,),)))
    new = reduce_experts(site, moe, ReduceExperts(keep=1, how="merge", groups=((0, 0),), align=False))
    shares = np.bincount(np.asarray(moe.router(x).experts)[:, 0], minlength=2) / 50
    assert 0.1 < shares[0] < 0.9 and shares[0] != 0.5
    want = np.tensordot(shares, np.asarray(moe.experts.down.weight.get_value()), 1)
    assert families.relative(new.experts.down.weight.get_value()[0], want) < 1e-5


# What stays.


def uneven(moe: MoE) -> MoE:
    """Every other expert is seldom taken and gives little."""
    small = jnp.arange(moe.router.experts) % 2 == 1
    router = ir.replace(moe.router, bias=nnx.Param(jnp.where(small, -3.0, 0.0), axes=("experts",)))
    down = moe.experts.down
    down = ir.replace(down, weight=down.weight.get_value() * jnp.where(small, 0.3, 3.0)[:, None, None])
    return ir.replace(moe, router=router, experts=ir.replace(moe.experts, down=down))


def test_saliency_beats_chance(monkeypatch):
    model = changed(ir.init_weights(shapes("qwen3_moe"), seed=1), uneven)
    tokens = prompt_of(model, 60)
    want = families.forward(model, tokens)
    ours, chance = families.relative(families.forward(through(model, keep=0.5), tokens), want), []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        draw = lambda worth, groups, count, rng=rng: np.sort(rng.permutation(len(worth))[:count])  # noqa: E731
        monkeypatch.setattr(module, "best", draw)
        chance.append(families.relative(families.forward(through(model, keep=0.5), tokens), want))
    assert ours < min(chance) and ours < 0.6 * np.mean(chance), (ours, chance)


def test_worth_is_gate_times_output_over_routed_tokens():
    moe = ir.init_weights(MoE(Router(8, 4, top_k=2), Experts(4, 8, 6)), 0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(30, 8)), jnp.float32)
    site = Site(path="layers/0/mlp", layers=1, seen=SeenBlock(parts={}, inputs=((x[:11],), (x[11:],))))
    loads, worth = module._statistics(site, moe)
    routing = moe.router(x)
    for e in range(4):
        hits = [(t, k) for t, k in np.argwhere(np.asarray(routing.experts) == e)]
        gate, up = np.split(
            np.asarray(x, np.float64) @ np.asarray(moe.experts.gate_up.weight.get_value())[e], 2, axis=-1
        )
        y = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(moe.experts.down.weight.get_value())[e]
        sizes = [float(routing.weights[t, k]) * np.linalg.norm(y[t]) for t, k in hits]
        assert loads[e] == len(hits) and worth[e] == pytest.approx(np.mean(sizes), rel=1e-4)


def test_groups_keep_equally_many():
    worth = np.array([9, 8, 7, 6, 1, 2, 3, 4.0])
    assert best(worth, 1, 4).tolist() == [0, 1, 2, 3]
    assert best(worth, 2, 4).tolist() == [0, 1, 6, 7]
    router = Router(8, 8, top_k=2, score="sigmoid", selection_bias=True, groups=4, kept=2)
    moe = idle(ir.init_weights(MoE(router, Experts(8, 8, 6)), 0), [0, 3, 5, 6])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(30, 8)), jnp.float32)
    site = Site(path="layers/0/mlp", layers=1, seen=SeenBlock(parts={}, inputs=((x,),)))
    new = reduce_experts(site, moe, ReduceExperts(keep=4))
    kept = np.array([1, 2, 4, 7])
    for name in ("weight", "bias", "selection_bias"):
        assert np.array_equal(getattr(new.router, name).get_value(), getattr(moe.router, name).get_value()[..., kept])
    assert new.router.groups == 4 and new.router.kept == 2


def test_alike_outputs_are_found():
    features = np.array([[0, 0], [5, 5], [0, 0.1], [9, 0], [5.1, 5.0]])
    one, two, three, four, five = alike(features, 3)
    assert one == three and two == five and len({one, two, four}) == 3
    assert alike(features, 5) == (0, 1, 2, 3, 4)


def test_mean_outputs_are_of_all_tokens():
    model, text = ir.init_weights(shapes("mixtral"), seed=1), [np.arange(12, dtype=np.int32)[None]]
    found = mean_outputs(model, text)
    moe, held = model.layers[0].mlp, []
    block = model.layers[0]
    x = model.embed(jnp.arange(12))
    y = x + block.mixer(block.norm(x), Ragged.dense(1, 12), None)[0]
    for e in range(moe.router.experts):
        held.append(moe.experts.outputs(block.mlp_norm(y), jnp.full((12, 1), e, jnp.int32))[:, 0].mean(0))
    assert set(found) == {0, 1} and families.relative(found[0], np.asarray(held)) < 1e-4


# In the compiler.


def test_before_expected():
    planned = optx.plan(shapes("mixtral"), Recipe(structure=[ReduceExperts(keep=0.6)]))
    assert planned.records[0].diff.splitlines() == [
        "-layers/0-1/mlp/router: Router f32[48, 5] experts=5 top_k=2 score=softmax normalized=True scale=1 groups=1 kept=1",
        "-layers/0-1/mlp/experts: Experts glu=silu gated=True experts=5 active=0.4",
        "-layers/0-1/mlp/experts/gate_up: GroupedLinear f32[5, 48, 112] experts=5",
        "-layers/0-1/mlp/experts/down: GroupedLinear f32[5, 56, 48] experts=5",
        "+layers/0-1/mlp/router: Router f32[48, 3] experts=3 top_k=2 score=softmax normalized=True scale=1 groups=1 kept=1",
        "+layers/0-1/mlp/experts: Experts glu=silu gated=True experts=3 active=0.666667",
        "+layers/0-1/mlp/experts/gate_up: GroupedLinear f32[3, 48, 112] experts=3",
        "+layers/0-1/mlp/experts/down: GroupedLinear f32[3, 56, 48] experts=3",
    ]


def test_bytes_fall():
    planned = optx.plan(shapes("mixtral"), Recipe(structure=[ReduceExperts(keep=3)]))
    old, new = (ir.get(tree, "layers/0/mlp") for tree in planned.trees)
    (_, d, f2), router = old.experts.gate_up.weight.get_value().shape, old.router.weight.get_value().shape[0]
    one = 4 * (d * f2 + f2 // 2 * d)
    assert ir.weight_bytes(new) == 3 * one + 4 * 3 * router
    assert ir.active_bytes(new, 1) == 2 * one + 4 * 3 * router, "a token still takes two"
    assert ir.active_bytes(new, 4) == round(3 * one * (1 - (1 / 3) ** 4) + 4 * 3 * router)
    merged = optx.plan(
        shapes("mixtral"), Recipe(structure=[ReduceExperts(keep=3, how="merge", groups=((0, 1, 2, 0, 1),) * 2)])
    )
    assert ir.weight_bytes(ir.get(merged.tree, "layers/0/mlp")) == 3 * one + 4 * 5 * router


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1}, "layers/0/mlp|layers/1/mlp: a token takes 2 experts, and 1 stay; allowed: at least 2"),
        ({"keep": 2.5}, "keep 2.5 of 5 experts; allowed: a whole number from 1 to 5"),
        ({"keep": 6}, "keep 6 of 5 experts"),
        ({"keep": 0.01}, "keep 0.01 of 5 experts"),
        ({"keep": 5}, "changed nothing: has 5 experts"),
        (
            {"keep": 3, "how": "merge", "groups": ((0, 1, 2),) * 2},
            r"groups \[0, 1, 2\]; allowed: one of 0 to 2 for each of its 5",
        ),
        ({"keep": 3, "how": "merge", "groups": ((0, 1, 1, 1, 1),) * 2}, "each used"),
        ({"keep": 3, "how": "merge", "groups": ()}, r"groups \[\]; allowed"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(OptxError, match=message):
        optx.plan(shapes("mixtral"), Recipe(structure=[ReduceExperts(**options)]))


def test_groups_that_do_not_divide():
    with pytest.raises(
        OptxError, match="6 experts do not divide into its 4 groups, of which a token looks at 2; allowed: multiples"
    ):
        optx.plan(shapes("deepseek_v3"), Recipe(structure=[ReduceExperts(keep=6)]))


def test_packed_experts_are_refused():
    model = ir.init_weights(shapes("mixtral"), seed=1)
    packed, _ = calibrated.through(model, Recipe(weights=[QuantizeWeights(format="int8", match=".*/experts/.*")]))
    with pytest.raises(PassError, match="wants dense weights"):
        reduce_experts(Site(path="layers/0/mlp", layers=2), packed.layers[0].mlp, ReduceExperts(keep=3))


@pytest.mark.parametrize("how", ["prune", "merge"])
def test_calibration_text_is_asked_for(how):
    with pytest.raises(OptxError, match="inputs|needs a text"):
        optx.compile(
            ir.init_weights(shapes("mixtral")), Recipe(structure=[ReduceExperts(keep=3, how=how)]), target="cpu"
        )


MIXTRAL = {
    **families.CONFIGS["llama"], "model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.fixture(scope="module", params=["prune", "merge"])
def made(tmp_path_factory, request):
    """(a compiled model on its way through a file, its folder)."""
    folder = tmp_path_factory.mktemp("reduced")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.CONFIGS, "mixtral", MIXTRAL)
        path, _ = families.hf_dir(folder / "mixtral", "mixtral", add_bos=True)
    recipe = Recipe(structure=[ReduceExperts(keep=3, how=request.param)])
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
    assert [moe.merged for moe in mixtures(again)] == [moe.merged for moe in mixtures(compiled.tree)]
