"""The product's processes as children of one supervisor: started in order, watched, and gone when it is gone.

Each child leads a process group of its own and writes to `var/log/NAME.log`. All of them carry the supervisor's mark in their
environment; a *reaper*, a process that waits for the supervisor's end of a pipe to close, kills whatever still carries it, so
that not even SIGKILL of the supervisor leaves a process behind.

This file is also the reaper's program, so it imports nothing but the standard library.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

logger = logging.getLogger("portal.processes")

QUEUES = ("ingest", "attribution", "default", "payments")
ROOT = Path(__file__).resolve().parent.parent
MARK = "RESIDUAL_SUPERVISOR"
POLL_SECONDS = 0.1
HEALTHY_SECONDS = 60  # a process that lived this long has recovered: its next crash is restarted at once
LONGEST_PAUSE_SECONDS = 30
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Ready = Callable[[], bool] | str | None  # a URL that must answer 2xx, a text the log must say, or a question to ask


class ProcessFailed(RuntimeError):
    """A child ended, or was not ready in time; the message holds the tail of its log."""


@dataclass
class Child:
    """One process of the product, and what it takes to start it again."""

    name: str
    argv: list[str]
    env: dict[str, str]
    ready: Ready
    log: Path
    process: subprocess.Popen[bytes]
    log_start: int  # bytes already in the log when this process started
    started: float = field(default_factory=time.monotonic)
    n_crash: int = 0

    def is_running(self) -> bool:
        return self.process.poll() is None

    def is_ready(self) -> bool:
        if self.ready is None:
            return True
        if callable(self.ready):
            return self.ready()
        if self.ready.startswith("http"):
            return _answers(self.ready)
        return self.ready in self.output()

    def output(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace")

    def tail(self, n_line: int = 20) -> str:
        return "\n".join([f"--- {self.log}", *self.output().splitlines()[-n_line:]])


class Supervisor:
    """Starts processes and answers for their end; a context manager.

    Inside it, SIGINT, SIGTERM and SIGHUP end the program in the ordinary way, by SystemExit, so that `with` blocks are left.
    """

    def __init__(self, *, log_dir: Path, grace_seconds: float = 10) -> None:
        self.log_dir = log_dir
        self.grace_seconds = grace_seconds
        self.children: dict[str, Child] = {}
        self._mark = secrets.token_hex(16)
        self._seen: dict[int, int] = {}  # every process of ours so far: pid → start
        self._reaper: subprocess.Popen[bytes] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._reaper = subprocess.Popen(
            [sys.executable, "-P", __file__, "reap", self._mark], stdin=subprocess.PIPE, start_new_session=True
        )
        if threading.current_thread() is threading.main_thread():
            self._handlers = {signum: signal.signal(signum, _end_program) for signum in _heeded_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum in self._handlers:
            signal.signal(signum, signal.SIG_IGN)  # an impatient second Ctrl-C must not cut this short; it is bounded
        try:
            self.stop_all()
            for pid, started in self._seen.items():
                if _start_of(pid) == started:  # an orphan that left group, session and environment behind
                    os.kill(pid, signal.SIGKILL)
        finally:
            assert self._reaper and self._reaper.stdin
            self._reaper.stdin.close()  # it looks once more for what slipped away, and ends
            self._reaper.wait()
            for signum, handler in self._handlers.items():
                signal.signal(signum, handler)

    def start(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        ready: Ready = None,
        deadline_seconds: float = 60,
        wait: bool = True,
    ) -> Child:
        """Start a process with exactly this environment, and wait until it is ready; `wait=False` leaves that for later.

        Raises:
            ProcessFailed: it ended, or was not ready by the deadline.
        """
        if name in self.children and self.children[name].is_running():
            raise ValueError(f"{name} is running already")
        log = self.log_dir / f"{name}.log"
        with log.open("ab") as output:
            log_start = output.tell()
            process = subprocess.Popen(
                list(argv),
                cwd=ROOT,
                env={**env, MARK: self._mark, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        child = Child(
            name=name, argv=list(argv), env=dict(env), ready=ready, log=log, process=process, log_start=log_start
        )
        self.children[name] = child
        logger.info("Started process name=%s pid=%s", name, process.pid)
        if wait:
            self.wait_until_ready(name, deadline_seconds=deadline_seconds)
        return child

    def wait_until_ready(self, *names: str, deadline_seconds: float = 60) -> None:
        """Wait for these processes, or for all: started together, they become ready side by side.

        Raises:
            ProcessFailed: one ended, or was not ready by the deadline.
        """
        deadline = time.monotonic() + deadline_seconds
        for child in [self.children[name] for name in names or self.children]:
            while not (is_running := child.is_running()) or not child.is_ready():
                if not is_running:
                    raise ProcessFailed(f"{child.name} ended with {_status(child)} before it was ready\n{child.tail()}")
                if time.monotonic() > deadline:
                    raise ProcessFailed(f"{child.name} was not ready after {deadline_seconds:g} s\n{child.tail()}")
                time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raises ProcessFailed if a process has ended that nobody stopped."""
        for child in self.children.values():
            if not child.is_running():
                raise ProcessFailed(f"{child.name} ended with {_status(child)}\n{child.tail()}")

    def kill(self, name: str) -> None:
        """SIGKILL a process and its whole group, as a crash would end it; it stays known, for `restart`."""
        self._seen |= _marked(self._mark)
        child = self.children[name]
        _signal_group(child.process.pid, signal.SIGKILL)
        child.process.wait()

    def restart(self, name: str, *, deadline_seconds: float = 60, wait: bool = True) -> Child:
        """Stop a process, unless it has ended, and start it as before."""
        child = self.children[name]
        self.stop(name)
        return self.start(
            name, child.argv, env=child.env, ready=child.ready, deadline_seconds=deadline_seconds, wait=wait
        )

    def stop(self, *names: str) -> None:
        """SIGTERM these processes, all at once; after the grace period, SIGKILL whatever is left of their groups."""
        self._seen |= _marked(self._mark)
        # One that ended by itself is left alone: its number may be another's group by now.
        stopping = [child for child in map(self.children.pop, names) if child.is_running()]
        for child in stopping:
            child.process.terminate()  # only the leader: it knows in which order to end its own children
        deadline = time.monotonic() + self.grace_seconds
        for child in stopping:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
            _signal_group(child.process.pid, signal.SIGKILL)
            child.process.wait()
            logger.info("Stopped process name=%s status=%s", child.name, child.process.returncode)

    def stop_all(self) -> None:
        self.stop(*reversed(self.children))

    def run_forever(self) -> None:
        """Keep everything running until a signal ends the program; a process that crashes again waits longer each time."""
        pauses: dict[str, float] = {}  # when to start it again, on the monotonic clock
        while True:
            for child in list(self.children.values()):
                if child.is_running():
                    continue
                if child.name not in pauses:
                    _signal_group(child.process.pid, signal.SIGKILL)  # what it left of its group
                    n_crash = 0 if time.monotonic() - child.started > HEALTHY_SECONDS else child.n_crash
                    child.n_crash = n_crash + 1
                    pause = min(2.0**n_crash - 1, LONGEST_PAUSE_SECONDS)
                    pauses[child.name] = time.monotonic() + pause
                    logger.warning(
                        "Process ended name=%s status=%s restart_in_seconds=%g", child.name, _status(child), pause
                    )
                if time.monotonic() >= pauses[child.name]:
                    del pauses[child.name]
                    self.restart(child.name, wait=False).n_crash = child.n_crash
            time.sleep(POLL_SECONDS)


# --- what the processes are


def web_argv(*, port: int, host: str = "127.0.0.1", n_worker: int = 2) -> list[str]:
    """gunicorn over the site and the API; ready when `http://HOST:PORT/healthz` answers."""
    options = [
        "--bind",
        f"{host}:{port}",
        "--workers",
        str(n_worker),
        "--threads",
        "4",
        "--access-logfile",
        "-",
        "--preload",
    ]
    return [sys.executable, "-m", "gunicorn", "portal.wsgi", *options, "--graceful-timeout", "5"]


def worker_argv(queue: str, *, n_at_once: int = 1) -> list[str]:
    """One Celery worker for one queue, so many tasks at once; ready when its log says `ready.`"""
    if queue not in QUEUES:
        raise ValueError(f"{queue!r} is none of {', '.join(QUEUES)}")
    options = ["--queues", queue, "--hostname", f"{queue}@%h", "--concurrency", str(n_at_once), "--loglevel", "INFO"]
    return [sys.executable, "-m", "celery", "-A", "portal", "worker", *options, "--without-gossip", "--without-mingle"]


def beat_argv() -> list[str]:
    """Celery's clock; ready when its log says `beat: Starting`."""
    return [sys.executable, "-m", "celery", "-A", "portal", "beat", "--loglevel", "INFO"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- the reaper


def reap(mark: str) -> None:
    """Wait until the supervisor closes its end of standard input, on purpose or by dying; kill all that carry its mark."""
    for signum in ENDING_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    sys.stdin.buffer.read()
    deadline = time.monotonic() + 10
    while (left := _marked(mark)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)  # one of them may just have forked


def _marked(mark: str) -> dict[int, int]:
    """The processes (pid → start) that carry the mark, and the sessions and children of those, which may have dropped it."""
    needle = f"{MARK}={mark}".encode()
    marked: set[int] = set()
    parents: dict[int, int] = {}
    sessions: dict[int, int] = {}
    starts: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] in "ZX":
                    continue
                pid = int(entry.name)
                parents[pid], sessions[pid], starts[pid] = int(fields[1]), int(fields[3]), int(fields[19])
                if needle in (entry / "environ").read_bytes().split(b"\0"):
                    marked.add(pid)
    own_sessions = {sessions[pid] for pid in marked}
    while more := {pid for pid in parents if parents[pid] in marked or sessions[pid] in own_sessions} - marked:
        marked |= more
    return {pid: starts[pid] for pid in marked}


def _start_of(pid: int) -> int | None:
    """In clock ticks since boot: with it, a pid names one process for ever."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


# --- the tests and checks of ./run


#: What asks neither server for anything, and so has nothing to show on a second pair of them.
SERVERLESS = ("tests/attribution/engine", "tests/benchmarks", "tests/test_architecture.py")


def test(arguments: list[str]) -> int:
    """pytest on the embedded servers, then on this machine's own where they answer; RESIDUAL_TEST_ONCE=1 leaves that out.

    The second pass of the whole suite is of what uses the servers.
    """
    from portal import embedded

    whole = [] if arguments else ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]
    command = [sys.executable, "-m", "pytest", *whole, *arguments]
    _say("tests on the embedded PostgreSQL and Redis")
    if code := _foreground(command):
        return code  # 5, no test collected, is a failure too
    if os.environ.get("RESIDUAL_TEST_ONCE") == "1":
        return 0
    if urls := embedded.system_services():
        _say("tests on this machine's PostgreSQL and Redis")
        ignored = [] if arguments else [f"--ignore={path}" for path in SERVERLESS]
        return _foreground([*command, *ignored], TEST_DATABASE_URL=urls.database, TEST_REDIS_URL=urls.redis)
    _say("no PostgreSQL on 127.0.0.1:5432 (user postgres, no password) with a Redis on 6379: no second pass")
    return 0


def check(arguments: list[str]) -> int:
    """Format, lint, types, missing migrations, tests: all of them, whatever fails before; the first failure's status."""
    # mypy's Django plugin loads the settings, which insist on these; it connects to nothing.
    placeholders = {"SECRET_KEY": "-", "DATABASE_URL": "postgres://-/-", "REDIS_URL": "redis://-"}
    codes = []
    for command in (
        ["-m", "ruff", "format", "--check", "."],
        ["-m", "ruff", "check", "."],
        ["-m", "mypy"],
        ["manage.py", "makemigrations", "--check", "--dry-run"],
    ):
        _say(" ".join(command))
        extra = placeholders if "mypy" in command else {}
        codes.append(_foreground([sys.executable, *command], **extra))
    return next(filter(None, [*codes, test(arguments)]), 0)


def _foreground(argv: list[str], **extra_env: str) -> int:
    """Run a command in our terminal; a signal to us interrupts it, and it does not outlive us."""
    from portal.embedded import dies_with

    # What runs in a shell's background ignores Ctrl-C, and so would its child.
    is_deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ending = signal.SIGTERM if is_deaf else signal.SIGINT
    child = subprocess.Popen(argv, env=os.environ | extra_env, preexec_fn=dies_with(os.getpid(), ending))
    stop = False

    def interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal stop
        stop = True
        if signum != signal.SIGINT:  # Ctrl-C goes to the child as well, from the terminal
            child.send_signal(ending)

    handlers = {signum: signal.signal(signum, interrupt) for signum in _heeded_signals()}
    code = child.wait()
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    if stop:
        raise SystemExit(130)
    return code if code >= 0 else 128 - code


def _say(what: str) -> None:
    sys.stderr.write(f"\n==> {what}\n")
    sys.stderr.flush()


# --- small things


def _heeded_signals() -> list[signal.Signals]:
    """The ending signals, but those that whoever started us has us ignore, as nohup does."""
    return [signum for signum in ENDING_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]


def _end_program(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _signal_group(pgid: int, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pgid, signum)


def _status(child: Child) -> str:
    code = child.process.returncode
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310 - the caller's own loopback address
            return 200 <= response.status < 300
    except (urllib.error.URLError, OSError):
        return False


def main(argv: list[str]) -> int:
    match argv:
        case ["reap", mark]:
            reap(mark)
            return 0
        case ["test", *arguments]:
            return test(arguments)
        case ["check", *arguments]:
            return check(arguments)
    sys.stderr.write("usage: python -m portal.processes test|check [PYTEST ARGS]\n")
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
