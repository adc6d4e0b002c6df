"""Which records made a model what it is: a library and a command line of its own, in plain torch."""

from attribution.engine.errors import EngineError, TrainingDiverged
from attribution.engine.meter import Meter, meter_callback
from attribution.engine.task import (
    Batch,
    Recipe,
    Records,
    Task,
    TensorRecords,
    epoch_order,
    initial_state_from_seed,
    without_copies,
)
from attribution.engine.training import TrainedRun, metagradients, replay_values, train

__all__ = [
    "Batch",
    "EngineError",
    "Meter",
    "Recipe",
    "Records",
    "Task",
    "TensorRecords",
    "TrainedRun",
    "TrainingDiverged",
    "epoch_order",
    "initial_state_from_seed",
    "metagradients",
    "meter_callback",
    "replay_values",
    "train",
    "without_copies",
]
