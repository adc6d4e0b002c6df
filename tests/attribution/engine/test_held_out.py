import pytest
import torch
from scipy.stats import spearmanr

from attribution.engine import replay_values
from attribution.engine.estimators import replay
from attribution.engine.held_out import DROPPED, MASKS, best, held_out, linear_datamodeling_score
from attribution.engine.training import Program


def test_the_score_is_spearmans_rho_averaged_over_queries():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(8, 3, generator=generator)
    kept = (torch.rand(20, 8, generator=generator) < 0.6).float()
    kept[1] = kept[0]  # a tie
    f = (kept @ scores + 0.5 * torch.randn(20, 3, generator=generator)).double()

    expected = [spearmanr((kept.double() @ scores.double())[:, q], f[:, q]).statistic for q in range(3)]
    assert linear_datamodeling_score(scores, kept, f) == pytest.approx(sum(expected) / 3)


def test_masks_drop_copies_together_and_values_are_the_replays(make_task):
    copies = torch.tensor([0, 1, 2, 1, 4, 5, 6, 7, 8, 9])
    task = make_task(task={"copy_of": copies})

    held = held_out(task, Program(task))

    assert held.run_equivalents == len(DROPPED) * MASKS + 1
    for kept, values in zip(held.kept, held.values, strict=True):
        assert torch.equal(kept[:, 1], kept[:, 3])
        torch.testing.assert_close(values, replay_values(task, kept, per_query=True))
    assert held.kept[0].ne(held.kept[0][0]).any()


def test_the_better_candidate_is_chosen_and_its_unit_found(make_task):
    task = make_task(n_train=30, batch=10)
    held = held_out(task, Program(task))
    good = replay.score(task)

    others = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    chosen, scores, agreements = best(iter([others, good, -good]), held)

    assert chosen == 1 and scores is good and agreements[1] > 0.8 and agreements[2] == pytest.approx(-agreements[1])
    assert held.slope(good / 7) == pytest.approx(7 * held.slope(good))
    assert held.slope(good) == pytest.approx(1, abs=0.3)
