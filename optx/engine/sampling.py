"""Token choice on the device: greedy, temperature, top-k, top-p, with a seed a row."""

import jax
import jax.numpy as jnp


def sample(logits, temperature, top_k, top_p, seeds, steps):
    """logits float32[B, V]; by row: temperature (0: greedy), top_k (0: off), top_p, seed uint32, step int32 -> int32[B].

    The draw depends on the row's seed and step alone (Gumbel maximum over the kept tokens), not on the batch.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / jnp.maximum(temperature, 1e-6)[:, None]
    order = jnp.argsort(-scaled, axis=-1)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
    rank = jnp.arange(logits.shape[-1])
    keep = (rank < jnp.where(top_k > 0, top_k, logits.shape[-1])[:, None]) & (
        # The token that crosses the threshold is kept: mass before it is below top_p.
        (mass - jax.nn.softmax(ranked, axis=-1) < top_p[:, None]) | (rank == 0)
    )
    keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(seeds, steps)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    noise = jnp.take_along_axis(noise, order, axis=-1)  # noise belongs to the token, not to its rank
    drawn = jnp.argmax(jnp.where(keep, ranked + noise, -jnp.inf), axis=-1)
    drawn = jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return jnp.where(temperature > 0, drawn, greedy)
