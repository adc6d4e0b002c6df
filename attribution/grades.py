"""The grades of evidence (DESIGN §4): which one a document aims at, and what each means in plain words. Imports no engine."""

from collections.abc import Mapping
from typing import Any

from attribution.models import AttributionResult

Grade = AttributionResult.Grade

#: The weakest evidence first.
GRADES = (Grade.DECLARED, Grade.METERED, Grade.ESTIMATED, Grade.REPLAYED)

#: What a result of this grade was measured by, for a reader who knows nothing of the field.
MEANING: dict[str, str] = {
    Grade.DECLARED: "Distinct records are counted; nothing was measured.",
    Grade.METERED: "While the model was trained, a meter wrote down what each record did at each measured step, and the log was fixed "
    "piece by piece as it grew. Stretches of the training, drawn afterwards, were run again and gave the same weights and the same entries; so "
    "what the log adds up to counts.",
    Grade.ESTIMATED: "From checkpoints of the training, the gradient of every record and the curvature of the training loss say what each record "
    "did for the model’s answers. Nothing was trained again, so the estimate is trusted only as far as such estimates "
    "held in trainings where the truth is known.",
    Grade.REPLAYED: "The training was run again and counterfactual runs measured what the model would have been without some of the records.",
}


def disclosed_grade(document: Mapping[str, Any]) -> Grade:
    """The grade that a document's evidence is for; its schema wants each grade's fields all or none."""
    if "meter" in document:
        return Grade.METERED
    if "recipe" in document:
        return Grade.REPLAYED
    return Grade.ESTIMATED if "checkpoints" in document else Grade.DECLARED
