from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from attribution.engine import EngineError, epoch_order, train
from attribution.engine.checkpoints import read_state
from attribution.engine.meter_log import Entry, Head, LogWriter, entries, read_header, totals
from attribution.engine.metered import (
    Moment,
    check_heads,
    check_log,
    compare_segment,
    expected_header,
    first_rates,
    metered_shares,
    run_metered,
)
from attribution.engine.training import Program


def dropping_model():
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.3), nn.Linear(6, 3))


@pytest.fixture
def task(make_task):
    return make_task(
        n_train=18, epochs=4, batch=4, build=dropping_model
    )  # 20 steps; the last of an epoch has two empty slots


@pytest.fixture
def run(task, tmp_path):
    """A metered training: its log, its checkpoints, its heads a second apart."""
    heads = []

    def post(head):
        heads.append(Moment(head, float(len(heads))))

    log = tmp_path / "run.meter"
    checkpoints = run_metered(
        task, log=log, every=2, heads=post, heads_every=2, checkpoint_steps=[7, 14, 20], checkpoint_dir=tmp_path
    )
    return log, checkpoints, heads


def check(task, log):
    order = task.require_recipe().order
    header = expected_header(task, read_header(log), n_train=task.n_train)
    rates = first_rates(task.require_recipe(), task.model())
    check_log(log, header=header, order=order, rates=rates, max_entries=1_000)


def rewritten(log, change, header=None):
    """The log as someone writes it anew who knows the format; `change` gets each entry and gives those that are written."""
    kept, said = list(entries(log)), read_header(log)
    said = {key: value for key, value in said.items() if key not in ("format", "first_step")} | (header or {})
    log.unlink()
    with_heads = []
    writer = LogWriter(log, said, heads=with_heads.append, heads_every=2)
    for entry in kept:
        for written in change(entry):
            writer.append(written)
    writer.close()
    return with_heads


def changed(entry, **fields):
    return Entry(**{**vars(entry), **fields})


@pytest.mark.parametrize(
    ("optimizer", "options", "clip"),
    [("sgd", {"momentum": 0.9, "nesterov": True}, None), ("adamw", {"weight_decay": 0.1}, 0.5), ("sgd", {}, None)],
)
def test_the_metered_loop_trains_to_the_bits_of_the_recipe_dropout_and_empty_slots_included(
    task, tmp_path, optimizer, options, clip
):
    task = replace(task, recipe=replace(task.recipe, optimizer=optimizer, options=options, clip_norm=clip))

    ((_, path),) = run_metered(task, log=tmp_path / "a", every=3, checkpoint_steps=[20], checkpoint_dir=tmp_path)

    plain = train(task).state
    found = read_state(Program(task), path, 20, pointer="")
    assert all(torch.equal(found.parameters[name], p) for name, p in plain.parameters.items())
    assert all(
        torch.equal(found.moments[field][name], m) for field, ms in plain.moments.items() for name, m in ms.items()
    )
    check(task, tmp_path / "a")


def test_every_segment_of_an_honest_log_comes_out_again_bit_for_bit(task, run):
    log, checkpoints, _ = run
    program = Program(task)
    starts = [program.initial(1), *(read_state(program, path, step, pointer="") for step, path in checkpoints)]

    found = [compare_segment(task, start, last, log) for start, last in zip(starts, (7, 14, 20), strict=False)]

    assert [(one.matches, one.worst.distance) for one in found] == [(True, 0.0)] * 3
    assert sum(one.n_measured for one in found) == sum(e.influence is not None for e in entries(log))


@pytest.mark.parametrize("factor", [1.01, 3.0, -1.0])
def test_an_influence_that_was_changed_is_named_by_its_entry(task, run, factor):
    log, checkpoints, _ = run

    def change(entry):
        if entry.step == 8 and entry.influence is not None:
            raised = entry.influence.copy()
            raised[1] *= factor
            entry = changed(entry, influence=raised)
        return [entry]

    measured = [e.step for e in entries(log) if e.influence is not None]
    assert 8 in measured
    rewritten(log, change)
    check(task, log)  # the chain, the order and the draw are as they should be
    start = read_state(Program(task), checkpoints[0][1], 7, pointer="")

    found = compare_segment(task, start, 14, log)

    assert not found.matches
    assert found.finding.startswith("entry 9, of step 8, does not come out again")


def _swapped(entry):
    return [changed(entry, records=entry.records[::-1].copy())] if entry.step == 3 else [entry]


def _out_of_range(entry):
    records = entry.records.copy()
    records[0] = 99
    return [changed(entry, records=records)] if entry.step == 3 else [entry]


def _left_out(entry):
    return [] if entry.step == 3 else [entry]


def _cut_short(entry):
    return [entry] if entry.step < 15 else []


def _one_more(entry):
    return [entry, changed(entry, step=20, update=21)] if entry.step == 19 else [entry]


def _unmeasured(entry):
    return [changed(entry, influence=None)] if entry.influence is not None and entry.step > 4 else [entry]


def _not_finite(entry):
    return [entry if entry.influence is None else changed(entry, influence=entry.influence * np.float32("nan"))]


def _other_rate(entry):
    return [changed(entry, learning_rate=1.0)] if entry.step == 5 else [entry]


def _other_count(entry):
    return [changed(entry, update=1)] if entry.step == 5 else [entry]


def _rarer(entry):
    return [changed(entry, probability=0.01)] if entry.step == 5 else [entry]


@pytest.mark.parametrize(
    ("change", "pointer", "says"),
    [
        (_swapped, "/log/4", "the disclosed order has"),
        (_out_of_range, "/log/4", "is of records 99"),
        (_left_out, "/log/4", "is of step 4; step 3 of 20 is due"),
        (_cut_short, "/log/16", "ends after 15 steps; the recipe has 20"),
        (_one_more, "/log/21", "step 20 of 20 is due"),
        (_unmeasured, None, "not measured"),
        (_not_finite, "/log/1", "not finite"),
        (_other_rate, "/log/6", "learning rate 1"),
        (_other_count, "/log/6", "update 1"),
        (_rarer, "/log/6", "probability 0.01"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_log_of_another_training_is_refused_by_its_entry(task, run, change, pointer, says):
    log, _, _ = run
    rewritten(log, change)

    with pytest.raises(EngineError) as refused:
        check(task, log)

    assert says in refused.value.reason
    assert pointer is None or refused.value.pointer == pointer


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"n_train": 17}, "n_train 17"),
        ({"queries": "0" * 64}, "queries"),
        ({"left_out": ["0.weight"]}, "left_out ['0.weight']"),
        ({"optimizer": {"name": "sgd", "momentum": 0.5, "dampening": 0.0, "nesterov": False}}, "optimizer"),
        ({"every": 0}, "every 0"),
        ({"seed": "lucky"}, "seed 'lucky'"),
    ],
)
def test_a_header_of_another_meter_is_refused(task, run, header, says):
    log, _, _ = run
    rewritten(log, lambda entry: [entry], header)

    with pytest.raises(EngineError, match="header") as refused:
        check(task, log)

    assert says in refused.value.reason


def test_a_log_that_is_not_closed_or_has_too_many_entries_is_refused(task, run):
    log, _, _ = run
    with pytest.raises(EngineError, match="at most 5"):
        check_log(
            log,
            header=expected_header(task, read_header(log), n_train=18),
            order=task.recipe.order,
            rates=first_rates(task.recipe, task.model()),
            max_entries=5,
        )
    data = log.read_bytes()
    log.write_bytes(data[: -(4 + 17 + 32)])  # the closing frame
    with pytest.raises(EngineError, match="not closed"):
        check(task, log)


def test_heads_posted_while_training_ran_fix_the_log(task, run):
    log, _, heads = run

    check_heads(log, heads, handed_in_at=heads[-1].at)

    end = heads[-1].head.entry
    with pytest.raises(EngineError, match="no head was posted while"):
        check_heads(log, [], handed_in_at=99)
    with pytest.raises(EngineError, match=f"the head of the last entry, {end}, was not posted"):
        check_heads(log, heads[:-1], handed_in_at=99)
    with pytest.raises(EngineError, match=f"entry {end} was posted after the log was handed in"):
        check_heads(log, heads, handed_in_at=heads[-2].at)
    with pytest.raises(EngineError, match="between entries 3 and 9"):
        check_heads(log, [heads[0], heads[1], *heads[4:]], handed_in_at=99)


def test_heads_sent_all_at_once_at_the_end_count_as_one(task, run):
    log, _, heads = run

    with pytest.raises(EngineError, match="between entries 0 and 21 of 21"):
        check_heads(log, [Moment(moment.head, 7.0) for moment in heads], handed_in_at=99)


def test_a_log_written_again_after_its_heads_were_posted_is_refused_by_the_entry(task, run):
    log, _, heads = run
    rewritten(
        log,
        lambda entry: [changed(entry, measurement=0.1) if entry.step == 6 and entry.influence is not None else entry],
    )

    with pytest.raises(EngineError, match=r"entry \d+ is not the entry whose head was posted") as refused:
        check_heads(log, heads, handed_in_at=99)

    assert int(refused.value.pointer.rpartition("/")[2]) in (7, 8, 9)


def test_a_head_beyond_the_end_shows_that_the_log_was_cut(task, run):
    log, _, heads = run
    longer = Moment(Head(99, 99, "0" * 64), 50.0)

    with pytest.raises(EngineError, match="is missing: the head of entry 99 was posted"):
        check_heads(log, [*heads, longer], handed_in_at=99)


def test_shares_add_the_log_up_and_need_enough_measurements(make_task, tmp_path):
    task = make_task(n_train=20, n_query=9, epochs=8, batch=5, task={"owner": torch.arange(20) % 2})
    for every in (1, 64):
        run_metered(task, log=tmp_path / f"{every}.meter", every=every)

    often, rarely = (metered_shares(task, tmp_path / f"{every}.meter") for every in (1, 64))

    assert np.abs(often.values - totals(tmp_path / "1.meter").numpy()).max() < 1e-12
    assert often.details["measured_visits"] == 8
    assert rarely.details["measured_visits"] < 4
    assert rarely.counted and rarely.reliability == 0 and "measure more steps" in rarely.why_counted
    assert sum(owner.share for owner in often.owners) == pytest.approx(1)


def test_a_run_that_was_killed_and_goes_on_from_its_checkpoint_passes(task, tmp_path):
    log = tmp_path / "run.meter"
    ((_, path),) = run_metered(task, log=log, every=2, last=9, checkpoint_steps=[7], checkpoint_dir=tmp_path)
    start = read_state(Program(task), path, 7, pointer="")

    run_metered(task, log=log, every=2, start=start)

    check(task, log)
    assert [entry.step for entry in entries(log)] == list(range(20))


def test_the_order_of_another_seed_is_refused(task, run):
    log, _, _ = run
    other = replace(task, recipe=replace(task.recipe, order=epoch_order(18, 4, 4, 1)))

    with pytest.raises(EngineError, match="the disclosed order has") as refused:
        check(other, log)

    assert refused.value.pointer == "/log/1"


def test_a_log_of_steps_too_large_for_first_order_does_not_count(make_task, tmp_path):
    """Training leaps and falls back; the meter says that it fell by several times as much as it did."""
    for rate in (0.1, 6.0):
        task = make_task(
            n_train=20, n_query=9, epochs=8, batch=5, learning_rate=rate, task={"owner": torch.arange(20) % 2}
        )
        run_metered(task, log=tmp_path / f"{rate}.meter", every=1)

    small, large = (metered_shares(task, tmp_path / f"{rate}.meter") for rate in (0.1, 6.0))

    assert 0.5 <= small.details["held"] <= 2
    assert not 0.5 <= large.details["held"] <= 2
    assert large.counted and large.reliability == 0
