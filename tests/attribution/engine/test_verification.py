import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from attribution.engine import (
    EngineError,
    TensorRecords,
    TrainingDiverged,
    epoch_order,
    initial_state_from_seed,
    train,
    without_copies,
)
from attribution.engine.training import Program, preserved_generator, save_state
from attribution.engine.verification import draw_segments, verify


@pytest.fixture
def disclosed(make_task, tmp_path):
    """A task with the checkpoints of its own training, in single precision as models are."""

    def build():
        return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.GELU(), torch.nn.Linear(5, 3))

    task = make_task(build=build, n_train=30, batch=6)
    run = train(task, checkpoint_steps=[5, 15], checkpoint_dir=tmp_path)
    return replace(task, checkpoints=run.checkpoints)


def test_an_honest_disclosure_is_reproduced_to_the_bit(disclosed):
    report = verify(disclosed)

    assert report.matches and report.is_bit_equal
    assert [c.step for c in report.checkpoints] == [5, 15]
    assert report.environment["torch"] == torch.__version__
    assert report.environment["threads"] == torch.get_num_threads()
    assert 0 < report.tolerance.reordering < 1e-4
    assert report.to_json()["is_bit_equal"] is True


def test_rounding_elsewhere_is_within_the_measured_tolerance(disclosed, tmp_path):
    """Weights that another build might have given: off by a rounding here and there."""
    (_, path) = disclosed.checkpoints[-1]
    rounded = {name: torch.nextafter(t, t + 1) if t.is_floating_point() else t for name, t in load_file(path).items()}

    report = verify(disclosed, checkpoints=[(15, save_state(rounded, tmp_path / "rounded.safetensors"))])

    assert report.matches and not report.is_bit_equal
    drift = max(c.weights_drift for c in report.checkpoints)
    assert 0 < drift <= report.tolerance.drift < report.tolerance.left_out


def left_out(task):
    x, y = task.train[torch.arange(29)]
    return replace(task, train=TensorRecords(x, y), recipe=replace(task.recipe, order=epoch_order(29, 6, 3, 0)))


def relabelled(task):
    x, y = task.train[torch.arange(30)]
    y = y.clone()
    y[17] = (y[17] + 1) % 3
    return replace(task, train=TensorRecords(x, y))


def reordered(task):
    return replace(task, recipe=replace(task.recipe, order=epoch_order(30, 6, 3, 1)))


def started_elsewhere(task):
    return replace(task, recipe=replace(task.recipe, initial_state=initial_state_from_seed(task.model, 1)))


def slower(task):
    return replace(task, recipe=replace(task.recipe, learning_rate=0.099))


@pytest.mark.parametrize("lie", [left_out, relabelled, reordered, started_elsewhere, slower])
def test_a_lie_about_the_training_is_a_mismatch(disclosed, lie):
    report = verify(lie(disclosed))

    assert not report.matches
    assert "not reproduced" in report.summary


@pytest.mark.parametrize("tensor", ["model.0.bias", "optimizer.2.weight.momentum_buffer"])
def test_an_altered_checkpoint_is_a_mismatch_that_names_the_tensor(disclosed, tensor, tmp_path):
    (_, path) = disclosed.checkpoints[-1]
    altered = load_file(path)
    altered[tensor].view(-1)[0] += 1e-3

    report = verify(disclosed, checkpoints=[(15, save_state(altered, tmp_path / "altered.safetensors"))])

    assert not report.matches
    assert [(d.step, d.tensor, d.n_different) for d in report.differences] == [(15, tensor, 1)]


def test_bad_evidence_is_refused(disclosed, tmp_path):
    pickled = tmp_path / "pickled.safetensors"
    torch.save({"model.0.bias": torch.zeros(5)}, pickled)
    (_, path) = disclosed.checkpoints[-1]
    misshapen = save_state(load_file(path) | {"model.0.bias": torch.zeros(4)}, tmp_path / "misshapen.safetensors")

    for checkpoints, message in (
        ([], "at least one checkpoint"),
        ([(16, path)], "not in 0..15"),
        ([(15, pickled)], "not a safetensors file"),
        ([(15, misshapen)], "model.0.bias"),
    ):
        with pytest.raises(EngineError, match=message):
            verify(disclosed, checkpoints=checkpoints)


class Permuted(torch.nn.Module):
    """Integers and booleans that decide what the weights act on, and no float in them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("perm", torch.tensor([2, 0, 3, 1]))
        self.register_buffer("keep", torch.tensor([True, True, False, True]))
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x[..., self.perm] * self.keep)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("segments", [None, 5])
@pytest.mark.parametrize("name", ["model.perm", "model.keep"])
def test_an_integer_or_boolean_is_never_within_a_tolerance(make_task, tmp_path, name, segments, rounded):
    """The last checkpoint differs in one such number alone, or besides roundings that are allowed."""
    task = make_task(build=Permuted, n_train=30, batch=6)
    checkpoints = chain(task, tmp_path)
    assert verify(task, checkpoints=checkpoints, segments=segments, seed=0).is_bit_equal
    (_, path) = checkpoints[-1]
    altered = load_file(path)
    if rounded:
        altered = {n: torch.nextafter(t, t + 1) if t.is_floating_point() else t for n, t in altered.items()}
        save_state(altered, path)
        assert verify(task, checkpoints=checkpoints, segments=segments, seed=0).matches
    altered[name][-1] = 2 if name == "model.perm" else False
    save_state(altered, path)

    report = verify(task, checkpoints=checkpoints, segments=segments, seed=0)

    assert not report.matches and not report.is_bit_equal
    assert report.checkpoints[-1].weights_drift == float("inf")
    assert (report.differences[0].step, report.differences[0].tensor, report.differences[0].n_different) == (
        15,
        name,
        1,
    )
    assert f"{name} differs in 1 of 4" in report.summary
    if segments:
        assert [(s.first, s.last) for s in report.draw.segments if not s.matches] == [(12, 15)]


# --- segments


def small():
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.GELU(), torch.nn.Linear(5, 3))


@pytest.fixture
def told(make_task):
    """What is disclosed: thirty records, fifteen steps, and public seeds for the order and the initial state."""
    return make_task(build=small, n_train=30, batch=6, order_seed=0, initial_seed=0)


def chain(trained, folder, every=3):
    """Checkpoints of a training, every few steps."""
    n_step = trained.recipe.n_step
    return train(trained, checkpoint_steps=range(every, n_step + 1, every), checkpoint_dir=folder).checkpoints


def with_records(task, change):
    x, y = (part.clone() for part in task.train[torch.arange(task.n_train)])
    return replace(task, train=TensorRecords(*change(x, y)))


def without_record(task):
    """Record 5 never seen: its slots are empty."""
    order = task.recipe.order.clone()
    return replace(task, recipe=replace(task.recipe, order=torch.where(order == 5, -1, order)))


def with_an_uncited_record(task):
    """A thirty-first record, cited nowhere, in the slots of record 5."""
    more = with_records(task, lambda x, y: (torch.cat([x, x[:1] + 1]), torch.cat([y, y[:1]])))
    order = torch.where(task.recipe.order == 5, 30, task.recipe.order)
    return replace(more, recipe=replace(task.recipe, order=order))


def with_records_swapped(task):
    swap = torch.arange(30)
    swap[[5, 6]] = swap[[6, 5]]
    return with_records(task, lambda x, y: (x[swap], y[swap]))


def with_one_relabelled(task):
    return with_records(task, lambda x, y: (x, torch.where(torch.arange(30) == 5, (y + 1) % 3, y)))


def in_another_order(task):
    return replace(task, recipe=replace(task.recipe, order=epoch_order(30, 6, 3, 1)))


def with_an_epoch_reordered(task):
    """Only the last two steps changed places."""
    order = task.recipe.order.clone()
    order[[13, 14]] = order[[14, 13]]
    return replace(task, recipe=replace(task.recipe, order=order))


CHEATS = [
    without_record,
    with_an_uncited_record,
    with_records_swapped,
    with_one_relabelled,
    in_another_order,
    with_an_epoch_reordered,
]


def test_segments_of_an_honest_chain_are_reproduced_to_the_bit_and_say_what_they_leave_unseen(told, tmp_path):
    report = verify(told, checkpoints=chain(told, tmp_path), segments=2, seed=7)

    assert report.matches and report.is_bit_equal
    assert report.origin.order is True and report.origin.initial_state is True
    assert (report.draw.n_segment, len(report.draw.segments), report.draw.seed) == (5, 2, 7)
    assert {s.last - s.first for s in report.draw.segments} == {3}
    missed = {m.false_segments: m.probability for m in report.draw.miss}
    assert missed[1] == pytest.approx(3 / 5) and missed[2] == pytest.approx(3 / 10) and missed[5] == 0
    assert "missed in 1 of 5 with probability 0.6; in 2 of 5 with probability 0.3" in report.summary
    assert 0 < report.draw.hidden_of_left_out <= 0.1 and 0 < report.draw.hidden_drift < 1e-3
    assert report.to_json()["draw"]["segments"][0]["matches"] is True


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_in_the_training_is_caught_in_the_segments_that_it_touches(told, tmp_path, cheat):
    """The trainer did something else than is told; all segments are drawn."""
    trained = cheat(told)

    report = verify(told, checkpoints=chain(trained, tmp_path), segments=5, seed=0)

    assert not report.matches and "not reproduced" in report.summary
    touched = [
        number
        for number in range(5)
        for rows in [slice(3 * number, 3 * number + 3)]
        if not _sees_the_same(trained, told, rows)
    ]
    assert [n for n, segment in enumerate(report.draw.segments) if not segment.matches] == touched


def _sees_the_same(trained, told, rows):
    ours, theirs = (task.recipe.order[rows] for task in (trained, told))
    if not torch.equal(ours, theirs):
        return False
    return all(map(torch.equal, trained.train[ours.clamp_min(0)], told.train[theirs.clamp_min(0)]))


@pytest.mark.parametrize("tensor", ["model.0.bias", "optimizer.2.weight.momentum_buffer"])
def test_an_altered_checkpoint_falsifies_the_segments_on_both_sides_of_it(told, tmp_path, tensor):
    checkpoints = chain(told, tmp_path)
    (_, path) = checkpoints[1]
    altered = load_file(path)
    altered[tensor].view(-1)[0] += 1e-3
    save_state(altered, path)

    report = verify(told, checkpoints=checkpoints, segments=5, seed=0)

    assert not report.matches
    assert [(s.first, s.last) for s in report.draw.segments if not s.matches] == [(3, 6), (6, 9)]


@pytest.mark.parametrize("tensor", ["model.0.bias", "optimizer.2.weight.momentum_buffer"])
def test_a_checkpoint_from_which_the_replay_diverges_is_a_mismatch_not_bad_input(told, tmp_path, tensor):
    checkpoints = chain(told, tmp_path)
    (_, path) = checkpoints[1]
    altered = load_file(path)
    altered[tensor].view(-1)[0] = float("inf")
    save_state(altered, path)

    report = verify(told, checkpoints=checkpoints, segments=5, seed=0)

    assert not report.matches and not report.is_bit_equal
    assert [(s.first, s.last) for s in report.draw.segments if not s.matches] == [(3, 6), (6, 9)]
    assert "the replay from the checkpoint after step 6 diverges" in report.summary
    assert f"{tensor} has 1 of" in report.summary and "learning rate" not in report.summary
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["draw"]["segments"][2]["finding"]
    single = next(s for s in range(99) if draw_segments(5, 1, s, report.draw.commitment) == [2])
    assert not verify(told, checkpoints=checkpoints, segments=1, seed=single).matches  # with nothing else to go by


def test_an_altered_index_that_the_model_cannot_use_is_a_mismatch(make_task, tmp_path):
    task = make_task(build=Permuted, n_train=30, batch=6)
    checkpoints = chain(task, tmp_path)
    (_, path) = checkpoints[1]
    altered = load_file(path)
    altered["model.perm"][0] = 99
    save_state(altered, path)

    report = verify(task, checkpoints=checkpoints, segments=5, seed=0)

    assert [(s.first, s.last) for s in report.draw.segments if not s.matches] == [(3, 6), (6, 9)]
    assert "the replay from the checkpoint after step 6 breaks off: index 99" in report.summary


def test_a_recipe_that_diverges_from_its_own_start_is_bad_input(told, tmp_path):
    checkpoints = chain(told, tmp_path)
    wild = replace(told, recipe=replace(told.recipe, learning_rate=1e30))

    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        verify(wild, checkpoints=checkpoints)


def test_the_bound_on_what_hides_is_stated_of_sampled_records_and_drawn_segments(told, tmp_path):
    """A record that was not sampled may do less than the four, and the report does not deny it."""
    checkpoints = chain(told, tmp_path)
    for _, path in checkpoints:
        save_state(
            {n: torch.nextafter(t, t + 1) if t.is_floating_point() else t for n, t in load_file(path).items()}, path
        )

    report = verify(told, checkpoints=checkpoints, segments=2, seed=7)

    assert "one of four sampled records" in report.summary
    assert any("least of four sampled records" in line and "widest tolerance" in line for line in report.caveats)


def test_weights_spliced_in_from_another_training_are_one_false_segment(told, tmp_path):
    """Fang et al. 2022: an honest beginning, then somebody else's weights, honestly trained on."""
    ours = chain(told, tmp_path / "ours")
    theirs = chain(
        replace(told, recipe=replace(told.recipe, initial_state=initial_state_from_seed(small, 9), initial_seed=9)),
        tmp_path / "theirs",
    )

    report = verify(told, checkpoints=[*ours[:2], *theirs[2:]], segments=5, seed=0)

    assert [(s.first, s.last) for s in report.draw.segments if not s.matches] == [(6, 9)]
    assert report.draw.miss[0].probability == 0


@pytest.mark.parametrize("segments", [None, 2])
def test_an_order_or_a_start_that_its_seed_does_not_give_is_a_mismatch(told, tmp_path, segments):
    order = with_an_epoch_reordered(told)
    start = replace(told, recipe=replace(told.recipe, initial_state=initial_state_from_seed(small, 1)))

    for lie, words in ((order, "step 13, slot"), (start, "seed 0: 0.weight differs")):
        folder = tmp_path / words[:4]
        report = verify(lie, checkpoints=chain(lie, folder), segments=segments, seed=3)

        assert not report.matches and words in report.summary
        assert report.is_bit_equal  # the weights are the training's; it is the origin that is not


def test_an_order_that_names_each_class_of_copies_once_follows_from_its_seed(told, tmp_path):
    copy_of = torch.arange(30)
    copy_of[[20, 25]] = 5
    order = without_copies(told.recipe.order, copy_of)
    skipped = replace(told, copy_of=copy_of, recipe=replace(told.recipe, order=order))
    assert {5, 20, 25} & set(order.flatten().tolist()) == {5}

    report = verify(skipped, checkpoints=chain(skipped, tmp_path / "skipped"), segments=2, seed=0)

    assert report.matches and report.origin.order is True and report.origin.rule == "without_copies"
    assert any("slots of copies left empty" in line for line in report.caveats)
    trained_on = replace(told, copy_of=copy_of)
    report = verify(trained_on, checkpoints=chain(trained_on, tmp_path / "both"), segments=2, seed=0)
    assert report.matches and report.origin.rule == "epoch_order"
    assert not any("slots of copies" in line for line in report.caveats)


def test_no_slot_but_a_copys_may_be_empty(told, tmp_path):
    """Half of the copies skipped, a record skipped that is no copy, and all copies skipped where none are stated."""
    copy_of = torch.arange(30)
    copy_of[[20, 25]] = 5
    drawn = told.recipe.order
    half = torch.where(drawn == 20, -1, drawn)
    more = torch.where(drawn == 7, -1, without_copies(drawn, copy_of))
    for order, of in ((half, copy_of), (more, copy_of), (without_copies(drawn, copy_of), None)):
        lie = replace(told, copy_of=of, recipe=replace(told.recipe, order=order))

        report = verify(lie, checkpoints=chain(lie, tmp_path / str(len(list(tmp_path.iterdir())))), segments=1, seed=0)

        assert not report.matches and report.origin.rule == ""
        assert "The order is not epoch_order's by seed 0" in report.summary
    assert "has record -1, not" in report.summary


def test_without_public_seeds_the_report_says_what_could_hide(make_task, tmp_path):
    task = make_task(build=small)

    report = verify(task, checkpoints=chain(task, tmp_path), segments=1, seed=0)

    assert report.matches and report.origin.order is None
    assert any("order" in line for line in report.caveats) and any("initial state" in line for line in report.caveats)


def test_segments_allow_the_rounding_of_another_build_and_no_more_than_a_tenth_of_a_record(told, tmp_path):
    checkpoints = chain(told, tmp_path)
    for _, path in checkpoints:
        rounded = {n: torch.nextafter(t, t + 1) if t.is_floating_point() else t for n, t in load_file(path).items()}
        save_state(rounded, path)

    report = verify(told, checkpoints=checkpoints, segments=5, seed=0)

    assert report.matches and not report.is_bit_equal
    for segment in report.draw.segments:
        assert 0 < segment.end.worst <= segment.tolerance.drift <= segment.tolerance.left_out / 10


def test_cheats_are_missed_as_often_as_the_report_says(make_task, tmp_path):
    """Three of ten segments are false; over many seeds of the verifier two draws miss them as computed."""
    task = make_task(build=small, n_train=12, batch=6, epochs=5, order_seed=0, initial_seed=0)
    lie = with_records(task, lambda x, y: (x, (y + 1) % 3))
    program, other = Program(task), Program(lie)
    state, checkpoints = program.initial(1), []
    for step in range(10):
        with preserved_generator():
            state, _ = (other if step in (1, 4, 8) else program).step(state, torch.ones(1, 12))
        checkpoints.append((step + 1, save_state(state.tensors(), tmp_path / f"{step}.safetensors")))
    every = verify(task, checkpoints=checkpoints, segments=10, seed=0)
    false = {n for n, segment in enumerate(every.draw.segments) if not segment.matches}
    assert false == {1, 4, 8}

    draws = [set(draw_segments(10, 2, seed, every.draw.commitment)) for seed in range(4000)]

    report = verify(task, checkpoints=checkpoints, segments=2, seed=0)
    computed = next(m.probability for m in report.draw.miss if m.false_segments == 3)
    assert computed == pytest.approx(7 / 10 * 6 / 9)
    missed = sum(not drawn & false for drawn in draws) / len(draws)
    assert abs(missed - computed) < 4 * (computed * (1 - computed) / len(draws)) ** 0.5
    assert {n for drawn in draws for n in drawn} == set(range(10))
    for seed in range(12):  # and a draw decides the verdict
        assert verify(task, checkpoints=checkpoints, segments=2, seed=seed).matches is not bool(draws[seed] & false)


def test_the_draw_depends_on_the_checkpoints_and_on_the_seed(told, tmp_path):
    honest = chain(told, tmp_path / "honest")
    other = chain(with_one_relabelled(told), tmp_path / "other")

    first, second = (verify(told, checkpoints=c, segments=1, seed=0).draw.commitment for c in (honest, other))

    assert first != second
    assert len({tuple(draw_segments(50, 5, 0, commitment)) for commitment in (first, second)}) == 2
    assert len({tuple(draw_segments(50, 5, seed, first)) for seed in range(20)}) == 20


def test_a_segment_goes_on_with_dropout_schedule_and_adam_where_the_checkpoint_left_off(make_task, tmp_path):
    def with_dropout():
        return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Dropout(0.3), torch.nn.Linear(5, 3))

    task = make_task(
        build=with_dropout, optimizer="adamw", options={}, learning_rate=torch.linspace(0.02, 0.001, 9), clip_norm=0.5
    )

    report = verify(
        task,
        checkpoints=chain(task, tmp_path, every=2)
        + train(task, checkpoint_steps=[9], checkpoint_dir=tmp_path).checkpoints,
        segments=9,
        seed=0,
    )

    assert report.is_bit_equal and len(report.draw.segments) == 5


def test_a_chain_that_cannot_be_replayed_in_segments_is_refused_with_the_remedy(told, tmp_path):
    checkpoints = chain(told, tmp_path)
    (step, path) = checkpoints[1]
    weights = {name: t for name, t in load_file(path).items() if name.startswith("model.")}
    bare = (step, save_state(weights, tmp_path / "weights.safetensors"))

    for given, pointer, message in (
        ([checkpoints[0], bare, checkpoints[-1]], "/checkpoints/1", "no optimizer state.*train --checkpoint"),
        (checkpoints[:-1], "/checkpoints", "ends after 12 of 15 steps"),
        ([*checkpoints, checkpoints[0]], "/checkpoints/5", "two checkpoints of step 3"),
    ):
        with pytest.raises(EngineError, match=message) as refused:
            verify(told, checkpoints=given, segments=2, seed=0)
        assert refused.value.pointer == pointer
    for arguments, pointer in (({"segments": 0, "seed": 0}, "/segments"), ({"segments": 1}, "/seed")):
        with pytest.raises(EngineError) as refused:
            verify(told, checkpoints=checkpoints, **arguments)
        assert refused.value.pointer == pointer
    final = {name: t for name, t in load_file(checkpoints[-1][1]).items() if name.startswith("model.")}
    disclosed = save_state(final, tmp_path / "final.safetensors")
    assert verify(told, checkpoints=[*checkpoints[:-1], (15, disclosed)], segments=5, seed=0).is_bit_equal
