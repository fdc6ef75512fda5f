"""A real `optx serve` in a process of its own, and faults put into its engine's steps from outside.

    python serving.py FOLDER MODEL [flags]      # `optx serve MODEL [flags]` whose steps look into FOLDER

A file in FOLDER is a fault: `once` makes the next step raise after it has run, `always` makes every step raise, `hang` holds
steps up while it is there, `slow` makes each take 20 ms longer.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds that a busy machine may need to start a server


class Server:
    """One process. `url` waits until it is ready."""

    def __init__(self, folder: Path, model: Path, *flags: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._lines = folder, []
        self.errors = folder / "stderr"
        command = [sys.executable, __file__, str(folder), str(model), "--port", "0", *flags]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with self.errors.open("w") as err:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, env=env)
        threading.Thread(target=lambda: self._lines.extend(self.process.stdout), daemon=True).start()

    @property
    def url(self) -> str:
        def ready():
            assert self.process.poll() is None or self._lines, f"ended: {self.errors.read_text()[-3000:]}"
            return re.search(r"http://\S+", "".join(self._lines[:1]))

        return wait(ready, PATIENCE)[0]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    @contextlib.contextmanager
    def fault(self, name: str):
        """The fault is in force inside the `with`."""
        (self.folder / name).touch()
        try:
            yield
        finally:
            (self.folder / name).unlink(missing_ok=True)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def send(self, path: str, body=None, *, method: str | None = None, headers=(), timeout: float = 60):
        """-> (status, headers, body: JSON where it is JSON). body: an object, or bytes as they are."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        given = {"Content-Type": "application/json"} | dict(headers)
        request = urllib.request.Request(self.url + path, data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                status, found, text = response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            status, found, text = error.code, error.headers, error.read()
        is_json = found.get("Content-Type", "").startswith("application/json")
        return status, found, json.loads(text) if is_json else text.decode()

    def metrics(self, headers=()) -> dict[str, float]:
        """Figures by name; with labels, by name{label="value"}."""
        lines = self.send("/metrics", headers=headers)[2].splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}

    def settled(self) -> dict[str, float]:
        """The figures once nothing runs or waits."""

        def quiet():
            found = self.metrics()
            return found if not found["optx:num_requests_running"] + found["optx:num_requests_waiting"] else None

        return wait(quiet, 30)


def wait(condition, seconds: float):
    """What `condition` gives as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.02)
    return found


def main() -> int:
    from optx import cli
    from optx.engine.engine import Engine

    folder, real = Path(sys.argv[1]), Engine.step

    def step(engine: Engine):
        while (folder / "hang").exists():
            time.sleep(0.01)
        if (folder / "always").exists():
            raise RuntimeError("the device is on fire")
        found = real(engine)
        if (folder / "slow").exists():
            time.sleep(0.02)
        if (folder / "once").exists():
            (folder / "once").unlink()
            raise RuntimeError("a bit flipped")
        return found

    Engine.step = step
    return cli.run(["serve", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
