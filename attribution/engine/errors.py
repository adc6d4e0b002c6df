"""What the engine refuses, and where in its input the cause stands."""


class EngineError(ValueError):
    """A task, recipe, checkpoint or description that cannot be used; the message says what to do.

    `pointer` is a JSON-pointer-like path to the cause, such as `/recipe/order/3/7` or `/layers/2/out_features`.
    """

    def __init__(self, message: str, *, pointer: str = "") -> None:
        super().__init__(f"{pointer}: {message}" if pointer else message)
        self.pointer = pointer
        self.reason = message


class TrainingDiverged(EngineError):
    """A loss, a weight or a measurement stopped being a finite number; `step` says when."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message, pointer=f"/recipe/order/{step}")
        self.step = step
