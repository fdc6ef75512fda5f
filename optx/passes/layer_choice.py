"""Which layers a pass takes where its options are a list of layers, or every n-th that stays."""

from collections.abc import Mapping, Sequence

from optx.errors import PassError
from optx.registry import Site

LARGEST = 2**31 - 1


def left_out(site: Site, layers: Sequence[int] | None, keep_every: int | None, name: str, stays: str) -> str | None:
    """Why the site's layer stays as it is; None: the pass takes it.

    layers: those that it takes, negative from the end; None: all but every `keep_every`-th. stays: what such a layer then is.
    Raises: PassError for layers that the model does not have, and numbers out of range, in the name of the pass.
    """
    if keep_every is not None and not 1 <= keep_every <= LARGEST:
        raise PassError(f"{name}: keep_every {keep_every}; allowed: 1 to {LARGEST}")
    if layers is not None:
        chosen = {i % site.layers for i in layers if -site.layers <= i < site.layers}
        if len(chosen) != len(set(layers)):
            raise PassError(f"{name}: layers {list(layers)}; allowed: -{site.layers}..{site.layers - 1}, each once")
        return None if site.layer in chosen else "layer not listed"
    if keep_every and site.layer is not None and (site.layer + 1) % keep_every == 0:
        return f"one layer in {keep_every} stays {stays}"
    return None


def taken(worth: Mapping[int, float], stay: int) -> tuple[int, ...]:
    """The layers but for the `stay` that are worth most."""
    best = sorted(worth, key=worth.__getitem__, reverse=True)[:stay]
    return tuple(sorted(set(worth) - set(best)))
