"""pyDVL's values of a record game, through its own samplers and utility interface. Runs in var/pydvl, where there is no torch.

    python pydvl_values.py ask FOLDER        FOLDER/game.json → FOLDER/SAMPLER.npy: the sets that it wants the value of
    python pydvl_values.py divide FOLDER     and, from FOLDER/SAMPLER.values.npy, FOLDER/SAMPLER.shares.npy, (n,) values

game.json: n (records), budget (runs), seed, none (the value of the empty set), all (of all records; both ends are free).
A sampler is stopped where it asks for a run beyond the budget: what it has computed by then is its answer. Which sets it
asks for does not depend on the values, so they are all known before the first run, and one batched replay serves a sampler.
Sets asked for twice cost one run.
"""

import contextlib
import json
import sys
import warnings
from pathlib import Path

import numpy as np
from pydvl.valuation import Dataset
from pydvl.valuation.methods.banzhaf import MSRBanzhafValuation
from pydvl.valuation.methods.shapley import ShapleyValuation
from pydvl.valuation.samplers import (
    AntitheticOwenSampler,
    AntitheticPermutationSampler,
    MSRSampler,
    PermutationSampler,
    StratifiedSampler,
)
from pydvl.valuation.samplers.owen import UniformOwenStrategy
from pydvl.valuation.samplers.powerset import RandomIndexIteration
from pydvl.valuation.samplers.stratified import ConstantSampleSize, HarmonicSampleSize, RandomSizeIteration
from pydvl.valuation.samplers.truncation import FixedTruncation
from pydvl.valuation.stopping import NoStopping
from pydvl.valuation.utility.base import UtilityBase


class BudgetSpent(Exception):
    pass


class Replayed(UtilityBase):
    """The value of a set of records: what the parent process replayed, or 0 while the sets are being collected."""

    def __init__(self, game, values=None):
        self.game, self.values, self.asked = game, values, {}

    def __call__(self, sample):
        chosen = () if sample is None else tuple(sorted(int(i) for i in sample.subset))
        if len(chosen) == 0:
            return self.game["none"]
        if len(chosen) == self.game["n"]:
            return self.game["all"]
        if chosen not in self.asked:
            if len(self.asked) >= self.game["budget"]:
                raise BudgetSpent
            self.asked[chosen] = len(self.asked)
        return 0.0 if self.values is None else float(self.values[self.asked[chosen]])


def stratified(sizes):
    return lambda n, seed: StratifiedSampler(
        sample_sizes=sizes(n_samples=1),
        sample_sizes_iteration=RandomSizeIteration,
        index_iteration=RandomIndexIteration,
        seed=seed,
    )


SAMPLERS = {
    "permutation": (ShapleyValuation, lambda n, seed: PermutationSampler(seed=seed)),
    "antithetic permutation": (ShapleyValuation, lambda n, seed: AntitheticPermutationSampler(seed=seed)),
    "truncated permutation": (ShapleyValuation, lambda n, seed: PermutationSampler(FixedTruncation(0.5), seed=seed)),
    "antithetic Owen": (
        ShapleyValuation,
        lambda n, seed: AntitheticOwenSampler(
            UniformOwenStrategy(n_samples_outer=1, seed=seed), 1, index_iteration=RandomIndexIteration, seed=seed
        ),
    ),
    "stratified": (ShapleyValuation, stratified(ConstantSampleSize)),
    "stratified, harmonic": (ShapleyValuation, stratified(HarmonicSampleSize)),
    "MSR": (ShapleyValuation, lambda n, seed: MSRSampler(seed=seed)),
    "MSR Banzhaf": (MSRBanzhafValuation, None),
}


def valued(name, utility, n, seed):
    kind, sampler = SAMPLERS[name]
    if sampler is None:
        valuation = kind(utility, NoStopping(), seed=seed, show_warnings=False)
    else:
        valuation = kind(utility, sampler(n, seed), NoStopping(), show_warnings=False)
    with contextlib.suppress(BudgetSpent):
        valuation.fit(Dataset(np.zeros((n, 1)), np.arange(n) % 2))
    result = valuation._result
    return np.nan_to_num(np.array(result.values, float)), valuation.utility


def main(step, folder):
    warnings.simplefilter("ignore")
    game = json.loads((folder / "game.json").read_text())
    for name in SAMPLERS:
        if step == "ask":
            utility = valued(name, Replayed(game), game["n"], game["seed"])[1]
            sets = np.zeros((len(utility.asked), game["n"]), bool)
            for chosen, row in utility.asked.items():
                sets[row, list(chosen)] = True
            np.save(folder / f"{name}.npy", sets)
        else:
            values = np.load(folder / f"{name}.values.npy")
            np.save(folder / f"{name}.shares.npy", valued(name, Replayed(game, values), game["n"], game["seed"])[0])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
