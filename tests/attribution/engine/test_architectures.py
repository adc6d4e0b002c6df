import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from attribution.engine import EngineError
from attribution.engine.architectures import (
    builder,
    check_activations,
    count_parameters,
    load_state,
    per_record,
    transform,
)

LINEAR = {"kind": "linear", "in_features": 64, "out_features": 10}


def sequential(*layers):
    return {"kind": "sequential", "layers": list(layers)}


def test_a_description_becomes_the_module_it_says():
    description = sequential(
        {"kind": "unflatten", "shape": [1, 8, 8]},
        {"kind": "conv2d", "in_channels": 1, "out_channels": 4, "kernel_size": 3, "padding": 1},
        {"kind": "relu"},
        {"kind": "max_pool2d", "kernel_size": 2},
        {"kind": "flatten"},
        {"kind": "layer_norm", "normalized_shape": 64},
        {"kind": "dropout", "p": 0.1},
        {"kind": "linear", "in_features": 64, "out_features": 10, "bias": False},
    )

    model = builder(description)()

    assert [type(layer) for layer in model] == [
        nn.Unflatten, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten, nn.LayerNorm, nn.Dropout, nn.Linear,
    ]  # fmt: skip
    assert model(torch.zeros(3, 64)).shape == (3, 10)
    assert count_parameters(description) == sum(p.numel() for p in model.parameters()) == 40 + 128 + 640


@pytest.mark.parametrize(
    ("description", "pointer"),
    [
        ({"kind": "rnn", "layers": [LINEAR]}, "/kind"),
        ({"kind": "gpt", "layers": [LINEAR]}, "/layers"),
        ({"kind": "sequential", "layers": [LINEAR], "code": "x"}, "/code"),
        (sequential(), "/layers"),
        (sequential(*[{"kind": "relu"}] * 65), "/layers"),
        (sequential({"kind": "lambda"}), "/layers/0/kind"),
        (sequential(LINEAR, "relu"), "/layers/1/kind"),
        (sequential({"kind": "linear", "in_features": 4}), "/layers/0/out_features"),
        (sequential(LINEAR | {"device": "cuda"}), "/layers/0/device"),
        (sequential(LINEAR | {"in_features": -1}), "/layers/0/in_features"),
        (sequential(LINEAR | {"in_features": True}), "/layers/0/in_features"),
        (sequential(LINEAR | {"in_features": "64"}), "/layers/0/in_features"),
        (sequential(LINEAR | {"in_features": 10**12}), "/layers/0/in_features"),
        (sequential({"kind": "dropout", "p": 1.5}), "/layers/0/p"),
        (sequential({"kind": "relu"}, LINEAR | {"in_features": 10**6, "out_features": 10**6}), "/layers/1"),
        (sequential({"kind": "embedding", "num_embeddings": 10**6, "embedding_dim": 51}), "/layers/0"),
    ],
)
def test_what_is_not_on_the_list_is_refused_by_its_place(description, pointer):
    with pytest.raises(EngineError) as refused:
        builder(description)

    assert refused.value.pointer == pointer


def test_many_layers_under_the_limit_are_refused_together():
    layer = {"kind": "linear", "in_features": 4000, "out_features": 4000}

    assert count_parameters(sequential(*[layer] * 3)) == 3 * (4000**2 + 4000)
    with pytest.raises(EngineError, match="parameters") as refused:
        builder(sequential(*[layer] * 4))
    assert refused.value.pointer == "/layers/3"


def test_transforms_are_applied_in_order():
    content = torch.tensor([[0.0, 16.0], [8.0, 4.0]], dtype=torch.float64)

    features = transform(
        [{"kind": "scale", "divide_by": 16}, {"kind": "standardize", "mean": [0.5, 0.25], "std": 0.5}], content
    )

    assert features.dtype == torch.float32
    assert features.tolist() == [[-1.0, 1.5], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("step", "pointer"),
    [
        ({"kind": "eval"}, "/0/kind"),
        ({"kind": "scale"}, "/0"),
        ({"kind": "scale", "divide_by": 0}, "/0/divide_by"),
        ({"kind": "scale", "divide_by": float("nan")}, "/0/divide_by"),
        ({"kind": "standardize", "mean": [1, 2, 3], "std": 1}, "/0/mean"),
    ],
)
def test_a_transform_that_is_not_allowed_is_refused(step, pointer):
    with pytest.raises(EngineError) as refused:
        transform([step], torch.zeros(4, 2, dtype=torch.float64))

    assert refused.value.pointer == pointer


def test_a_model_of_few_parameters_that_would_fill_the_memory_is_refused_on_paper():
    padded = {
        "kind": "sequential",
        "layers": [
            {"kind": "unflatten", "shape": [1, 8, 8]},
            {"kind": "conv2d", "in_channels": 1, "out_channels": 1, "kernel_size": 1, "padding": 20_000},
            {"kind": "flatten"},
        ],
    }
    small = builder({"kind": "sequential", "layers": [{"kind": "linear", "in_features": 64, "out_features": 10}]})

    with pytest.raises(EngineError, match=r"1\.6e\+09 numbers for a batch of 1; at most 200,000,000") as refused:
        check_activations(builder(padded), [64], batch=1)
    assert refused.value.pointer == "/layers/1"
    check_activations(small, [64], batch=20_000_000)
    with pytest.raises(EngineError, match="for a batch of 20000001"):
        check_activations(small, [64], batch=20_000_001)
    with pytest.raises(EngineError, match="does not take what comes to it") as refused:
        check_activations(small, [63], batch=1)
    assert refused.value.pointer == "/layers/0"


def test_losses_are_per_record_and_from_the_list():
    model, batch = nn.Linear(3, 4), (torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0]))

    expected = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    assert torch.equal(per_record("cross_entropy")(model, batch), expected)
    assert per_record("squared_error")(model, batch).shape == (5,)
    with pytest.raises(EngineError, match="not allowed"):
        per_record("accuracy")


def test_a_state_must_be_the_models(tmp_path):
    path, expected = tmp_path / "state.safetensors", {"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.int64)}

    def saved(tensors):
        save_file(tensors, path)
        return path

    assert load_state(saved(expected), expected=expected).keys() == expected.keys()
    for tensors, message in (
        ({"a": torch.zeros(2)}, "lacks the tensor 'b'"),
        (expected | {"a": torch.zeros(3)}, "'a' is"),
        (expected | {"a": torch.zeros(2).double()}, "float64"),
        (expected | {"c": torch.zeros(1)}, "'c', which the model does not"),
    ):
        with pytest.raises(EngineError, match=message):
            load_state(saved(tensors), expected=expected)


def test_a_pickle_by_another_name_is_never_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"weight": torch.zeros(2)}, path)

    with pytest.raises(EngineError, match="not a safetensors file"):
        load_state(path)
