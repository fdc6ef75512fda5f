"""Attention over a sliding window on chosen layers, first tokens kept as sinks."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import ir
from optx.errors import PassError
from optx.nn.attention import Attention
from optx.passes.head_moments import weights_of
from optx.passes.layer_choice import LARGEST, left_out, taken
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register
from optx.watch import watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingWindow(PassOptions):
    window: int  # newest tokens that a query sees
    sinks: int = 4  # first tokens that stay visible (StreamingLLM); 0: none
    layers: tuple[int, ...] | None = None  # indices, negative from the end; None: every matched layer
    keep_every: int | None = None  # with layers None: every n-th layer stays global (6 gives Gemma's 5:1); None: none
    # Which those are. place: every n-th; mass: as many, those that attend most to what the window hides, on calibration text.
    by: Literal["place", "mass"] = "place"

    @property
    def unresolved(self) -> bool:
        return self.by == "mass"

    def resolved(self, model: nnx.Module, windows: Sequence[np.ndarray]) -> "SlidingWindow":
        """With `layers` in place of `keep_every`. Raises PassError where that says nothing."""
        if self.layers is not None or not self.keep_every:
            raise PassError(
                "sliding_window.by: mass chooses the layers that keep_every leaves global: give it, and no layers"
            )
        match = re.compile(self.match or ".*")
        mass = far_mass(model, windows, self.window, self.sinks)
        mass = {layer: share for layer, share in mass.items() if match.fullmatch(f"layers/{layer}/mixer")}
        layers = taken(mass, len(mass) // self.keep_every)
        return dataclasses.replace(self, by="place", keep_every=None, layers=layers)


@register(
    "sliding_window",
    axis=Axis.READS,
    stage=Stage.ATTENTION,
    options=SlidingWindow,
    exact=False,
    needs_healing=True,
)
def sliding_window(site: Site, attn: Attention, opt: SlidingWindow) -> Attention | Skipped:
    """A query at position p sees keys at positions > p - window, and positions < sinks; passed pages are freed.

    The cache holds at most window + sinks tokens a row. Sinks: Xiao et al. 2023, arXiv:2309.17453; interleaving of local
    and global layers: Gemma 3, arXiv:2503.19786. A substitution on a model trained with full attention costs quality at
    distances beyond the window; layers that already have a smaller window stay as they are. Layers chosen by mass stand where
    those chosen by place would until a compile has measured them: bytes are the same.
    """
    for name, least in (("window", 1), ("sinks", 0)):
        if not least <= getattr(opt, name) <= LARGEST:  # positions are int32
            raise PassError(f"sliding_window: {name} {getattr(opt, name)}; allowed: {least} to {LARGEST}")
    which = "global; which ones, calibration text says" if opt.unresolved else "global"
    if reason := left_out(site, opt.layers, opt.keep_every, "sliding_window", which):
        return Skipped(reason)
    if attn.cache.window is not None and attn.cache.window <= opt.window:
        return Skipped(f"has a window of {attn.cache.window}")
    return ir.replace(attn, cache=attn.cache.replace(window=opt.window, sinks=opt.sinks))


def far_mass(model: nnx.Module, windows: Sequence[np.ndarray], window: int, sinks: int) -> dict[int, float]:
    """Layer -> share of its attention that a window would hide: mean over heads, texts and the queries that have such keys.

    windows: int32[1, T] each. Layers whose keys are another layer's, and those with such a window already, are left out.
    Raises: PassError for texts that no window cuts.
    """
    if windows[0].shape[1] <= window + sinks:
        raise PassError(
            f"by: mass is measured on texts of {windows[0].shape[1]} tokens, of which a window of {window} and "
            f"{sinks} sinks hides none; set calibration: {{context: N}} in the recipe to more"
        )
    paths = {f"layers/{i}/mixer": i for i, layer in enumerate(model.layers) if _full(layer.mixer, window)}
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, tokens):
        tree, found = nnx.merge(graph, state), {}
        parts = {path: ir.get(tree, path) for path in paths}

        def note(path, call, x, ragged, view):
            q, k, _ = parts[path].turned(x, ragged.positions)
            found[path] = _far(parts[path], ragged.pad(q), ragged.pad(k), window, sinks)
            return call(x, ragged, view)

        watch(tree, list(paths), note)
        tree(tokens)
        return found

    found = [run(state, jnp.asarray(tokens)) for tokens in windows]
    return {layer: float(np.mean([float(each[path]) for each in found])) for path, layer in paths.items()}


def _full(mixer: nnx.Module | None, window: int) -> bool:
    own = isinstance(mixer, Attention) and mixer.cache.share is None
    return own and (mixer.cache.window is None or mixer.cache.window > window)


def _far(attn: Attention, q: jax.Array, k: jax.Array, window: int, sinks: int) -> jax.Array:
    """q [B, S, N, H], k [B, S, K, H] -> float32[]."""
    at = jnp.arange(k.shape[1])
    hidden = (at[:, None] - at >= window) & (at >= sinks)
    mass = jnp.sum(weights_of(attn, q, k) * hidden, axis=-1)
    return jnp.mean(mass[..., window + sinks :])
