"""From what was replayed to a value for every record, with draws that show how far it is known.

The surrogate. With all records at one weight t, the metagradient ψ_i(t) = ∂f/∂w_i at w = (t, …, t) answers for all records
at once, and along this diagonal nothing is random: ∫ ψ_i dt is the game's Aumann–Shapley value (1974), whose sum is
f(all) − f(none) exactly. Eight nodes of a golden-ratio sequence in u, t = u^1.5, with straight lines between them, are within
0.006 in TV of sixty-four where training is smooth. It differs from Shapley's value by what random sets have and equal weights have not:
variance. To the second order in the records other than i,

    E_{S~t}[∂f/∂w_i] − ψ_i(t) = t (1 − t) / 2 · Σ_j ∂³f/∂w_i ∂w_j²

and the same sum is what a pair of metagradients at w = t ± δ z, z_j = ±1 at random, shows on average beyond ψ_i(t), times δ². A pair has
no first-order noise, so a few of them around each node tell it. δ = min(t, 1 − t) reaches 0 or 1; what is missing to the variance t (1 − t) is made up
by a factor of at most MAX_WIDENED. A sum over i other than 0 is what this order leaves out, as both games have one total: the
second order e is trusted by (OVERSHOOT · total / that sum)², at most whole and at least LEAST_TRUST, a weight γ. The rule is one of
experience (attribution/README.md). What a record's own weight does at this order is left out: pairs show it too noisily.

Where equal weights change nothing, because Adam or the normalizer "weight" divides them out, the surrogate is taken at
random sets S ~ t instead, averaged over those of like size: ψ_i(u) = Σ_m A_m(u) g_i(S_m). A kept record's slope is then at weight 1,
a dropped one's at 0; weighting them 1/2t and 1/2(1 − t), a trapezoid in the record's own weight, is a second
surrogate, of which e is the difference from the first, and γ = 0.

The correction. Plain replays at random sets, in antithetic twins, give in units of their noise σ(u)

    f(S) = F(u) + Σ_i (s_i − t) (b (ψ_i + γ e_i) + c e_i + d_i)(u) + σ(u) ε                                     (2)

with normal priors: F smooth, b(u) around 1, c around 0, d_i(u) smooth in u. Their
variances are averaged over a grid by the probability of the replays, a step wider costing 3 nats: a few replays move nothing
without evidence, and with more and more the priors lose their say, so that φ tends to Shapley's value whatever the surrogate
(regression-adjusted Monte Carlo, Witter et al. 2025, arXiv:2506.11849). Then

    φ_i = (f(all) − f(none)) / n + mean over sizes of (b (ψ_i + γ e_i) + c e_i + d_i − the same averaged over i).

On the diagonal b keeps within a tenth of 1: the total is already right there, and a slope that replays show at sizes where they
are precise is not the slope at those where most of the value lies.

The intervals. Draws of the queries (folds, with replacement; Student's t, as folds are few), of pairs of metagradients,
and of what the replays leave open about b, c and d: the posterior of (2), mixed over its priors. So the
surrogate's error is in the interval as far as replays have not ruled it out, which redrawing the replays alone would not show. One query
alone cannot be redrawn: then nothing says how far its total is the kind's, and the count pays.

Nothing here looks at owners or groups; they come last, in `Partition`.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attribution.engine.coalitions import KINDS, POWER, Array, Masks, Plan, Players, fold_weights

MAX_GRADIENT_RATIO = 8.0  # a metagradient longer than this times its neighbours' median is scaled down to it
MAX_NODE_RATIO = 32.0  # the same on the diagonal, where slopes at small t and single pairs are far longer by right
MAX_WIDENED = 3.0  # of the second order, to the variance of random sets
OVERSHOOT = 0.1  # of the total: a sum of the second order up to this is no reason to doubt it
LEAST_TRUST = 0.25
LEAST_DOUBT = 0.01  # variance of λ that probes leave, however well they agree
N_REPLICATES = 400
RESOLUTION = 1e-6  # of a measurement: values nearer to each other are one value, rounded
REPLICATE_BLOCK = 50  # so that replicates of a million records need not be held at once
EVIDENCE_LIMIT = 512  # replays that the choice of priors looks at
STUDENT = (
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
)  # 97.5 % points of Student's t at 1..9 degrees of freedom


@dataclass(frozen=True)
class Share:
    """One member of a partition. `share` is raw: signed, summing to 1; `paid_share` is what money follows."""

    owner: int
    share: float
    low: float
    high: float
    paid_share: float
    count_share: float
    n_records: int
    value: float


@dataclass(frozen=True)
class Evidence:
    """All that was measured, in double precision."""

    plan: Plan
    ends: Array  # (2, n_fold): f(all), f(none)
    value_masks: NDArray[np.bool_]  # (M_v, n), of "values", then of "toggles"
    values: Array  # (M_v, n_fold): f by fold
    n_value: int  # how many of M_v are of "values"
    node_u: Array  # (D,), where metagradients were taken that are interpolated: on the diagonal
    nodes: Array  # (D, n)
    spread_u: Array  # (P,)
    spread: Array  # (P, n): what spreading the weights around a node changed of its metagradient, mean of a pair
    gradient_masks: NDArray[np.bool_]  # (M_g, n), random sets, off the diagonal: of "gradients", then of "folds"
    gradients: Array  # (M_g, n)
    n_plain: int  # how many of M_g are of "gradients"
    fold_u: Array  # (M_f,)
    fold_gradients: Array  # (n_fold, M_f, n)
    moved: Array  # (M_p, n): what the probes changed of the weights
    said: Array  # (M_p, n): the metagradients there
    did: Array  # (M_p,): what it did to f
    probe_t: Array  # (M_p,)
    fold_sizes: Array  # (n_fold,)

    @classmethod
    def of(cls, plan: Plan, done: Mapping[int, Mapping[str, NDArray[np.float32]]]) -> "Evidence":
        """From the arrays of each round that is done, by its number."""
        masks, n = Masks(plan), plan.n_player
        numbers = {kind: [j for r in done for j in range(*plan.rounds[r].items[kind])] for kind in KINDS}

        def stacked(kind: str, axis: int = 0) -> Array:
            parts = [arrays[kind] for arrays in done.values() if kind in arrays]
            return np.concatenate(parts, axis).astype(np.float64) if parts else np.zeros((0, 0))

        def weights(kind: str) -> Array:
            return np.array([masks.weights(kind, j) for j in numbers[kind]], np.float64).reshape(-1, n)

        ends = stacked("ends")
        n_query = ends.shape[1]
        Q = fold_weights(n_query, plan.n_fold).numpy()
        sizes = (Q > 0).sum(1).astype(np.float64)

        def mean(kind: str) -> Array:
            return stacked(kind).reshape(-1, n_query).mean(1)

        fold_gradients = stacked("folds", 1) if numbers["folds"] else np.zeros((plan.n_fold, 0, n))
        by_fold = np.einsum("g,gmn->mn", sizes / sizes.sum(), fold_gradients)
        plain, W_folds, W_plain = stacked("gradients").reshape(-1, n), weights("folds"), weights("gradients")
        node_u, nodes, spread_u, spread, masked, gradients = (
            np.zeros(shape) for shape in (0, (0, n), 0, (0, n), (0, n), (0, n))
        )
        if plan.diagonal:
            places = [masks.place(kind, j) for kind in ("folds", "path") for j in numbers[kind]]
            node_u = np.array([masks.node(place) for place in places])
            nodes = np.concatenate([by_fold, stacked("path").reshape(-1, n)])
            row = {place: k for k, place in enumerate(places)}  # of nodes that are measured so far
            around = [row.get(masks.place("gradients", j), -1) for j in numbers["gradients"][::2]]
            pairs, at = np.arange(len(around))[np.array(around, int) >= 0], np.array([k for k in around if k >= 0], int)
            spread_u, spread = node_u[at], (plain[2 * pairs] + plain[2 * pairs + 1]) / 2 - nodes[at]
            # What the probes started from: the nodes, or the first random sets.
            before, said = np.concatenate([W_folds, weights("path")]), nodes
            was = np.concatenate([mean("folds.values"), mean("path.values")])
            start = [row.get(j, -1) for j in numbers["probes"]]
        else:
            masked, gradients = np.concatenate([W_plain, W_folds]), np.concatenate([plain, by_fold])
            before, said, was = W_plain, plain, mean("gradients.values")
            start = [j if j < len(plain) else -1 for j in numbers["probes"]]
        kept = [number for number, k in enumerate(start) if k >= 0]
        origin = np.array([start[number] for number in kept], np.int64)
        values = np.concatenate([stacked(kind).reshape(-1, n_query) for kind in ("values", "toggles")])
        return cls(
            plan=plan,
            ends=ends @ Q.T,
            value_masks=np.concatenate([weights("values"), weights("toggles")]) > 0,
            values=values @ Q.T,
            n_value=len(numbers["values"]),
            node_u=node_u,
            nodes=nodes,
            spread_u=spread_u,
            spread=spread,
            gradient_masks=masked > 0,
            gradients=gradients,
            n_plain=0 if plan.diagonal else len(plain),
            fold_u=node_u[: len(W_folds)] if plan.diagonal else W_folds.mean(1) ** (1 / POWER),
            fold_gradients=fold_gradients,
            moved=weights("probes")[kept] - before[origin],
            said=said[origin],
            did=(mean("probes")[kept] - was[origin]) if kept else np.zeros(0),
            probe_t=before[origin].mean(1),
            fold_sizes=sizes,
        )

    def agreement(self) -> float | None:
        """Correlation of what toggling a few records did with what the metagradient said it would do.

        None where that cannot be told: fewer than four probes, or nothing said and nothing done.
        """
        if len(self.did) < 4:
            return None
        scale = self.probe_t  # effects at small sizes are larger: no single probe should decide
        said, did = (self.moved * self.said).sum(1) * scale, self.did * scale
        if not (said.any() or did.any()):
            return None
        if not (np.isfinite(said).all() and said.any() and did.any()):
            return 0.0
        return float((said @ did) / math.sqrt((said @ said) * (did @ did)))


@dataclass(frozen=True)
class Prior:
    """Variances of (2)'s unknowns, in units of the noise's where no other is said."""

    records: float
    slope: float  # of b around 1
    second: float  # of c
    noise: float


class Division:
    """Equation (2), solved by records. Owners come last, in `Partition`."""

    BANDWIDTH = 0.08  # of the smoother over u of metagradients that are not interpolated
    REACH = 0.3  # over u, of an effect d(u): half of its prior variance is common to all sizes
    SLOPE_GRID = (0.003, 0.03, 0.3, 3.0)  # of b(u) around 1; the first alone on the diagonal, where the total is known
    RECORD_GRID = (0.001, 0.01, 0.1, 1.0, 10.0)  # never 0, or few replays could not contradict the surrogate
    SECOND_GRID = (0.0, 0.05, 0.5)  # of c around 0
    NOISE_GRID = (0.1, 0.3, 1.0)  # of what is noise without effects, that which stays noise with them
    STEP_ODDS = 3.0  # nats that the replays must give for each step to a wider prior
    CURVE_REACH = 0.1  # over u, of F
    APART = 1e6  # the variance of tilted replays in (2): they are predicted, and teach nothing

    def __init__(self, evidence: Evidence) -> None:
        self.e, self.n = evidence, evidence.plan.n_player
        self.weights = evidence.fold_sizes / evidence.fold_sizes.sum()
        ends = evidence.ends @ self.weights
        self.total = float(ends[0] - ends[1])
        self.alone = self.n == 1
        measured = np.concatenate([evidence.ends, evidence.values])
        spread = float(np.ptp(measured, axis=0).max())
        self.still = spread <= RESOLUTION * float(np.abs(measured).max())
        if self.still:
            self.total, self.values = 0.0, np.zeros(self.n)
            return
        if self.alone:
            self.values = np.array([self.total])
            return
        n = self.n
        S = evidence.value_masks.astype(np.float64)
        t = S.mean(1)
        self.u = t ** (1 / POWER)
        centred = S - t[:, None]  # (M_v, n)
        # The integral over sizes: every size, or 2,048 of them where there are more.
        k = np.unique(np.linspace(1, n - 1, min(n - 1, 2048)).round().astype(np.int64))
        self.grid_weight = np.gradient(k.astype(np.float64)) if len(k) > 1 else np.ones(1)
        self.grid_weight /= self.grid_weight.sum()
        grid_t = k / n
        self.grid_u = grid_t ** (1 / POWER)
        self._lay_out_surrogates(centred)

        y = evidence.values @ self.weights - ends[1] - self.total * self.u  # beyond the line between both ends
        x = self._predicted(self.even)
        scale = abs(self.total) if abs(self.total) > 1e-4 * spread else spread
        self.Kf = scale**2 * self._curve_kernel(self.u)
        self.kept_apart = np.where(np.arange(len(y)) < evidence.n_value, 0.0, self.APART)
        self.log_variance = np.array([2 * math.log(0.03 * scale)])
        for _ in range(3):  # the noise's profile and the fit that shows it
            self.noise = self._noise_at(self.u)
            residual = self._left_out(y / self.noise - x[:, 0] / self.noise, self._covariance(x, None)) * self.noise
            twins = residual.reshape(-1, 2)  # their difference: what both miss is F's, and no noise
            difference = (twins[:, 0] - twins[:, 1]) / math.sqrt(2)
            if np.abs(difference).max() <= 1e-7 * scale:  # every twin had its like's value: no noise to learn from
                self.log_variance = np.array([2 * math.log(1e-4 * scale)])
                break
            self.log_variance = _log_variance(self.u[::2], difference)
        self.noise = self._noise_at(self.u)

        # Effects in units of the noise: z has length about 1 at every size.
        self.z = centred / np.sqrt(n * t * (1 - t))[:, None]
        self.K = self._common(self.u, self.u) * (self.z @ self.z.T)
        self.scale = max(float((self.z[: evidence.n_value] ** 2).sum(1).mean()), 1e-12)
        self.K /= self.scale
        self.reach_at = self.grid_weight * self._noise_at(self.grid_u) / np.sqrt(n * grid_t * (1 - grid_t))  # (grid,)
        self.reach = self.reach_at @ self._common(self.grid_u, self.u)  # (M_v,)

        self.x = x / self.noise[:, None]
        self.y = y / self.noise
        self.priors, self.credence = self._weigh_priors()
        self.inverses = [np.linalg.inv(self._covariance(x, prior)) for prior in self.priors]
        self.values = self._values(self.weights[None], self.even[None])[1][0]

    def _lay_out_surrogates(self, centred: Array) -> None:
        """Rows of metagradients; the surrogates at size u are mixtures of them, `_mixtures(u)`."""
        e = self.e
        self.even = np.ones(len(e.spread) if e.plan.diagonal else len(e.gradients))  # none is redrawn
        if e.plan.diagonal:
            first, factor = _tamed(e.nodes, e.node_u, MAX_NODE_RATIO)
            factor = factor[: len(e.fold_u)]
            self.smoothed_u, second, self.trust = e.spread_u, np.zeros((0, self.n)), 0.0
            if len(e.spread):
                t = e.spread_u**POWER
                # Weights reach 0 or 1 but not both: the variance of δ is that of a random set times this.
                narrower = np.minimum(t / (1 - t), (1 - t) / t)
                second, _ = _tamed(
                    e.spread / np.maximum(narrower, 1 / MAX_WIDENED)[:, None], e.spread_u, MAX_NODE_RATIO
                )
                self.trust = self._trusted(first, second)
        else:
            G = e.gradient_masks.astype(np.float64)
            t = G.mean(1, keepdims=True)
            self.smoothed_u = t[:, 0] ** (1 / POWER)
            first, factor = _tamed(e.gradients, self.smoothed_u, MAX_GRADIENT_RATIO)
            second = first * (G / (2 * t) + (1 - G) / (2 * (1 - t)) - 1)
            factor = factor[e.n_plain :]
        self.rows = np.concatenate([first, second])  # (M_r, n)
        self.rows -= self.rows.mean(1, keepdims=True)
        folds = np.where(np.isfinite(e.fold_gradients), e.fold_gradients, 0) * factor[:, None]
        self.folds = folds - folds.mean(2, keepdims=True)
        self.cross = centred @ self.rows.T  # (M_v, M_r)
        if len(e.fold_u):
            cross = np.einsum("vn,gmn->gvm", centred, self.folds)  # (n_fold, M_v, M_f)
            self.fold_predicted = (self._fold_mixture(self.u) * cross).sum(2)  # (n_fold, M_v)

    def _trusted(self, first: Array, second: Array) -> float:
        """How much of the second order to take, by the part of the total that it would add and that is not there."""
        kept = self.grid_weight @ _interpolation(self.grid_u, self.e.node_u) @ first.sum(1)
        added = self.grid_weight @ self._smoothed(self.grid_u, self.even) @ second.sum(1)
        return float(np.clip((OVERSHOOT * kept) ** 2 / max(added**2, 1e-300), LEAST_TRUST, 1.0))

    def _smoothed(self, u: Array, multiplicity: Array) -> Array:
        weights = _kernel(u, self.smoothed_u, self.BANDWIDTH) * multiplicity
        return np.asarray(weights / weights.sum(1, keepdims=True))

    def _mixtures(self, u: Array, multiplicity: Array) -> tuple[Array, Array]:
        """Weights (len(u), M_r) of ψ(u), and of what c multiplies."""
        K = self._smoothed(u, multiplicity) if len(multiplicity) else np.zeros((len(u), 0))
        if not self.e.plan.diagonal:
            return np.hstack([K, 0 * K]), np.hstack([0 * K, K])
        along = _interpolation(u, self.e.node_u)
        return np.hstack([along, self.trust * K]), np.hstack([0 * along, K])

    def _fold_mixture(self, u: Array) -> Array:
        """Weights (len(u), M_f). Few metagradients show how queries differ; they are not redrawn."""
        if self.e.plan.diagonal:
            return _interpolation(u, self.e.fold_u)
        weights = _kernel(u, self.e.fold_u, self.BANDWIDTH)
        return np.asarray(weights / weights.sum(1, keepdims=True))

    def _noise_at(self, u: Array) -> Array:
        """Standard deviation of f(S) at sets of one size, beyond the surrogate."""
        return np.exp(0.5 * np.polyval(self.log_variance, u))

    def _common(self, u: Array, of: Array) -> Array:
        """Prior correlation of an effect at sizes u with itself at others, (len(u), len(of))."""
        return 0.5 + 0.5 * np.exp(-0.5 * ((u[:, None] - of[None]) / self.REACH) ** 2)

    def _curve_kernel(self, u: Array) -> Array:
        """Prior covariance of F, beyond the line between its known ends, with itself at the measured sizes."""
        gap = (u[:, None] - self.u[None]) / self.CURVE_REACH
        return np.exp(-0.5 * gap**2) * _bridge(u)[:, None] * _bridge(self.u)[None]

    def _predicted(self, multiplicity: Array) -> Array:
        """What the surrogates say of f(S) beyond its mean at each size, (M_v, 2)."""
        return np.stack([(A * self.cross).sum(1) for A in self._mixtures(self.u, multiplicity)], 1)

    def _covariance(self, x: Array, prior: Prior | None) -> Array:
        """Of f(S) − the surrogate at the measured masks, in units of the noise; without effects if no prior is given."""
        x = x / self.noise[:, None]
        K = self.Kf / np.outer(self.noise, self.noise)
        K += (prior.slope if prior else 0.1) * self._common(self.u, self.u) * np.outer(x[:, 0], x[:, 0])
        if prior:
            K += prior.second * np.outer(x[:, 1], x[:, 1]) + prior.records * self.K
        K[np.diag_indices_from(K)] += self.kept_apart + (prior.noise if prior else 1.0)
        return K

    def _left_out(self, r: Array, K: Array) -> Array:
        """Errors of predicting each pair of masks from all others, in units of the noise, in closed form.

        With P the inverse of the covariance, what a pair's own data do not explain is P_pair⁻¹ (P r)_pair. Pairs are
        left out whole: a mask's twin has the same size and would give F away.
        """
        P = np.linalg.inv(K)
        m = len(r) // 2
        pairs = P.reshape(m, 2, m, 2)[np.arange(m), :, np.arange(m), :]  # (m, 2, 2)
        return np.linalg.solve(pairs, (P @ r).reshape(m, 2, 1)).reshape(-1)

    def _weigh_priors(self) -> tuple[list[Prior], Array]:
        """The prior variances that explain the replays, each with its posterior probability.

        An average over all that are plausible, not the best one alone: from few replays the best is often the narrowest,
        and intervals would forget that it was chosen.
        """
        m = self.e.n_value // 2
        pairs = np.unique(np.linspace(0, m - 1, min(m, EVIDENCE_LIMIT // 2)).astype(int))
        some = np.stack([2 * pairs, 2 * pairs + 1], 1).reshape(-1)
        block = np.ix_(some, some)
        r = (self.y - self.x[:, 0])[some]
        base = (self.Kf / np.outer(self.noise, self.noise))[block]
        first = self._common(self.u[some], self.u[some]) * np.outer(self.x[some, 0], self.x[some, 0])
        second = np.outer(self.x[some, 1], self.x[some, 1])
        effects = self.K[block]
        grids = (
            self.RECORD_GRID,
            self.SLOPE_GRID[:1] if self.e.plan.diagonal else self.SLOPE_GRID,
            self.SECOND_GRID if np.any(self.x[:, 1]) else self.SECOND_GRID[:1],
        )
        found = []
        for records, slope, c, noise in itertools.product(*grids, self.NOISE_GRID):
            K = base + slope * first + c * second + noise * records * effects
            K[np.diag_indices_from(K)] += noise
            L = np.linalg.cholesky(K)
            half = np.linalg.solve(L, r)
            evidence = -0.5 * float(half @ half) - float(np.log(np.diag(L)).sum())
            steps = sum(grid.index(v) for grid, v in zip(grids, (records, slope, c), strict=True))
            found.append((evidence - self.STEP_ODDS * steps, Prior(noise * records, slope, c, noise)))
        best = max(evidence for evidence, _ in found)
        plausible = [(math.exp(evidence - best), prior) for evidence, prior in found if evidence > best - 6]
        plausible = sorted(plausible, key=lambda one: -one[0])[:16]
        credence = np.array([weight for weight, _ in plausible])
        return [prior for _, prior in plausible], credence / credence.sum()

    def _values(self, weights: Array, multiplicity: Array) -> tuple[Array, Array]:
        """Totals (R,) and records' values (R, n) for R draws of queries (R, n_fold) and of metagradients (R, M_g)."""
        redrawn = multiplicity if multiplicity.size and np.ptp(multiplicity) else multiplicity[:1]
        ends = weights @ self.e.ends.T  # (R, 2)
        totals = ends[:, 0] - ends[:, 1]
        y = weights @ self.e.values.T - ends[:, 1:] - totals[:, None] * self.u  # (R, M_v)
        surrogate = np.stack([self._predicted(m)[:, 0] for m in redrawn])  # (R or 1, M_v)
        if len(self.e.fold_u):
            surrogate = surrogate + (weights - self.weights) @ self.fold_predicted
        r = ((y - surrogate) / self.noise).T  # (M_v, R)
        on_records, on_slope, on_second = 0.0 * r, 0.0 * r, 0.0 * r
        for credence, prior, inverse in zip(self.credence, self.priors, self.inverses, strict=True):
            alpha = credence * (inverse @ r)  # (M_v, R)
            on_records += prior.records * alpha
            on_slope += prior.slope * alpha
            on_second += prior.second * alpha
        slopes = 1 + self._slope(on_slope)  # (R, grid)
        phi = totals[:, None] / self.n + self._effects(on_records)
        mixtures = [self._mixtures(self.grid_u, m) for m in redrawn]
        if len(mixtures) == 1:
            mixed = (self.grid_weight * slopes) @ mixtures[0][0]
            mixed += np.outer(self.x[:, 1] @ on_second, self.grid_weight @ mixtures[0][1])
        else:
            mixed = np.stack([(self.grid_weight * b) @ A for b, (A, _) in zip(slopes, mixtures, strict=True)])
            beyond = np.stack([self.grid_weight @ B for _, B in mixtures])
            mixed += (self.x[:, 1] @ on_second)[:, None] * beyond
        phi += mixed @ self.rows
        if len(self.e.fold_u):
            at = (self.grid_weight * slopes) @ self._fold_mixture(self.grid_u)  # (R, M_f)
            by_fold = (weights - self.weights)[:, :, None] * at[:, None]  # (R, n_fold, M_f)
            phi += by_fold.reshape(len(phi), -1) @ self.folds.reshape(-1, self.n)
        return totals, phi

    def _slope(self, on_slope: Array) -> Array:
        """b(u) − 1 at every size of the integral, (R, grid)."""
        return (self._common(self.grid_u, self.u) @ (self.x[:, :1] * on_slope)).T

    def _effects(self, on_records: Array) -> Array:
        """Records' values (R, n), centred, of effects that are these combinations (M_v, R) of the replays."""
        effects = (self.reach[:, None] * on_records).T @ self.z / self.scale
        return np.asarray(effects - effects.mean(1, keepdims=True))

    def replicates(self, seed: int) -> Iterator[tuple[Array, Array]]:
        """Blocks of draws: totals (R,) and values (R, n), as likely as the estimate given what was measured.

        Queries are redrawn by folds, and by pairs the metagradients that chance is in (a bootstrap); what replays leave open is drawn
        from the posterior of (2), by simulating replays of drawn effects and subtracting the estimate from the simulation
        (Matheron's rule). Few folds know their own spread badly: Student's t.
        """
        e, G = self.e, self.e.plan.n_fold
        rng = np.random.Generator(np.random.PCG64(seed))
        degrees = max(G - 1, 1)
        wider = math.sqrt(G / degrees) * (STUDENT[degrees - 1] if degrees <= len(STUDENT) else 2.2) / 1.96
        for _ in range(N_REPLICATES // REPLICATE_BLOCK):
            drawn = rng.multinomial(G, np.full(G, 1 / G), REPLICATE_BLOCK) * e.fold_sizes
            drawn = drawn / drawn.sum(1, keepdims=True)
            weights = self.weights + wider * (drawn - self.weights)
            if self.still:
                yield np.zeros(REPLICATE_BLOCK), np.zeros((REPLICATE_BLOCK, self.n))
                continue
            if self.alone:
                ends = weights @ e.ends.T
                totals = ends[:, 0] - ends[:, 1]
                yield totals, totals[:, None]
                continue
            totals, phi = self._values(weights, self._redrawn(rng))
            yield totals, phi + self._unexplained(rng)

    def _redrawn(self, rng: np.random.Generator) -> Array:
        """Multiplicities of pairs around the diagonal (R, P), or of metagradients at random sets (R, M_g), those by fold single."""
        m, plain = len(self.smoothed_u), self.e.n_plain
        if m == 0:
            return np.ones((REPLICATE_BLOCK, 0))
        if self.e.plan.diagonal:
            return rng.multinomial(m, np.full(m, 1 / m), REPLICATE_BLOCK).astype(np.float64)
        pairs = np.repeat(rng.multinomial(plain // 2, np.full(plain // 2, 2 / plain), REPLICATE_BLOCK), 2, 1)
        single = rng.multinomial(m - plain, np.full(m - plain, 1 / (m - plain)), REPLICATE_BLOCK) if m > plain else None
        return np.concatenate([pairs, *([] if single is None else [single])], 1).astype(np.float64)

    def _unexplained(self, rng: np.random.Generator) -> Array:
        """(R, n): drawn effects less what the regression makes of their replays."""
        R, m = REPLICATE_BLOCK, len(self.y)
        along, at_grid = self._basis()
        basis = self.reach_at @ at_grid  # (B,)
        out = np.zeros((R, self.n))
        chosen = rng.choice(len(self.priors), R, p=self.credence)
        curve = np.linalg.cholesky(self.Kf + 1e-9 * np.trace(self.Kf) / m * np.eye(m)) / self.noise[:, None]
        first, second = (A @ self.rows for A in self._mixtures(self.grid_u, self.even))  # (grid, n)
        for number in np.unique(chosen):
            prior, inverse = self.priors[number], self.inverses[number]
            rows = np.flatnonzero(chosen == number)
            slope = rng.standard_normal((len(rows), along.shape[1])) * math.sqrt(prior.slope)
            c = rng.standard_normal(len(rows)) * math.sqrt(prior.second)
            # Effects of each record as coefficients over u, (R, n, B).
            on_records = rng.standard_normal((len(rows), self.n, along.shape[1]))
            on_records *= math.sqrt(prior.records / self.scale)
            y = rng.standard_normal((len(rows), m)) * np.sqrt(prior.noise + self.kept_apart)
            y += rng.standard_normal((len(rows), m)) @ curve.T
            y += (slope @ along.T) * self.x[:, 0] + np.outer(c, self.x[:, 1])
            y += np.einsum("vn,rnb,vb->rv", self.z, on_records, along, optimize=True)
            effects = on_records @ basis
            alpha = inverse @ y.T
            slope = slope @ at_grid.T - self._slope(prior.slope * alpha)  # (rows, grid)
            c -= prior.second * (self.x[:, 1] @ alpha)
            out[rows] = effects - effects.mean(1, keepdims=True)
            out[rows] += (self.grid_weight * slope) @ first + np.outer(c, self.grid_weight @ second)
            out[rows] -= self._effects(prior.records * alpha)
        return out

    def _basis(self) -> tuple[Array, Array]:
        """Functions of u, as many as matter, whose random combinations have the covariance of `_common`.

        Returns:
            Their values at the replays, (M_v, B), and at every size of the integral, (grid, B).
        """
        at = np.linspace(0, 1, 33)
        size, vectors = np.linalg.eigh(self._common(at, at))
        kept = size > 1e-4 * size[-1]
        functions = vectors[:, kept] * np.sqrt(size[kept])  # (33, B)
        return _interpolation(self.u, at) @ functions, _interpolation(self.grid_u, at) @ functions

    def reliability(self, agreement: float | None) -> tuple[float, float]:
        """λ: the slope of what happened on what the other replays and the metagradients say, where neither was learned from.

        Over the differences of twins, each pair left out: those that tilt clusters, which nothing is learned from anyhow, and the
        others. Twins have one size, so that whatever depends on the number of records alone, all that counting knows, cancels.
        The two kinds differ in how far off a prediction is, and are weighed by it. A few pairs cannot tell a slope, so what
        the probes showed comes first: λ is the mean of the posterior from a slope around their correlation ρ, of variance
        1 − ρ², which makes it the weight that errs least in the mean square. It is cut off at 0 and 1.

        Returns:
            λ, and the slope before it is cut off.
        """
        if self.still or self.alone or len(self.y) - self.e.n_value < 4:
            return 0.0, 0.0
        r = self.y - self.x[:, 0]
        x = self.x * self.noise[:, None]
        left_out = sum(
            credence * self._left_out(r, self._covariance(x, prior))
            for credence, prior in zip(self.credence, self.priors, strict=True)
        )
        happened, error = (v[::2] - v[1::2] for v in (self.y, np.asarray(left_out)))
        said, tilted = happened - error, np.arange(len(error)) >= self.e.n_value // 2
        least = 2 * sum(c * prior.noise for c, prior in zip(self.credence, self.priors, strict=True))
        rho = min(1.0, max(0.0, agreement or 0.0))
        precision = 1 / max(1 - rho**2, LEAST_DOUBT)
        slope = rho * precision
        for kind in (tilted, ~tilted):
            noise = max(least, float((error[kind] ** 2).mean())) if kind.any() else 1.0
            precision += float(said[kind] @ said[kind]) / noise
            slope += float(said[kind] @ happened[kind]) / noise
        slope /= precision
        self.explained = 1 - float((error[tilted] ** 2).sum()) / max(float(happened[tilted] @ happened[tilted]), 1e-300)
        return min(1.0, max(0.0, slope)), slope

    def details(self) -> dict[str, Any]:
        if self.still or self.alone:
            return {}
        best = self.priors[0]
        return {
            "surrogate": "diagonal" if self.e.plan.diagonal else "random sets",
            "trust": self.trust if len(self.e.spread) else None,  # in the second order around the diagonal
            "prior": asdict(best),
            "explained": getattr(self, "explained", None),  # of the variance between twins, left out
        }


class Partition:
    """Members who own records: values and their draws, summed."""

    def __init__(self, name: str, ids: Tensor, players: Players, division: Division) -> None:
        self.name, self.division = name, division
        members, position = torch.unique(ids, return_inverse=True)
        self.members = members.numpy()
        of_player = position[players.records].numpy()
        self.counts = np.bincount(of_player, minlength=len(members)).astype(np.float64)
        self.sums: Array = np.bincount(of_player, division.values, len(members)).astype(np.float64)
        self.order = np.argsort(of_player, kind="stable")
        self.present, self.starts = np.unique(of_player[self.order], return_index=True)
        self.drawn: list[Array] = []

    def add(self, drawn: Array, totals: Array) -> None:
        """A block of draws: values (R, n), totals (R,). A total of exactly 0 is divided by count."""
        shares = np.zeros((len(drawn), len(self.members)))
        sums = np.add.reduceat(drawn[:, self.order], self.starts, 1)
        shares[:, self.present] = sums / np.where(totals, totals, 1)[:, None]
        shares[totals == 0] = self.counts / self.counts.sum()
        self.drawn.append(shares)

    def table(self, trust: float) -> tuple[list[Share], Array]:
        """Every member's share, and the draws (R, n_member), moved to have the estimate as their mean."""
        total = self.division.total
        count = self.counts / self.counts.sum()
        point = self.sums / total if total else count
        drawn = np.concatenate(self.drawn)
        drawn = drawn + point - drawn.mean(0)
        blended = np.maximum(trust * point + (1 - trust) * count, 0)
        paid = blended / blended.sum()
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        if self.division.still:
            low, high = np.zeros_like(point), np.ones_like(point)
        return [
            Share(
                owner=int(self.members[j]),
                share=float(point[j]),
                low=float(low[j]),
                high=float(high[j]),
                paid_share=float(paid[j]),
                count_share=float(count[j]),
                n_records=int(self.counts[j]),
                value=float(self.sums[j]),
            )
            for j in range(len(self.members))
        ], drawn


def _interpolation(at: Array, of: Array) -> Array:
    """Weights (len(at), len(of)) of the straight lines between points `of`; constant beyond the outermost."""
    order = np.argsort(of, kind="stable")
    points = of[order]
    right = np.clip(np.searchsorted(points, at), 1, max(len(of) - 1, 1))
    weights = np.zeros((len(at), len(of)))
    rows = np.arange(len(at))
    if len(of) == 1:
        return np.ones_like(weights)
    part = np.clip((at - points[right - 1]) / np.maximum(points[right] - points[right - 1], 1e-300), 0, 1)
    weights[rows, order[right - 1]] += 1 - part
    weights[rows, order[right]] += part
    return weights


def _bridge(u: Array) -> Array:
    """1 inside, falling to 0 at both ends, where F is measured."""
    return np.sqrt(1 - (2 * u - 1) ** 6)


def _log_variance(u: Array, residual: Array) -> Array:
    """Coefficients of log variance, a polynomial in u; the mean of log χ²₁ is −1.27."""
    squares = residual**2
    degree = min(2, len(u) // 8)
    log = np.log(squares + 0.01 * squares.mean() + 1e-300)  # the few that happen to be near 0 must not decide
    coefficients = np.polyfit(u, log, degree)
    coefficients[-1] += math.log(squares.mean() / np.exp(np.polyval(coefficients, u)).mean() + 1e-300)
    return coefficients


def _kernel(at: Array, of: Array, width: float) -> Array:
    """Weights (len(at), len(of)) of a kernel average; its far tail only counts where nothing is near."""
    gap = (at[:, None] - of[None]) / width
    return np.exp(-0.5 * gap**2) + 1e-6 / (1 + gap**2)


def _tamed(gradients: Array, u: Array, ratio: float) -> tuple[Array, Array]:
    """Scale a metagradient far longer than those at neighbouring sizes down to a multiple of their median length.

    Where training is chaotic a few derivatives explode. Any surrogate leaves (2) unbiased; a wild one leaves it noisy.

    Returns:
        The metagradients (M, n), and what each was multiplied by, (M,).
    """
    length = np.linalg.norm(np.where(np.isfinite(gradients), gradients, 0), axis=1)
    usual = np.array([np.median(length[np.argsort(np.abs(u - at), kind="stable")[:9]]) for at in u])
    factor = np.minimum(1, ratio * usual / np.maximum(length, 1e-300))
    return np.where(np.isfinite(gradients), gradients, 0) * factor[:, None], factor
