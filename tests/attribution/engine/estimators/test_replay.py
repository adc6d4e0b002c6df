import torch

from attribution.engine import replay_values
from attribution.engine.estimators import replay


def test_replay_is_the_slope_of_every_query_in_every_weight(make_task, monkeypatch):
    task = make_task(options={"momentum": 0.9, "weight_decay": 0.01}, clip_norm=1.0)
    monkeypatch.setattr(replay, "QUERY_BLOCK", 4)

    scores = replay.score(task)

    h = 1e-5 * torch.eye(task.n_train, dtype=torch.float64)
    slope = (replay_values(task, 1 + h, per_query=True) - replay_values(task, 1 - h, per_query=True)) / 2e-5
    torch.testing.assert_close(scores, slope.float(), rtol=1e-4, atol=1e-6)


def test_replay_predicts_what_leaving_a_record_out_does(make_task):
    task = make_task(n_train=30, batch=10, epochs=4, learning_rate=0.05)

    scores = replay.score(task).double().mean(1)

    without = replay_values(task, 1 - torch.eye(task.n_train))
    effect = replay_values(task, torch.ones(1, task.n_train)) - without
    assert torch.corrcoef(torch.stack([scores, effect]))[0, 1] > 0.95


def test_replay_sums_a_class_of_copies_at_its_representative(make_task):
    copies = torch.tensor([0, 1, 2, 1, 4, 5, 6, 7, 8, 9])
    one_by_one = replay.score(make_task())

    scores = replay.score(make_task(task={"copy_of": copies}))

    torch.testing.assert_close(scores[1], one_by_one[1] + one_by_one[3])
    assert scores[3].eq(0).all()


def test_replay_at_a_mask_gives_dropped_records_a_slope_too(make_task):
    task = make_task()
    mask = torch.ones(task.n_train, dtype=torch.float64)
    mask[:4] = 0

    scores = replay.score(task, weights=mask)

    up = mask.clone()
    up[0] = 1e-5
    slope = (replay_values(task, up[None], per_query=True) - replay_values(task, mask[None], per_query=True)) / 1e-5
    torch.testing.assert_close(scores[0], slope[0].float(), rtol=1e-3, atol=1e-5)
