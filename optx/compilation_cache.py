"""Compiled programs kept between runs."""

import hashlib
import os
import platform
from pathlib import Path

import jax


def enable_compilation_cache(folder: str | Path | None = None) -> Path:
    """Keeps every program that XLA compiles, so that a second run starts without compiling; returns the folder.

    folder: None for `$XDG_CACHE_HOME/optx/jax`, by default `~/.cache/optx/jax`. A folder that JAX has been given
    already (JAX_COMPILATION_CACHE_DIR) stays.
    """
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(folder) if folder is not None else home / "optx" / "jax" / _machine()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def _machine() -> str:
    """Names this CPU's instruction set: it is not in the key of a program, and machines share home folders."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
