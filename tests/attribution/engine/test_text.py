"""Text as numbers, and the models that take them, against slow formulas."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from attribution.engine import (
    EngineError,
    Recipe,
    Task,
    TensorRecords,
    architectures,
    epoch_order,
    initial_state_from_seed,
    metagradients,
    replay_values,
)
from attribution.engine.projection import Projector
from attribution.engine.store import build_store, final_state
from attribution.engine.text import PAD, VOCABULARY, MeanEmbedding, byte_tokens, hashed_ngrams, next_byte
from attribution.engine.training import train

GPT = {"kind": "gpt", "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}
TEXTS = ["rain again", "a warm day", "grüße!", "x", "joy and more joy than fits here"]


def gpt(seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    return architectures.builder(GPT | options)()


def test_bytes_are_cut_off_and_filled_up():
    tokens = byte_tokens(["é" * 3, "", "ab"], 5)

    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[0xC3, 0xA9, 0xC3, 0xA9, 0xC3], [PAD] * 5, [97, 98, PAD, PAD, PAD]]


def _mix(value: int) -> int:
    most = 2**64 - 1
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ (value >> 33)) * factor & most
    return value ^ (value >> 33)


def _counted(text: str, shortest: int, longest: int, buckets: int) -> list[float]:
    tokens, counts = [PAD, *text.encode(), PAD], [0.0] * buckets
    for n in range(shortest, longest + 1):
        for at in range(len(tokens) - n + 1):
            value = 0xCBF29CE484222325 ^ n
            for token in tokens[at : at + n]:
                value = (value ^ token) * 0x100000001B3 & (2**64 - 1)
            value = _mix(value)
            counts[value % buckets] += -1.0 if value >> 61 & 1 else 1.0
    norm = math.sqrt(sum(count**2 for count in counts)) or 1.0
    return [count / norm for count in counts]


def test_hashed_ngrams_are_the_counts_of_a_loop_over_the_text():
    found = hashed_ngrams(TEXTS, shortest=1, longest=4, buckets=32)

    expected = torch.tensor([_counted(text, 1, 4, 32) for text in TEXTS], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_hashed_ngrams_do_not_depend_on_the_company(monkeypatch):
    together = hashed_ngrams(TEXTS, shortest=2, longest=5, buckets=64)
    monkeypatch.setattr("attribution.engine.text.BLOCK_NUMBERS", 64)

    assert torch.equal(hashed_ngrams(TEXTS, shortest=2, longest=5, buckets=64), together)
    assert torch.equal(hashed_ngrams(TEXTS[2:3], shortest=2, longest=5, buckets=64), together[2:3])
    assert hashed_ngrams(["", "a"], shortest=8, longest=8, buckets=16).abs().sum() == 0


def test_hashed_signs_keep_inner_products_in_expectation():
    """Texts without a common n-gram: positive and negative collisions cancel."""
    rng = np.random.default_rng(0)
    left = ["".join(rng.choice(list("abcdefgh"), 30)) for _ in range(200)]
    right = ["".join(rng.choice(list("stuvwxyz"), 30)) for _ in range(200)]

    products = (
        hashed_ngrams(left, shortest=3, longest=3, buckets=64) * hashed_ngrams(right, shortest=3, longest=3, buckets=64)
    ).sum(1)

    assert abs(float(products.mean())) < 3 * float(products.std()) / math.sqrt(200) + 0.01


def test_mean_embedding_is_the_mean_over_what_is_no_padding():
    model = MeanEmbedding(VOCABULARY, 3)
    tokens = byte_tokens(["ab", "", "abcdef"], 4)

    expected = [
        model.embedding.weight[[97, 98]].mean(0),
        torch.zeros(3),
        model.embedding.weight[[97, 98, 99, 100]].mean(0),
    ]
    torch.testing.assert_close(model(tokens), torch.stack(expected))


def test_next_byte_is_each_texts_own_mean_whatever_stands_beside_it():
    model, tokens = gpt(), byte_tokens(TEXTS, 12)

    found = next_byte(model, (tokens,))

    for text, loss in zip(TEXTS, found, strict=True):
        data = list(text.encode()[:12])
        logits = model(torch.tensor([[PAD, *data[:-1]]]))[0]
        torch.testing.assert_close(loss, cross_entropy(logits, torch.tensor(data)))
    torch.testing.assert_close(next_byte(model, (byte_tokens(TEXTS[3:4], 3),)), found[3:4])


def test_what_comes_later_moves_no_earlier_prediction():
    model = gpt(n_positions=20)
    first, other = (model(byte_tokens([text], 20)) for text in ("the same, then this", "the same, then that"))

    assert torch.equal(first[:, :16], other[:, :16])
    assert not torch.equal(first[:, 17:], other[:, 17:])


def test_an_untrained_gpt_knows_nothing_and_ties_its_head():
    model = gpt(n_embd=32)

    assert next_byte(model, (byte_tokens(TEXTS, 12),)).tolist() == pytest.approx([math.log(VOCABULARY)] * 5, abs=0.15)
    assert model.head.weight is model.token.weight
    assert architectures.count_parameters(GPT | {"n_embd": 32}) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"n_head": 3}, "/n_head"),
        ({"n_layer": 65}, "/n_layer"),
        ({"n_embd": 1_000_000, "n_head": 1}, ""),
        ({"n_embd": 4096, "n_layer": 1, "n_head": 1}, ""),
        ({"n_embd": True}, "/n_embd"),
        ({"vocab_size": 9}, "/vocab_size"),
        ({"dropout": 1.0}, "/dropout"),
    ],
)
def test_a_gpt_beyond_the_list_or_the_limits_is_refused_by_its_place(change, pointer):
    with pytest.raises(EngineError) as refused:
        architectures.builder(GPT | change)

    assert refused.value.pointer == pointer


def test_attention_over_a_long_text_is_counted_before_it_is_built():
    build = architectures.builder(GPT | {"n_positions": 4096})

    with pytest.raises(EngineError, match="numbers for a batch of 64"):
        architectures.check_activations(build, [4096], batch=64, dtype=torch.int64)
    architectures.check_activations(build, [4096], batch=1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("steps", "pointer"),
    [
        ([], ""),
        ([{"kind": "scale", "divide_by": 2}], "/0/kind"),
        ([{"kind": "bytes", "length": 5000}], "/0/length"),
        ([{"kind": "bytes"}], "/0"),
        ([{"kind": "bytes", "length": 4}, {"kind": "scale", "divide_by": 2}], "/1"),
        ([{"kind": "hashed_ngrams", "shortest": 3, "longest": 2, "buckets": 16}], "/0/longest"),
        ([{"kind": "hashed_ngrams", "shortest": 1, "longest": 2, "buckets": 8}], "/0/buckets"),
    ],
)
def test_a_transform_that_makes_no_numbers_of_texts_is_refused(steps, pointer):
    with pytest.raises(EngineError) as refused:
        architectures.transform(steps, TEXTS)

    assert refused.value.pointer == pointer


def test_more_features_than_fit_are_refused_before_a_text_is_read():
    with pytest.raises(EngineError, match="give at most 100, or cite less") as refused:
        architectures.check_features([{"kind": "bytes", "length": 101}], 1_000_000)
    assert refused.value.pointer == "/0/length"

    with pytest.raises(EngineError, match="takes texts"):
        architectures.transform([{"kind": "bytes", "length": 4}], torch.zeros(2, 3, dtype=torch.float64))


def _task(description: dict, *, double: bool = False) -> Task:
    build = architectures.builder(description)
    made = (lambda: build().double()) if double else build
    texts = [f"{word} {n}" for n, word in enumerate(["rain", "joy", "grief", "dance"] * 3)]
    return Task(
        model=made,
        loss=next_byte,
        measurement=next_byte,
        train=TensorRecords(byte_tokens(texts, 8)),
        queries=TensorRecords(byte_tokens(["rain!", "joy!"], 8)),
        recipe=Recipe(
            optimizer="adamw",
            learning_rate=0.01,
            order=epoch_order(12, 4, 2, 0),
            initial_state=initial_state_from_seed(made, 0),
        ),
    )


def test_metagradient_through_a_gpts_training_is_the_slope():
    task = _task(GPT | {"n_layer": 1, "n_embd": 4, "dropout": 0.1}, double=True)

    _, gradient = metagradients(task, torch.full((1, 12), 0.9, dtype=torch.float64))

    steps = 1e-5 * torch.eye(12, dtype=torch.float64)[:2]
    slope = (replay_values(task, 0.9 + steps) - replay_values(task, 0.9 - steps)) / 2e-5
    torch.testing.assert_close(gradient[0, 0, :2], slope, rtol=1e-4, atol=1e-8)


def test_many_runs_of_a_gpt_at_once_are_the_runs_one_by_one():
    task = _task(GPT)
    masks = (torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) < 0.6).float()

    together = replay_values(task, masks)

    torch.testing.assert_close(together, torch.stack([replay_values(task, mask[None])[0] for mask in masks]))


@pytest.mark.parametrize("description", [GPT, GPT | {"n_layer": 1, "n_embd": 64}], ids=["exact", "projected"])
def test_a_gpts_gradients_are_projected_as_autograd_gives_them(description, tmp_path):
    task = _task(description)
    state = final_state(task)
    index = torch.arange(12)
    projector = Projector(task, state, width=2**15 if description is GPT else 1024, seed=0)

    found = projector.gradients(task.train, index, of_loss=True)

    model = task.model()
    model.load_state_dict(train(task).model_state(), strict=False)  # a tied weight is kept once
    model.eval()
    rows = []
    for record in range(12):
        loss = next_byte(model, task.train[index[record : record + 1]])[0]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    exact = torch.stack(rows) @ torch.stack(rows).T
    off = float((found @ found.T - exact).norm() / exact.norm())
    assert off < (0.05 if description is GPT else 0.2)
    assert len(build_store(task, tmp_path, width=64)) == 12
