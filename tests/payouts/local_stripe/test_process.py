"""Starting and ending: nothing outlives the process that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from payouts.local_stripe import process

http = httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0))
STARTER = """
import pathlib, sys, time
from payouts.local_stripe import process
handle = process.start(pathlib.Path(sys.argv[1]), secret_key="sk_test_x")
print(handle.url, handle.process.pid, flush=True)
time.sleep(60)
"""


def test_it_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path)], cwd=process.ROOT, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    with starter.stdout:
        url, pid = starter.stdout.readline().split()
    assert http.get(url).status_code == 200
    starter.kill()
    starter.wait()

    deadline = time.monotonic() + 15
    while _group_lives(int(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(httpx.ConnectError):
        http.get(url)


def test_it_ends_in_good_order(tmp_path: Path) -> None:
    with process.start(tmp_path, secret_key="sk_test_x") as handle:
        assert http.get(handle.url).status_code == 200

    assert not _group_lives(handle.process.pid)
    handle.stop()  # harmless again


def test_a_crashed_worker_is_replaced(tmp_path: Path) -> None:
    with process.start(tmp_path, secret_key="sk_test_x") as handle:
        made = http.post(f"{handle.url}/v1/customers", data={"name": "A"}, auth=("sk_test_x", "")).json()
        (worker,) = subprocess.check_output(["pgrep", "-P", str(handle.process.pid)], text=True).split()
        os.kill(int(worker), signal.SIGKILL)

        url = f"{handle.url}/v1/customers/{made['id']}"
        deadline = time.monotonic() + 15
        while True:
            try:
                answer = http.get(url, auth=("sk_test_x", ""))
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert answer.json() == made


def test_a_key_that_could_be_real_is_refused(tmp_path: Path) -> None:
    with pytest.raises(process.DidNotStart, match="sk_test_"):
        process.start(tmp_path, secret_key="sk_live_x")


def _group_lives(group: int) -> bool:
    """Whether any process of the group is more than a zombie that nobody has waited for."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:  # it ended while we looked
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                return True
    return False
