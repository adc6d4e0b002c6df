"""The local Stripe as a child process: start it, stop it, kill it. The demo and the tests share this."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 30.0
STOP_SECONDS = 10.0


class DidNotStart(RuntimeError):
    """The process ended or stayed silent; the message has the end of its log."""


@dataclass
class Handle:
    """A running local Stripe. It also ends when the process that started it ends, however that happens."""

    url: str
    secret_key: str
    data_dir: Path
    process: subprocess.Popen[bytes]

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def log(self) -> Path:
        return self.data_dir / "log"

    def stop(self) -> None:
        """End it in good order; harmless when it has ended already."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):  # then it is killed
            self.process.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """kill -9 of everything it consists of."""
        self._signal(signal.SIGKILL)
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # the whole group has ended, which is what is wanted
            os.killpg(self.process.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def start(data_dir: Path, *, port: int = 0, secret_key: str, validate: bool = True, payout_days: int = 1) -> Handle:
    """Start a local Stripe on what is in `data_dir` and wait until it answers.

    Args:
        port: 0 takes any free one.
        validate: it holds its own answers against Stripe's document.
        payout_days: days from a payee's balance to their bank; 0: at once.

    Raises:
        DidNotStart: with the end of its log.
    """
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    address = data_dir / "address"
    address.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "payouts.local_stripe",
        "--data",
        str(data_dir),
        "--port",
        str(port),
        "--with-parent",
    ]
    command += ["--payout-days", str(payout_days), *(["--validate"] if validate else [])]
    with (data_dir / "log").open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "LOCAL_STRIPE_SECRET_KEY": secret_key},
            stdin=subprocess.PIPE,  # held open by this process: its end is the child's sign to end too
            stdout=log,
            stderr=log,
            start_new_session=True,  # so that a signal reaches its worker too, and the terminal's Ctrl-C does not
        )
    handle = Handle("", secret_key, data_dir, process)
    deadline = time.monotonic() + START_SECONDS
    while not address.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            handle.kill()
            raise DidNotStart(f"The local Stripe did not start. {handle.log.read_text(encoding='utf-8')[-2000:]}")
        time.sleep(0.02)
    handle.url = address.read_text(encoding="utf-8")
    return handle
