"""A demo whose step fails says so, ends non-zero, and leaves no process behind."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from portal.processes import MARK

ROOT = Path(__file__).resolve().parents[2]

#: The demo itself, but for two things: its site is one process that has a child in a session of its own, and the upload fails.
BROKEN_DEMO = """
import sys, django
from portal.demo import __main__ as demo
from portal.demo.console import DemoFailed
from portal.site import Site

CHILD = '''
import os, subprocess, sys, time
orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with open(sys.argv[1], "w") as file:
    file.write(f"{os.getpid()} {orphan.pid}")
print("ready.", flush=True)
time.sleep(600)
'''

def start_site(supervisor, environment, var):
    supervisor.start("web", [sys.executable, "-c", CHILD, str(var / "pids")], env=environment.of("web"), ready="ready.")
    return Site(url="http://127.0.0.1:9", stripe_url="", stripe_key="", environment=environment, supervisor=supervisor)

setup = django.setup

def setup_and_break():
    from portal.demo.job import MainJob
    def upload(self):
        raise DemoFailed("digits-one.parquet did not arrive")
    MainJob.upload = upload

demo.start_site = start_site
django.setup = lambda: (setup(), setup_and_break())
sys.exit(demo.main(["--no-serve"]))
"""


def test_a_step_that_fails_ends_the_demo_with_everything_it_started(tmp_path: Path) -> None:
    environment = os.environ | {"RESIDUAL_VAR": str(tmp_path), "OMP_NUM_THREADS": "1"}

    ended = subprocess.run(
        [sys.executable, "-c", BROKEN_DEMO], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )

    assert ended.returncode == 1, ended.stderr
    assert "The demo failed: digits-one.parquet did not arrive" in ended.stdout
    assert "2/9 Upload" in ended.stdout and "3/9" not in ended.stdout
    started = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(started) == 2
    assert [pid for pid in started if _runs(pid)] == []
    assert _of_this_demo(tmp_path) == []


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # dead, and whoever inherited it has not looked yet
    except psutil.NoSuchProcess:
        return False


def _of_this_demo(var: Path) -> list[Any]:
    """Whatever runs with the supervisor's mark for this folder; the reaper has it in its arguments, and ends a moment later."""
    deadline = time.monotonic() + 5
    while True:
        left = []
        for process in psutil.process_iter():
            try:
                environ = process.environ()
            except psutil.Error:
                continue
            if environ.get("RESIDUAL_VAR") == str(var) and (MARK in environ or "reap" in process.cmdline()):
                left.append(process)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)
