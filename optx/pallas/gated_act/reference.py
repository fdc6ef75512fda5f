"""gated_act in plain JAX, and the activations by their names."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv:2109.08668
}


def gated_act(gate, up, *, activation: str) -> jax.Array:
    """act(gate) * up (arXiv:2002.05202): gate and up [T, F], or both side by side in gate [T, 2F] and None -> [T, F]."""
    if up is None:
        gate, up = jnp.split(gate, 2, axis=-1)
    return ACTIVATIONS[activation](gate) * up
