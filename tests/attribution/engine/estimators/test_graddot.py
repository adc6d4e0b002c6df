import torch

from attribution.engine import train
from attribution.engine.estimators import graddot


def slow_gradient(task, function, records, index, state):
    model = task.model()
    model.load_state_dict(state)
    function(model, records[torch.tensor([index])])[0].backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def test_graddot_matches_a_slow_loop(make_task, monkeypatch):
    task = make_task()
    run = train(task)
    monkeypatch.setattr("attribution.engine.gradients.BLOCK_BYTES", 3 * 8 * 43)  # blocks of three

    scores = graddot.score(task, state=run.state)

    for i in range(task.n_train):
        g = slow_gradient(task, task.loss, task.train, i, run.model_state())
        for q in range(task.n_query):
            expected = g @ slow_gradient(task, task.measurement, task.queries, q, run.model_state())
            torch.testing.assert_close(scores[i, q], expected.float())


def test_graddot_trains_first_and_gives_copies_one_score(make_task):
    copies = torch.tensor([0, 1, 2, 1, 4, 5, 6, 7, 8, 9])
    task = make_task(task={"copy_of": copies})

    scores = graddot.score(task)

    assert scores.shape == (task.n_train, task.n_query)
    assert scores.dtype == torch.float32
    assert scores[3].eq(0).all() and scores[1].ne(0).all()
    torch.testing.assert_close(scores, graddot.score(task, state=train(task).state))
