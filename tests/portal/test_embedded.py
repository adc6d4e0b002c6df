"""The embedded servers: shared while somebody uses them, gone afterwards, and whole again after every crash."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from portal import embedded

ROOT = Path(embedded.__file__).parent.parent
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to run PostgreSQL as another user")


pytestmark = pytest.mark.skipif("TEST_DATABASE_URL" in os.environ, reason="brings its own servers: one pass is enough")


@pytest.fixture(scope="session")
def whole_var() -> Iterator[Path]:
    """A `var` whose servers have run once, in a place that every user reaches."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        var = Path(directory) / "var"
        with embedded.servers(var):
            pass
        yield var


@pytest.fixture
def var(whole_var: Path) -> Iterator[Path]:
    """A copy of it: initdb takes most of a first start."""
    with fresh_directory() as directory:
        subprocess.run(["cp", "-a", str(whole_var), str(directory)], check=True)
        yield directory / "var"


@pytest.fixture
def new_var() -> Iterator[Path]:
    with fresh_directory() as directory:
        yield directory / "var"


@contextlib.contextmanager
def fresh_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)
        embedded.remove(Path(directory) / "var")
        assert server_processes(Path(directory) / "var") == []


def server_processes(var: Path) -> list[psutil.Process]:
    """Every process that works in one of the data directories, found without the code under test."""
    record = var / "postgres.path"
    places = {record.read_text().strip() if record.exists() else str(var / "postgres"), str(var / "redis")}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() in places and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def main_process(var: Path, name: str) -> psutil.Process:
    found = []
    for process in server_processes(var):
        with contextlib.suppress(psutil.NoSuchProcess):  # a connection's own process, which has just ended
            if process.name() == name and process.parent().name() != name:
                found.append(process)
    (one,) = found
    return one


def eventually(question: Callable[[], bool], *, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, "not within the deadline"
        time.sleep(0.05)


def remember(urls: embedded.Urls, word: str) -> None:
    with psycopg.connect(urls.database) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS memory (word text)")
        connection.execute("INSERT INTO memory VALUES (%s)", [word])
    with contextlib.closing(redis.Redis.from_url(urls.redis)) as client:
        client.rpush("memory", word)


def recall(urls: embedded.Urls) -> tuple[list[str], list[str]]:
    with psycopg.connect(urls.database) as connection:
        rows = [word for (word,) in connection.execute("SELECT word FROM memory")]
    with contextlib.closing(redis.Redis.from_url(urls.redis, decode_responses=True)) as client:
        return rows, client.lrange("memory", 0, -1)


def answers(urls: embedded.Urls) -> bool:
    try:
        recall(urls)
    except (psycopg.OperationalError, redis.RedisError):
        return False
    return True


@contextlib.contextmanager
def holder(var: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that uses the servers until its standard input closes; its first line says where they are."""
    program = (
        "import sys, pathlib; from portal import embedded\n"
        "with embedded.servers(pathlib.Path(sys.argv[1])) as urls: print(urls.database, urls.redis, flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program, str(var)], cwd=ROOT, **pipes) as process:
        yield process
        if process.poll() is None:
            process.communicate()


def urls_of(process: subprocess.Popen[str]) -> embedded.Urls:
    return embedded.Urls(*process.stdout.readline().split())


def test_servers_are_real_ones_set_up_for_money_and_gone_afterwards(new_var):
    with embedded.servers(new_var) as urls:
        assert embedded.running(new_var) == urls
        with psycopg.connect(urls.database) as connection:
            settings = dict(
                connection.execute(
                    "SELECT name, current_setting(name) FROM pg_settings WHERE name = ANY(%s)",
                    [["server_version_num", "fsync", "jit", "TimeZone", "max_connections", "shared_buffers"]],
                ).fetchall()
            )
            assert connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() == (
                True,
            )
            assert connection.execute("SELECT lower('ÄÉ') < 'b', upper('ß')").fetchone() is not None
        with contextlib.closing(redis.Redis.from_url(urls.redis, decode_responses=True)) as client:
            assert client.config_get("append*")["appendonly"] == "yes"
            port = client.connection_pool.connection_kwargs["port"]
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"PING\r\n")
            assert stranger.recv(100).startswith(b"-NOAUTH")
        socket_dir = Path(psycopg.conninfo.conninfo_to_dict(urls.database)["host"])
        assert stat.S_IMODE(socket_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((new_var / "embedded.json").stat().st_mode) == 0o600  # it holds Redis' password

    assert settings.pop("server_version_num").startswith("18")
    assert settings == {
        "fsync": "on",
        "jit": "off",
        "TimeZone": "UTC",
        "max_connections": "100",
        "shared_buffers": "128MB",
    }
    assert server_processes(new_var) == []
    assert embedded.running(new_var) is None
    assert not socket_dir.exists()


def test_data_stays_from_one_use_to_the_next(var):
    with embedded.servers(var) as urls:
        remember(urls, "first")
    with embedded.servers(var) as urls:
        remember(urls, "second")
        assert recall(urls) == (["first", "second"], ["first", "second"])


def test_the_servers_stay_until_the_last_holder_leaves(var):
    with holder(var) as other:
        theirs = urls_of(other)
        with embedded.servers(var) as urls:
            assert urls == theirs
            remember(urls, "shared")
            pids = {process.pid for process in server_processes(var) if process.name() == "redis-server"}
        assert recall(theirs) == (["shared"], ["shared"])
        assert {process.pid for process in server_processes(var) if process.name() == "redis-server"} == pids
    assert server_processes(var) == []


def test_two_that_start_at_once_share(new_var):
    with holder(new_var) as first, holder(new_var) as second:
        assert urls_of(first) == urls_of(second)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holder_leaves_no_server_behind(var, signum):
    with holder(var) as other:
        urls_of(other)
        assert server_processes(var)
        other.send_signal(signum)
        other.wait()
        eventually(lambda: server_processes(var) == [], seconds=10)


@pytest.mark.parametrize("name", ["postgres", "redis-server"])
def test_a_killed_server_comes_back_at_the_same_address_with_its_data(var, name):
    with embedded.servers(var) as urls:
        remember(urls, "kept")
        victim = main_process(var, name)
        victim.kill()
        eventually(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE)
        eventually(lambda: answers(urls))
        assert recall(urls) == (["kept"], ["kept"])
        assert main_process(var, name).pid != victim.pid


def test_after_everything_was_killed_the_next_start_recovers_and_harms_no_process_with_a_reused_pid(var):
    with holder(var) as other:
        remember(urls_of(other), "kept")
        guardian = main_process(var, "postgres").parent()
        data = Path(main_process(var, "postgres").cwd())
        for process in [guardian, *server_processes(var)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        other.kill()
    eventually(lambda: server_processes(var) == [])

    with subprocess.Popen(["sleep", "60"]) as bystander:  # by now the pid in the lock file is somebody else's
        lines = (data / "postmaster.pid").read_text().splitlines()
        (data / "postmaster.pid").write_text("\n".join([str(bystander.pid), *lines[1:]]) + "\n")
        with embedded.servers(var) as urls:
            assert recall(urls) == (["kept"], ["kept"])
            assert bystander.poll() is None
        bystander.kill()


def test_servers_do_not_outlive_a_killed_guardian_and_the_next_holder_gets_new_ones_at_the_old_address(var):
    with embedded.servers(var) as urls:
        remember(urls, "kept")
        main_process(var, "postgres").parent().kill()
        eventually(lambda: server_processes(var) == [])
        with embedded.servers(var) as again:
            assert again == urls
            assert recall(again) == (["kept"], ["kept"])


def test_a_path_longer_than_a_socket_address_is_no_obstacle(var):
    far = var.parent / ("long " * 12) / ("path " * 12) / "var"
    far.parent.mkdir(parents=True)
    var.rename(far)
    assert len(str(far)) > 107

    with embedded.servers(far) as urls:
        remember(urls, "far away")
        assert recall(urls) == (["far away"], ["far away"])
    assert server_processes(far) == []


def test_stop_all_stops_the_servers_of_a_living_holder(var):
    with holder(var) as other:
        urls_of(other)
        embedded.stop_all(var)
        assert server_processes(var) == []
        assert other.poll() is None


def test_a_failed_start_says_why(new_var):
    new_var.mkdir()
    (new_var / "redis").write_text("in the way")

    with pytest.raises(embedded.EmbeddedError, match="redis"), embedded.servers(new_var):
        pass
    assert server_processes(new_var) == []


def test_data_of_another_major_version_is_refused_and_kept(var):
    with embedded.servers(var):
        data = Path(main_process(var, "postgres").cwd())
    (data / "PG_VERSION").write_text("17\n")

    with pytest.raises(embedded.EmbeddedError, match="holds data of PostgreSQL 17, not 18"), embedded.servers(var):
        pass
    assert (data / "global").is_dir()


@as_root
def test_root_runs_postgres_as_its_system_user_in_var_where_that_user_can_reach_it(var):
    with embedded.servers(var):
        postgres = main_process(var, "postgres")
        assert postgres.username() == embedded.SYSTEM_USER
        assert postgres.cwd() == str(var / "postgres")


@as_root
def test_data_that_the_system_user_can_no_longer_reach_is_an_error_with_the_reason(var):
    var.parent.chmod(0o700)
    with (
        pytest.raises(embedded.EmbeddedError, match=r"User embedded_postgres cannot reach .*closed to that user"),
        embedded.servers(var),
    ):
        pass
    assert (var / "postgres/PG_VERSION").exists()


@as_root
def test_root_keeps_the_data_elsewhere_and_says_where_if_the_system_user_cannot_reach_var(new_var):
    new_var.parent.chmod(0o700)
    with embedded.servers(new_var) as urls:
        remember(urls, "elsewhere")
        postgres = main_process(new_var, "postgres")
        assert postgres.username() == embedded.SYSTEM_USER
        assert postgres.cwd() == (new_var / "postgres.path").read_text()
        assert stat.S_IMODE(Path(postgres.cwd()).stat().st_mode) == 0o700
    with embedded.servers(new_var) as urls:
        assert recall(urls)[0] == ["elsewhere"]


def test_everyone_gets_the_same_secret_key_which_only_the_owner_reads(new_var):
    keys: list[str] = []
    threads = [threading.Thread(target=lambda: keys.append(embedded.demo_secret_key(new_var))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(keys) == 8
    assert len(set(keys)) == 1
    assert len(keys[0]) >= 50
    assert stat.S_IMODE((new_var / "secret_key").stat().st_mode) == 0o600
    assert [path.name for path in new_var.iterdir()] == ["secret_key"]
