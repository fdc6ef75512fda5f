"""What one layer's decode step costs at several context lengths, by XLA's count of the compiled program.

    python -m optx.bench.layer_cost MODEL [--contexts 64 4096]

MODEL: a config.json or the name of a published one. A layer that keeps a state costs the same at any context; one that keeps
tokens reads them all. Counts are of the reference ops on the running machine, before any recipe.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import optx
from optx import ir
from optx.cache import Address, CachePlan, Caches, Layout, Ragged, pages_for, view
from optx.configs import model_names, model_path


def layer_cost(mixer: nnx.Module, d: int, context: int, *, dtype="float32", page_size=16) -> tuple[float, float]:
    """(FLOPs, bytes accessed) of mixer(x [1, D]) for one row, with room for `context` tokens in its cache."""
    plan, pages = CachePlan(specs=(mixer.cache,)), pages_for(context, page_size)
    groups = len(plan.keys)
    address = Address(
        tables=(_ints(1, 1, pages),) * groups, lengths=(_ints(1, 1),) * groups, writes=(_ints(1),) * groups, slots=_ints(1)
    )  # fmt: skip
    ragged = Ragged(
        rows=_ints(1), starts=_ints(1), counts=_ints(1), positions=_ints(1), longest=1, rectangular=True
    )  # fmt: skip
    caches = plan.abstract(Layout(pages=pages, page_size=page_size, slots=1))
    graph, leaves = nnx.split(mixer)

    def step(leaves, pools, positions, x, ragged, address):
        here = view(plan, Caches(layers=pools, positions=positions), address, 0)
        return nnx.merge(graph, leaves)(x, ragged, here)

    x = jax.ShapeDtypeStruct((1, d), jnp.dtype(dtype))
    jitted = jax.jit(step, donate_argnums=1)
    cost = jitted.lower(leaves, caches.layers, caches.positions, x, ragged, address).compile().cost_analysis()
    return cost["flops"], cost["bytes accessed"]


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 4096])
    args = parser.parse_args()
    tree = optx.load_config(model_path(args.model) if args.model in model_names() else Path(args.model)).tree
    table = tree.embed.table.get_value()
    kinds: dict[tuple, nnx.Module] = {}
    for layer in tree.layers:
        if layer.mixer is not None:
            kinds.setdefault(ir.signature(layer.mixer), layer.mixer)
    for mixer in kinds.values():
        print(f"{type(mixer).__name__} {mixer.cache}")
        for context in args.contexts:
            flops, read = layer_cost(mixer, table.shape[1], context, dtype=table.dtype)
            print(f"  context {context:>9,}: {flops:>18,.0f} FLOPs {read:>18,.0f} bytes")


if __name__ == "__main__":
    main()
