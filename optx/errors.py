"""Errors for people: what, where, got, allowed, next step."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


class OptxError(Exception):
    """Base of every error that optx raises for something the caller can mend."""


class CheckpointError(OptxError):
    """A model file is missing, damaged, unsafe or does not fit its config."""


class ConfigError(OptxError):
    """A model config names an architecture or a field that is not supported."""


class FormatError(OptxError):
    """A tensor cannot be stored in, or read from, the format asked for."""


class RecipeError(OptxError):
    """A recipe has an unknown key, a wrong value or a rule that matched nothing."""


class PassError(OptxError):
    """A pass met a module that it cannot rewrite."""


class LegalityError(OptxError):
    """A recipe combines techniques that are known not to stack, or asks of a model what is known to break it.

    name: of the refusal; '' for a recipe that names a refusal wrongly.
    """

    def __init__(self, message: str, *, name: str = ""):
        super().__init__(message)
        self.name = name


class VerifyError(OptxError):
    """A rewritten tree breaks one of the verifier's rules."""


class QualityError(OptxError):
    """A compiled model strays further from the uncompiled one than the recipe allows.

    kl: nats a token after each lossy pass so far; sites: (path, damage), the worst first.
    """

    def __init__(self, message: str, *, kl: Mapping[str, float] = {}, sites: Sequence[tuple[str, float]] = ()):
        super().__init__(message)
        self.kl, self.sites = dict(kl), tuple(sites)


class HealError(OptxError):
    """A converted model cannot be healed: too little text or memory, nothing converted, packed weights."""


class SearchError(OptxError):
    """No recipe of the candidates meets the objectives, or there is nothing to measure them on."""


class LoweringError(OptxError):
    """No kernel takes an op on the target, or a required backend declined it."""


class RequestError(OptxError):
    """A generation request cannot be served: empty, too long, bad sampling values."""


class QueueFull(RequestError):
    """As many requests wait as the engine allows; ask again later."""


class ServeError(OptxError):
    """A server cannot start, or its engine could not go on."""


class UsageError(OptxError):
    """A command line has a wrong verb, flag or path."""


def did_you_mean(got: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'group'?` for the nearest allowed name, else `; allowed: a, b, c`."""
    names = sorted(str(name) for name in allowed)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; allowed: {', '.join(names)}" if names else ""


def no_such_path(path: str | Path) -> str:
    """`x.gguf: no such file or directory`, with the nearest name beside it, or what there is."""
    text, folder = f"{path}: no such file or directory", Path(path).parent
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return f"{text}; the folder {folder} does not exist" if not folder.is_dir() else text
    near = difflib.get_close_matches(Path(path).name, names, n=1, cutoff=0.6)
    if near:
        return f"{text}; did you mean {str(folder / near[0])!r}?"
    return f"{text}; {folder} holds {', '.join(names)}" if 0 < len(names) <= 8 else text
