"""The examples run on the real model and print what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import texts
from optx import registry

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_pass_is_short():
    """The example's point: what a pass needs is the options, the registration and one function."""
    source = (ROOT / "examples" / "write_a_pass.py").read_text()
    body = source[source.index("@dataclasses.dataclass") : source.index("RECIPE =")]
    assert len(body.strip().splitlines()) < 40
    assert "cast_weights" not in registry.PASSES  # importing optx does not bring it


@pytest.mark.slow
def test_write_a_pass(smollm2_path):
    printed = run("examples/write_a_pass.py")
    assert "What the pass changes, as expected:" in printed  # EXPECTED of the example is compared inside
    assert "+layers/0-29/mixer/q: Linear bf16[576, 576]" in printed
    before, after = printed.split("perplexity ")[1].split(",")[0].split(" -> ")
    assert float(before) == pytest.approx(float(after), rel=0.01)


def test_the_text_is_prose_in_paragraphs():
    assert texts.ALICE.count("\n\n") == 3 and 1000 < len(texts.ALICE) < 2500
