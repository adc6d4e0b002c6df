import hashlib
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from attribution.engine import EngineError
from attribution.engine.meter_log import Entry, Head, LogWriter, entries, gains, read_header, totals, verify_log

NAN = float("nan")
SGD = {"name": "sgd", "momentum": 0.9, "dampening": 0, "nesterov": False}
HEADER = {"n_train": 5, "seed": 0, "optimizer": SGD}


def entry(step: int, *, measured: bool = True, rate: float = 0.1) -> Entry:
    records = np.array([step % 5, (step + 2) % 5])
    influence = np.array([0.5, -0.25], np.float32) * (step + 1) if measured else None
    return Entry(step, step + 1, rate, 0.5, NAN, NAN, records, influence)


def write(path: Path, n: int, **settings) -> LogWriter:
    writer = LogWriter(path, HEADER, **settings)
    for step in range(writer.step, n):
        writer.append(entry(step, measured=step % 2 == 0))
    return writer


def frames(path: Path) -> list[bytes]:
    data, found = path.read_bytes(), []
    while data:
        size = struct.unpack("<I", data[:4])[0] + 36
        found.append(data[:size])
        data = data[size:]
    return found


def test_a_log_gives_back_what_was_written_and_its_chain_is_sha_256(tmp_path):
    path = tmp_path / "a.meter"
    writer = write(path, 4)
    writer.close()

    back = list(entries(path))
    assert [e.step for e in back] == [0, 1, 2, 3]
    assert back[2].records.tolist() == [2, 4] and back[2].influence.tolist() == [1.5, -0.75]
    assert back[1].influence is None and back[1].learning_rate == 0.1
    assert read_header(path)["n_train"] == 5
    head = bytes(32)
    for frame in frames(path):
        head = hashlib.sha256(head + frame[4:-32]).digest()
        assert frame[-32:] == head
    report = verify_log(path)
    assert (report.is_valid, report.n_entry, report.n_step, report.is_closed) == (True, 6, 4, True)
    assert report.head == head.hex() == writer.head.hex()


@pytest.mark.parametrize(
    ("tamper", "bad", "reason"),
    [
        (lambda f: [*f[:3], f[3][:70] + bytes([f[3][70] ^ 1]) + f[3][71:], *f[4:]], 3, "edited"),
        (lambda f: [*f[:3], *f[4:]], 3, "removed or out of order: entry 4"),
        (lambda f: [*f[:2], f[3], f[2], *f[4:]], 2, "removed or out of order: entry 3"),
        (lambda f: [*f[:3], f[3][:-7]], 3, "cut off"),
        (lambda f: [*f[:3], f[3][:2]], 3, "cut off"),
        (lambda f: [f[0][:20] + b"9" + f[0][21:], *f[1:]], 0, "edited"),
        (lambda f: [*f[:3], f[3][:4] + bytes([9]) + f[3][5:], *f[4:]], 3, "kind"),
    ],
)
def test_the_first_bad_entry_is_named(tmp_path, tamper, bad, reason):
    path = tmp_path / "a.meter"
    write(path, 5).close()
    path.write_bytes(b"".join(tamper(frames(path))))

    report = verify_log(path)

    assert report.bad_entry == report.n_entry == bad
    assert reason in report.reason
    if reason not in ("cut off",):
        with pytest.raises(EngineError) as refused:
            totals(path)
        assert refused.value.pointer == f"/log/{bad}"


def test_posted_heads_show_what_a_chain_alone_cannot(tmp_path):
    path, heads = tmp_path / "a.meter", tmp_path / "heads"
    write(path, 6, heads=heads, heads_every=3).close()
    assert verify_log(path, heads=heads).is_valid
    assert len(heads.read_text().splitlines()) == 3

    whole = frames(path)
    path.write_bytes(b"".join(whole[:4]))
    assert verify_log(path).is_valid and not verify_log(path).is_closed  # a shorter chain is a chain
    report = verify_log(path, heads=heads)
    assert report.bad_entry == 4 and "the log ends before it" in report.reason

    path.unlink()
    again = LogWriter(path, HEADER)
    for step in range(6):
        again.append(entry(step, rate=0.2))
    again.close()
    assert verify_log(path).is_valid
    assert verify_log(path, heads=heads).bad_entry == 2


def test_a_function_can_post_heads_while_training_runs(tmp_path):
    posted: list[Head] = []
    writer = write(tmp_path / "a.meter", 5, heads=posted.append, heads_every=2)

    assert [(head.entry, head.step) for head in posted] == [(1, 1), (3, 3), (5, 5)]
    assert posted[-1].head == writer.head.hex()
    writer.close()
    assert verify_log(tmp_path / "a.meter", heads=posted).is_valid


KILLED = """
import os, sys
from pathlib import Path
from tests.attribution.engine.test_meter_log import HEADER, entry
from attribution.engine.meter_log import LogWriter
writer = LogWriter(Path(sys.argv[1]), HEADER)
step = writer.step
while True:
    writer.append(entry(step))
    step += 1
    if step == 50:
        print("running", flush=True)
"""


def test_kill_9_leaves_a_valid_prefix_and_the_chain_goes_on(tmp_path):
    path = tmp_path / "a.meter"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    before = verify_log(path)
    assert before.is_valid or before.reason.startswith("cut off")
    assert before.n_step >= 50

    with path.open("ab") as file:
        file.write(b"\x40\x00\x00\x00torn")  # as a write cut in the middle would leave it
    writer = LogWriter(path, HEADER)
    assert writer.step == before.n_step
    writer.append(entry(before.n_step))
    writer.close()

    after = verify_log(path)
    assert after.is_valid and after.n_step == before.n_step + 1
    assert [e.step for e in entries(path)] == list(range(before.n_step + 1))


def test_resuming_from_an_earlier_checkpoint_undoes_nothing_and_counts_once(tmp_path):
    path = tmp_path / "a.meter"
    write(path, 6).close()
    heads = verify_log(path)

    writer = LogWriter(path, HEADER, first_step=4)
    for step in (4, 5, 6):
        writer.append(entry(step, rate=0.5))
    writer.close()

    assert verify_log(path, heads=[Head(heads.n_entry - 1, 6, heads.head)]).is_valid
    assert [(e.step, e.learning_rate) for e in entries(path)] == [
        *((step, 0.1) for step in range(4)),
        *((step, 0.5) for step in (4, 5, 6)),
    ]


def test_resuming_where_it_cannot_go_on_is_refused(tmp_path):
    path = tmp_path / "a.meter"
    first = write(path, 3)
    with pytest.raises(EngineError, match="another process") as refused:
        LogWriter(path, HEADER)
    assert refused.value.pointer == "/log"
    first.close()
    size = path.stat().st_size

    for header, step, pointer in (
        (HEADER | {"seed": 1}, None, "/log/header/seed"),
        (HEADER, 4, "/first_step"),
        (HEADER, -1, "/first_step"),
    ):
        with pytest.raises(EngineError) as refused:
            LogWriter(path, header, first_step=step)
        assert refused.value.pointer == pointer
    assert path.stat().st_size == size

    whole = frames(path)
    path.write_bytes(b"".join([*whole[:2], *whole[3:]]))
    with pytest.raises(EngineError, match="a broken log cannot go on"):
        LogWriter(path, HEADER)


def test_another_file_is_no_log(tmp_path):
    for content in (b"", b"PK\x03\x04" * 30, b'{"format": "residual-meter-1"}'):
        path = tmp_path / "a"
        path.write_bytes(content)
        with pytest.raises(EngineError):
            totals(path)
    with pytest.raises(EngineError, match="cannot be read"):
        verify_log(tmp_path / "none")


def test_totals_divide_by_the_probability_of_the_draw(tmp_path):
    path = tmp_path / "a.meter"
    write(path, 3).close()  # steps 0 and 2 are measured, with probability 1/2 each

    found = totals(path, carry=False)

    assert found.dtype == torch.float64
    assert found.tolist() == [1.0, 0.0, -0.5 + 3.0, 0.0, -1.5]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.8, dampening=0.3),
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.8, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=1.0),
        lambda p: torch.optim.Adam(p, lr=1.0, betas=(0.7, 1 - 1e-12), eps=1e12),  # so that v does not matter
    ],
)
def test_gains_are_what_a_pulse_does_over_a_run_over_what_it_does_at_once(make):
    rates = [0.5, 1.0, 2.0, 1.0, 0.25, 0.125]
    moved = torch.zeros(len(rates), len(rates))  # pulse at step s moves the parameter at step u
    for s in range(len(rates)):
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = make([p])
        for u, rate in enumerate(rates):
            optimizer.param_groups[0]["lr"] = rate
            p.grad = torch.tensor([float(s == u)], dtype=torch.float64)
            before = p.item()
            optimizer.step()
            moved[s, u] = p.item() - before
    group = optimizer.param_groups[0]
    settings = {"name": "sgd" if "momentum" in group else "adam", **group}

    found = gains([(rate, step + 1) for step, rate in enumerate(rates)], settings)

    expected = moved.sum(1) / moved.diagonal()
    torch.testing.assert_close(torch.from_numpy(found).float(), expected, rtol=1e-4, atol=1e-6)


def test_a_head_is_posted_only_once_its_entry_is_on_the_disk(tmp_path, monkeypatch):
    happened: list[object] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: happened.append("fsync") or fsync(handle))
    writer = LogWriter(tmp_path / "run.meter", HEADER, heads=happened.append, heads_every=2)
    for step in range(3):
        writer.append(entry(step))
    writer.close()

    posted = [at for at, what in enumerate(happened) if what != "fsync"]
    assert len(posted) == 3
    assert all(happened[at - 1] == "fsync" for at in posted)
