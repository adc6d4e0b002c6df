"""Where training on half of the data would have ended, read off one checkpoint: the weights rewound towards their start.

Leaving out half of the records is no small step. With every record at a weight t, training ends at θ_t, nearer to where it
began; there a record that the finished model has long learnt still has a gradient, and still matters. Owen's multilinear
extension (1972), whose derivatives along this diagonal are what values are integrals of, has influence functions (Koh & Liang
2017, arXiv:1703.04730) at one end, t = 1:

    score at θ_t = (1/n) g_i(θ_t)ᵀ (t H(θ_t) + 1/τ)⁻¹ g_q(θ_t)

Nobody says how much will be left out, so both t = 1 and t = ½ count, brought to one length; the sum of two vectors of one
length correlates equally with both, and neither few nor many records are favoured:

    score = ½ (s_1 + s_½ ‖s_1‖ / ‖s_½‖)

θ_1 is the checkpoint. θ_½ costs no training: where the loss is quadratic with curvature H, and training began at θ₀ and
lasted for τ, the checkpoint's age (`checkpoints.age`), it follows in closed form, for a ridge or for gradient flow:

    θ_t = argmin t L(θ) + ‖θ − θ₀‖² / 2τ     θ_1 − θ_t = (1 − t) (1 + tτH)⁻¹ (θ_1 − θ₀)                    (`trak`)
    θ_t = gradient flow for the time tτ      θ_1 − θ_t = (e^{−tτH} − e^{−τH}) (1 − e^{−τH})⁻¹ (θ_1 − θ₀)   (`ekfac`)

Flat directions go back to t of their way; steep ones, which had settled long before, stay where they are. (Damping as early
stopping is SOURCE's: Bae et al. 2024, arXiv:2405.12186.) θ₀ is the recipe's, or without one what the model is built with, in
expectation (`checkpoints.expected_start`).

Assumes that training began there. A model that was tuned from other weights than build() gives would be broken by going back
to those, and that is seen: on either path the loss is convex in t, so that it is at most

    L(θ_t) ≤ (1 − t) L(θ₀) + t L(θ_1)

Where it is more, the checkpoint stands alone, and the report says so.
"""

import torch
from torch import Tensor

from attribution.engine.checkpoints import expected_start
from attribution.engine.devices import moved
from attribution.engine.gradients import block_rows
from attribution.engine.training import Program, State, Tensors, preserved_generator

PARTS = (0.5, 1.0)
HALF = PARTS[0]


def way(program: Program, state: State, start: Tensors | None) -> Tensors:
    """θ_1 − θ₀, per parameter (1, *shape); θ₀ by expectation where it is not known."""
    origin = expected_start(program)[0] if start is None else start
    return {name: p - origin[name][None] for name, p in state.parameters.items()}


def joined(whole: Tensor, half: Tensor) -> Tensor:
    """The scores at t = 1 and at t = HALF, (n_train, n_query) each, as one."""
    length = half.norm()
    return (whole + half * (whole.norm() / length)) / 2 if length > 0 else whole


def rewound(program: Program, state: State, back: Tensors, start: Tensors | None) -> tuple[State | None, str]:
    """The state θ_1 − `back`, or None where the loss there is not what going back would give; and why, for the report.

    Args:
        back: θ_1 − θ_t for t = HALF, per parameter (1, *shape).
        start: θ₀ where it is known; None: what the model is built with.
    """
    if start is None:
        origin, _, deviation = expected_start(program)
        first, how = (
            {name: p + deviation[name] for name, p in origin.items()},
            "the values that the model is built with",
        )
    else:
        first, how = start, "the recipe's start"
    found = _with(state, {name: p - back[name] for name, p in state.parameters.items()})
    losses = [mean_loss(program, s) for s in (_with(state, {n: p[None] for n, p in first.items()}), found, state)]
    said = f"mean loss {losses[1]:.3g}, between {losses[0]:.3g} at the start and {losses[2]:.3g}"
    if not losses[1] <= (1 - HALF) * losses[0] + HALF * losses[2]:
        return None, f"not towards {how}, from where training can hardly have begun: {said}"
    return found, f"towards {how}: {said}"


def mean_loss(program: Program, state: State) -> float:
    """Of the training records, in eval mode."""
    module = program.module.train()  # its own flag: the loss, not the measurement
    module.model.eval()
    tensors = {f"model.{n}": t for n, t in state.frozen.items()}
    tensors |= {f"model.{n}": t[0] for n, t in (state.parameters | state.buffers).items()}
    n, total = program.task.n_train, 0.0
    with torch.no_grad(), preserved_generator():
        for index in torch.arange(n).split(block_rows(program, state)):
            batch = moved(program.task.train[index], program.device)
            total += float(torch.func.functional_call(module, tensors, (batch,)).double().sum())
    return total / n


def _with(state: State, parameters: Tensors) -> State:
    cast = {name: p.to(state.parameters[name].dtype) for name, p in parameters.items()}
    return State(state.step, cast, state.buffers, state.moments, state.frozen)
