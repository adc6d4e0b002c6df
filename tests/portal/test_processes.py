"""The supervisor: ready means ready, a crash is loud, and nothing stays behind however it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from portal import embedded, processes
from portal.processes import ProcessFailed, Supervisor

ROOT = Path(processes.__file__).parent.parent
ENV = {"PATH": os.defpath}
SLEEPER = [sys.executable, "-c", "import time; print('up'); time.sleep(600)"]
#: A leader with a child in its group, and one that left the group, the session and the environment behind.
FAMILY = [
    sys.executable,
    "-c",
    "import subprocess, time\n"
    "near = subprocess.Popen(['sleep', '600'])\n"
    "far = subprocess.Popen(['sleep', '600'], env={}, start_new_session=True)\n"
    "print('family', near.pid, far.pid)\n"
    "time.sleep(600)",
]


def is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def eventually(question: Callable[[], bool], *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, "not within the deadline"
        time.sleep(0.05)


def family_of(child: processes.Child) -> list[int]:
    words = child.output().split()
    return [child.process.pid, *map(int, words[words.index("family") + 1 :][:2])]


def test_start_waits_until_a_url_answers_a_log_speaks_or_a_question_is_true(tmp_path):
    port = processes.free_port()
    flag = tmp_path / "flag"
    late = f"import time, pathlib; time.sleep(0.5); pathlib.Path({str(flag)!r}).touch(); time.sleep(600)"
    with Supervisor(log_dir=tmp_path / "log") as supervisor:
        supervisor.start(
            "web",
            [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)],
            env=ENV,
            ready=f"http://127.0.0.1:{port}/",
        )
        supervisor.start("worker", SLEEPER, env=ENV, ready="up")
        supervisor.start("asked", [sys.executable, "-c", late], env=ENV, ready=flag.exists)
        assert flag.exists()
        assert (tmp_path / "log/worker.log").read_text() == "up\n"
        assert "GET / HTTP" in (tmp_path / "log/web.log").read_text()
        pids = [child.process.pid for child in supervisor.children.values()]
        supervisor.check()
    assert not any(map(is_alive, pids))


def test_processes_started_together_become_ready_side_by_side(tmp_path):
    slow = [sys.executable, "-c", "import time; time.sleep(1); print('up'); time.sleep(600)"]
    started = time.monotonic()
    with Supervisor(log_dir=tmp_path) as supervisor:
        for name in ("one", "two", "three"):
            supervisor.start(name, slow, env=ENV, ready="up", wait=False)
        supervisor.wait_until_ready()
        assert time.monotonic() - started < 2.9


def test_a_process_gets_the_environment_it_is_given_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("STRIPE_API_KEY", "sk_test_not_for_workers")
    dump = [sys.executable, "-c", "import os; print(sorted(os.environ)); print('up'); import time; time.sleep(600)"]
    with Supervisor(log_dir=tmp_path) as supervisor:
        child = supervisor.start("worker", dump, env=ENV | {"DATABASE_URL": "x"}, ready="up")
        names = child.output().splitlines()[0]
    assert "STRIPE_API_KEY" not in names
    assert "'DATABASE_URL'" in names


def test_an_early_end_is_reported_with_status_and_the_log_of_this_start_only(tmp_path):
    (tmp_path / "web.log").write_text("an older story\nup\n")
    with (
        Supervisor(log_dir=tmp_path) as supervisor,
        pytest.raises(ProcessFailed, match=r"web ended with status 3 before it was ready(.|\n)*no port") as failure,
    ):
        supervisor.start("web", [sys.executable, "-c", "print('no port'); raise SystemExit(3)"], env=ENV, ready="up")
    assert "an older story" not in str(failure.value)


def test_a_process_that_never_becomes_ready_is_reported_and_ended(tmp_path):
    with Supervisor(log_dir=tmp_path) as supervisor:
        with pytest.raises(ProcessFailed, match=r"worker was not ready after 0\.5 s(.|\n)*up"):
            supervisor.start("worker", SLEEPER, env=ENV, ready="never said", deadline_seconds=0.5)
        pid = supervisor.children["worker"].process.pid
    assert not is_alive(pid)


def test_check_names_the_process_that_ended(tmp_path):
    with Supervisor(log_dir=tmp_path) as supervisor:
        supervisor.start("steady", SLEEPER, env=ENV, ready="up")
        child = supervisor.start("worker", SLEEPER, env=ENV, ready="up")
        supervisor.check()
        os.kill(child.process.pid, signal.SIGSEGV)
        child.process.wait()
        with pytest.raises(ProcessFailed, match="worker ended with signal SIGSEGV"):
            supervisor.check()


def test_kill_ends_the_whole_group_at_once_and_restart_brings_a_new_one(tmp_path):
    with Supervisor(log_dir=tmp_path) as supervisor:
        child = supervisor.start("worker", FAMILY, env=ENV, ready="family")
        leader, near, far = family_of(child)
        supervisor.kill("worker")
        eventually(lambda: not is_alive(leader) and not is_alive(near), seconds=2)

        again = supervisor.restart("worker")
        assert again.process.pid != leader
        assert supervisor.children["worker"].is_running()
        everyone = family_of(again)
        assert all(map(is_alive, everyone))
    assert not any(map(is_alive, [*everyone, far]))


def test_stopping_asks_first_and_then_insists(tmp_path):
    polite = (
        "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(print('bye')))\nprint('up'); time.sleep(600)"
    )
    stubborn = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('up'); time.sleep(600)"
    started = time.monotonic()
    with Supervisor(log_dir=tmp_path, grace_seconds=1) as supervisor:
        supervisor.start("polite", [sys.executable, "-c", polite], env=ENV, ready="up")
        child = supervisor.start("stubborn", [sys.executable, "-c", stubborn], env=ENV, ready="up")
    assert (tmp_path / "polite.log").read_text() == "up\nbye\n"
    assert child.process.returncode == -signal.SIGKILL
    assert time.monotonic() - started < 10


PARENT = """
import os, pathlib, sys, time
from portal.processes import Supervisor
argv = {family!r}
with Supervisor(log_dir=pathlib.Path(sys.argv[1])) as supervisor:
    child = supervisor.start("worker", argv, env={{"PATH": os.defpath}}, ready="family")
    print(child.process.pid, child.output().strip(), flush=True)
    supervisor.run_forever()
"""


@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_nothing_outlives_the_supervisor_whatever_ends_it(tmp_path, signum, status):
    argv = [sys.executable, "-c", PARENT.format(family=FAMILY), str(tmp_path)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=heeding_ctrl_c) as parent:
        leader, _, near, far = parent.stdout.readline().split()
        parent.send_signal(signum)
        assert parent.wait(15) == status
    eventually(lambda: not any(is_alive(int(pid)) for pid in (leader, near, far)))


def heeding_ctrl_c():
    """A shell without job control has its background commands ignore Ctrl-C, and they hand that on to us."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_hangup_that_nohup_has_us_ignore_is_ignored(tmp_path):
    argv = ["nohup", sys.executable, "-c", PARENT.format(family=FAMILY), str(tmp_path)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        leader = int(parent.stdout.readline().split()[0])
        parent.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert is_alive(leader)
        parent.terminate()
        assert parent.wait(15) == 143
    assert not is_alive(leader)


def test_run_forever_restarts_what_crashes_and_waits_longer_each_time(tmp_path):
    crasher = "import pathlib, sys, time\nwith pathlib.Path(sys.argv[1]).open('a') as log: log.write(f'{time.time()}\\n')\nsys.exit(1)"
    times = tmp_path / "times"

    class Enough(Exception):
        pass

    def enough(signum, frame):
        raise Enough

    with Supervisor(log_dir=tmp_path) as supervisor:
        steady = supervisor.start("steady", SLEEPER, env=ENV, ready="up")
        supervisor.start("crasher", [sys.executable, "-c", crasher, str(times)], env=ENV)
        signal.signal(signal.SIGALRM, enough)
        signal.setitimer(signal.ITIMER_REAL, 6)
        with pytest.raises(Enough):
            supervisor.run_forever()
        assert supervisor.children["steady"] is steady

    starts = list(map(float, times.read_text().split()))
    assert len(starts) == 4  # at once, then after 0, 1 and 3 seconds; the next would wait for 7
    assert starts[1] - starts[0] < 1 < starts[2] - starts[1] < 3 < starts[3] - starts[2]


def test_the_signal_handlers_of_the_program_are_put_back(tmp_path):
    before = [signal.getsignal(signum) for signum in processes.ENDING_SIGNALS]
    with Supervisor(log_dir=tmp_path):
        assert [signal.getsignal(signum) for signum in processes.ENDING_SIGNALS] != before
    assert [signal.getsignal(signum) for signum in processes.ENDING_SIGNALS] == before


def test_a_worker_has_one_of_the_four_queues():
    argv = processes.worker_argv("payments")
    assert argv[argv.index("--queues") + 1] == "payments"
    with pytest.raises(ValueError, match="'payment' is none of ingest, attribution, default, payments"):
        processes.worker_argv("payment")


# --- ./run test

PYTEST = ["--noconftest", "-o", "addopts=", "-o", "filterwarnings=", "-q"]
SERVICES = embedded.Urls("postgresql://postgres@127.0.0.1:5432/postgres", "redis://127.0.0.1:6379/15")


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch) -> Path:
    """A test file that writes down which database it was run against."""
    for name in ("TEST_DATABASE_URL", "TEST_REDIS_URL", "RESIDUAL_TEST_ONCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1"
    )  # they take seconds to import, and find this Django project
    (tmp_path / "test_recorder.py").write_text(
        "import os, pathlib\n"
        "def test_records():\n"
        "    with (pathlib.Path(__file__).parent / 'seen').open('a') as seen:\n"
        "        print(os.environ.get('TEST_DATABASE_URL'), os.environ.get('TEST_REDIS_URL'), file=seen)\n"
        "    assert not (pathlib.Path(__file__).parent / 'fail').exists()\n"
    )
    return tmp_path


def seen(recorder: Path) -> list[str]:
    return (recorder / "seen").read_text().splitlines()


def test_the_tests_run_on_embedded_servers_and_then_on_the_machines_own(recorder, monkeypatch):
    monkeypatch.setattr(embedded, "system_services", lambda: SERVICES)
    assert processes.main(["test", *PYTEST, str(recorder)]) == 0
    assert seen(recorder) == ["None None", f"{SERVICES.database} {SERVICES.redis}"]


@pytest.mark.parametrize(("services", "once"), [(None, "0"), (SERVICES, "1")])
def test_one_pass_is_enough_without_services_or_on_request(recorder, monkeypatch, services, once):
    monkeypatch.setattr(embedded, "system_services", lambda: services)
    monkeypatch.setenv("RESIDUAL_TEST_ONCE", once)
    assert processes.main(["test", *PYTEST, str(recorder)]) == 0
    assert seen(recorder) == ["None None"]


def test_the_second_pass_of_the_whole_suite_leaves_out_what_uses_no_server(monkeypatch):
    ran = []
    monkeypatch.delenv("RESIDUAL_TEST_ONCE", raising=False)
    monkeypatch.setattr(embedded, "system_services", lambda: SERVICES)
    monkeypatch.setattr(processes, "_foreground", lambda argv, **env: ran.append(argv) or 0)

    assert processes.test([]) == 0

    first, second = ran
    ignored = [argument.removeprefix("--ignore=") for argument in second if argument not in first]
    assert ignored == list(processes.SERVERLESS)
    assert all((processes.ROOT / path).exists() for path in ignored)


def test_a_failed_pass_is_the_result(recorder, monkeypatch):
    monkeypatch.setattr(embedded, "system_services", lambda: SERVICES)
    (recorder / "fail").touch()
    assert processes.main(["test", *PYTEST, str(recorder)]) == 1
    assert seen(recorder) == ["None None"]


def test_finding_no_test_is_a_failure(recorder):
    assert processes.main(["test", *PYTEST, str(recorder), "-k", "nothing_has_this_name"]) == 5


def test_check_does_everything_and_reports_the_first_failure(monkeypatch):
    done = []

    def foreground(argv: list[str], **extra_env: str) -> int:
        done.append(argv[1:4])
        return {"mypy": 2, "pytest": 1}.get(argv[2], 0)

    monkeypatch.setattr(processes, "_foreground", foreground)
    assert processes.main(["check", "tests/portal"]) == 2
    assert done == [
        ["-m", "ruff", "format"],
        ["-m", "ruff", "check"],
        ["-m", "mypy"],
        ["manage.py", "makemigrations", "--check"],
        ["-m", "pytest", "tests/portal"],
    ]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_the_tests_do_not_outlive_the_command(recorder, signum):
    (recorder / "test_recorder.py").write_text(
        "import os, pathlib, time\n"
        "def test_slow():\n"
        "    (pathlib.Path(__file__).parent / 'pid').write_text(str(os.getpid()) + '\\n')\n"
        "    time.sleep(600)\n"
    )
    argv = [sys.executable, "-m", "portal.processes", "test", *PYTEST, str(recorder)]
    pid = recorder / "pid"
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as command:
        try:
            eventually(lambda: pid.exists() and pid.read_text().endswith("\n"), seconds=120)
            command.send_signal(signum)
            assert command.wait(30) != 0
        finally:
            command.kill()  # or leaving this block would wait for it
    eventually(lambda: not is_alive(int(pid.read_text())))


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["Test"]])
def test_run_explains_itself(arguments):
    ended = subprocess.run([str(ROOT / "run"), *arguments], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("usage: ./run demo")
