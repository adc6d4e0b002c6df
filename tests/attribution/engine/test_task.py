import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from attribution.engine import EngineError, Recipe, TensorRecords, epoch_order, initial_state_from_seed
from attribution.engine.task import seed_of

NAN = float("nan")


def test_epoch_order_shows_every_record_once_an_epoch_and_repeats_by_seed():
    order = epoch_order(10, 4, 3, seed=5)

    assert order.shape == (9, 4)
    for epoch in order.reshape(3, 12):
        assert sorted(epoch[epoch >= 0].tolist()) == list(range(10))
        assert epoch[-2:].tolist() == [-1, -1]
    assert torch.equal(order, epoch_order(10, 4, 3, seed=5))
    assert not torch.equal(order, epoch_order(10, 4, 3, seed=6))
    assert torch.equal(order[:3], epoch_order(10, 4, 1, seed=5))


def test_epoch_order_is_the_rule_it_says():
    generator = torch.Generator().manual_seed(seed_of("order", 5, 0))

    assert epoch_order(10, 5, 1, seed=5).flatten().tolist() == torch.randperm(10, generator=generator).tolist()


def test_an_initial_state_is_drawn_from_its_seed_alone():
    def build():
        return nn.Linear(3, 2)

    torch.manual_seed(1)
    first = initial_state_from_seed(build, 7)
    torch.manual_seed(2)

    assert all(torch.equal(first[name], t) for name, t in initial_state_from_seed(build, 7).items())
    assert not torch.equal(first["weight"], initial_state_from_seed(build, 8)["weight"])


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"optimizer": "lion"}, "/recipe/optimizer"),
        ({"options": {"betas": (0.9, 0.9)}}, "/recipe/options/betas"),
        ({"options": {"momentum": -0.1}}, "/recipe/options/momentum"),
        ({"options": {"nesterov": True}}, "/recipe/options/nesterov"),
        ({"optimizer": "adam", "options": {"momentum": 0.9}}, "/recipe/options/momentum"),
        ({"optimizer": "adam", "options": {"betas": (0.9, 1.0)}}, "/recipe/options/betas"),
        ({"optimizer": "adam", "options": {"eps": 0.0}}, "/recipe/options/eps"),
        ({"learning_rate": NAN}, "/recipe/learning_rate"),
        ({"learning_rate": -0.1}, "/recipe/learning_rate"),
        ({"learning_rate": torch.ones(3)}, "/recipe/learning_rate"),
        ({"learning_rate": torch.tensor([0.1, 0.1, -1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])}, "/recipe/learning_rate/2"),
        ({"groups": [("(", {})]}, "/recipe/groups/0/0"),
        ({"groups": [("weight", {"lr": 0.1})]}, "/recipe/groups/0/1/lr"),
        ({"groups": [("nothing_like_it", {})]}, "/recipe/groups/0/0"),
        ({"normalizer": "mean"}, "/recipe/normalizer"),
        ({"clip_norm": 0.0}, "/recipe/clip_norm"),
        ({"seed": 1.5}, "/recipe/seed"),
        ({"order": torch.zeros(3, dtype=torch.int64)}, "/recipe/order"),
        ({"order": torch.tensor([[0, 1], [2, -2]])}, "/recipe/order/1/1"),
        ({"order": torch.tensor([[0, 1], [10, 2]])}, "/recipe/order/1/0"),
        ({"initial_state": {}}, "/recipe/initial_state/0.weight"),
    ],
)
def test_a_recipe_is_refused_by_the_place_of_its_fault(make_task, change, pointer):
    with pytest.raises(EngineError) as refused:
        make_task(**({"options": {}} | change))

    assert refused.value.pointer == pointer


def test_a_state_of_another_shape_or_with_nan_is_refused(make_task):
    task = make_task()
    state = dict(task.recipe.initial_state)

    for changed in (state["0.bias"][:2], state["0.bias"].float(), torch.full_like(state["0.bias"], NAN)):
        with pytest.raises(EngineError) as refused:
            make_task(initial_state=state | {"0.bias": changed})
        assert refused.value.pointer == "/recipe/initial_state/0.bias"


def test_a_task_is_refused_by_the_place_of_its_fault(make_task):
    n, batch_norm = 10, lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    ids, x, y = torch.zeros(n, dtype=torch.int64), torch.randn(n, 4).double(), torch.zeros(n, dtype=torch.int64)
    broken = x.clone()
    broken[4, 1] = NAN
    cases = [
        ({"owner": ids[:3]}, "/owner"),
        ({"owner": ids.float()}, "/owner"),
        ({"owner": ids - 1}, "/owner/0"),
        ({"groups": {"labeller": ids - 2}}, "/groups/labeller/0"),
        ({"copy_of": torch.tensor([0, 0, 1, 3, 4, 5, 6, 7, 8, 9])}, "/copy_of/2"),
        ({"copy_of": torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 10])}, "/copy_of/9"),
        ({"queries": TensorRecords(x[:0], y[:0])}, "/queries"),
        ({"train": TensorRecords(broken, y)}, "/train/4/0"),
        ({"checkpoints": [(5, "a"), (3, "b")]}, "/checkpoints/1/0"),
        ({"checkpoints": [(99, "a")]}, "/checkpoints/0/0"),
    ]
    for change, pointer in cases:
        with pytest.raises(EngineError) as refused:
            make_task(task=change)
        assert refused.value.pointer == pointer
    with pytest.raises(EngineError, match="BatchNorm"):
        make_task(build=batch_norm)


def test_nobody_is_an_owner_in_a_group_only(make_task):
    assert make_task(task={"groups": {"labeller": torch.full((10,), -1)}}).groups["labeller"].eq(-1).all()


def test_a_task_is_known_by_what_was_trained_not_by_who_owns_it(make_task):
    task = make_task()
    x, y = task.train[torch.arange(task.n_train)]

    assert replace(task, owner=torch.arange(10)).digest == task.digest
    assert replace(task, train=TensorRecords(x, (y + 1) % 3)).digest != task.digest
    assert make_task(seed=1).digest != task.digest
    assert make_task(learning_rate=0.2).digest != task.digest


def test_the_first_matching_group_wins():
    recipe = Recipe(
        optimizer="adam",
        learning_rate=0.1,
        order=torch.tensor([[0], [0]]),
        initial_state={},
        options={"eps": 1e-6},
        groups=[("bias", {"weight_decay": 0.5, "learning_rate": torch.tensor([0.3, 0.2])}), (".*", {"eps": 1e-3})],
    )

    options, rates = recipe.options_for("0.bias")
    assert options == {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.5}
    assert rates == pytest.approx([0.3, 0.2])
    assert recipe.options_for("0.weight") == ({"betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.0}, [0.1, 0.1])


def test_the_digest_tells_checkpoints_apart_and_reads_records_in_passing(make_task, tmp_path):
    task = make_task()
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(path.name.encode())
    digests = {replace(task, checkpoints=[(1, path)]).digest for path in paths} | {task.digest}
    assert len(digests) == 3
    with pytest.raises(EngineError, match="/checkpoints/0"):
        _ = replace(task, checkpoints=[(1, tmp_path / "missing")]).digest

    class Many:
        """A gigabyte of records that exist only while they are looked at."""

        def __init__(self):
            self.live = self.most = 0

        def __len__(self):
            return 40_960

        def __getitem__(self, index):
            x = torch.zeros(len(index), 4, dtype=torch.float64)
            self.live += 1
            self.most = max(self.most, self.live)
            weakref.finalize(x, lambda: setattr(self, "live", self.live - 1))
            return x, torch.zeros(len(index), dtype=torch.int64)

    many = Many()
    assert len(replace(task, train=many).digest) == 64
    assert many.most <= 2
