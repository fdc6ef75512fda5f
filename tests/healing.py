"""What tests of healing share: a tiny model, the same with sliding windows, text, a run in a moment."""

import random
from pathlib import Path

import families

import optx
from optx.checkpoint.source import from_module
from optx.passes.distill import Distill
from optx.passes.sliding_window import SlidingWindow
from optx.recipe import Recipe

WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "many", "small"),
    *("birds", "sing", "in", "tall", "green", "trees", "near", "some", "old", "stone", "wall"),
)
TEXT = " ".join(random.Random(0).choices(WORDS, k=1500))
WINDOW = SlidingWindow(window=4, sinks=1, layers=(0,))
QUICK = {
    "steps": 6,
    "batch": 4,
    "context": 24,
    "lr": 3e-3,
    "every": 3,
    "held_out": 4,
    "dtype": "float32",
    "warmup": 0.2,
}


def source(family: str = "llama", **changes):
    return from_module(families.concrete(family, **changes), "tiny", families.tokenizer())


def converted(model):
    """The source's model with a window in its first layer."""
    return optx.compile(model, Recipe(attention=(WINDOW,))).tree


def text(folder: Path) -> str:
    path = folder / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def options(folder: Path, **changes) -> Distill:
    return Distill(**({"text": (text(folder),)} | QUICK | changes))
