from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from attribution.engine import EngineError, TensorRecords, epoch_order, initial_state_from_seed, train
from attribution.engine.training import save_state
from attribution.engine.verification import verify


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
