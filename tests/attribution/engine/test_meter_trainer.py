"""The Hugging Face callback against the plain loop, on models built here from a configuration: nothing is fetched."""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attribution.engine import EngineError, Meter, meter_callback
from attribution.engine.meter_log import entries, totals, verify_log

transformers = pytest.importorskip("transformers", reason="an optional dependency")

N_TRAIN, N_QUERY, B = 24, 6, 4


def gpt2(**changes) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=17,
        n_positions=8,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | changes,
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=17,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def texts(n: int) -> Tensor:
    return torch.randint(17, (N_TRAIN + N_QUERY, 8), generator=torch.Generator().manual_seed(1))[:n]


class Examples(torch.utils.data.Dataset):
    def __init__(self, kind: str, start: int, stop: int, *, numbered: bool = True) -> None:
        self.kind, self.numbers, self.numbered = kind, range(start, stop), numbered

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: int) -> dict:
        number = self.numbers[at]
        ids = texts(N_TRAIN + N_QUERY)[number]
        example = {"input_ids": ids, "labels": ids if self.kind == "gpt2" else int(ids[0]) % 3}
        return example | ({"record_id": number} if self.numbered else {})


def per_text(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits
    if logits.ndim == 2:
        return cross_entropy(logits, batch["labels"], reduction="none")
    return cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none").mean(1)


def trainer(tmp_path: Path, model: nn.Module, kind: str, callback, *, numbered: bool = True, **arguments):
    options = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": B,
        "max_steps": 8,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.5,
        "weight_decay": 0.01,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "remove_unused_columns": False,
        "seed": 5,
    }
    found = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**(options | arguments)),
        train_dataset=Examples(kind, 0, N_TRAIN, numbered=numbered),
        eval_dataset=Examples(kind, N_TRAIN, N_TRAIN + N_QUERY),
    )
    found.add_callback(callback)
    return found


def settings(tmp_path: Path, kind: str) -> dict:
    return {
        "measurement": per_text,
        "queries": Examples(kind, N_TRAIN, N_TRAIN + N_QUERY),
        "n_train": N_TRAIN,
        "log": tmp_path / "trainer.meter",
        "every": 1,
    }


class Dictionaries:
    """Queries for the plain loop, as the Trainer's collator makes them."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Tensor) -> dict[str, Tensor]:
        batch = transformers.default_data_collator([self.examples[int(i)] for i in index])
        return {key: batch[key] for key in ("input_ids", "labels")}


@pytest.mark.parametrize(("kind", "build"), [("gpt2", gpt2), ("bert", bert)])
def test_the_callback_logs_what_the_plain_loop_does_on_the_same_batches(tmp_path, kind, build):
    model = build()
    trainer(tmp_path, model, kind, meter_callback(**settings(tmp_path, kind))).train()
    logged = list(entries(tmp_path / "trainer.meter"))
    assert len(logged) == 8 and verify_log(tmp_path / "trainer.meter").is_closed

    plain = build()
    examples, log = Examples(kind, 0, N_TRAIN), tmp_path / "plain.meter"
    decayed = [p for n, p in plain.named_parameters() if p.ndim > 1]
    other = [p for n, p in plain.named_parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    queries = Dictionaries(Examples(kind, N_TRAIN, N_TRAIN + N_QUERY))
    with Meter(plain, optimizer, measurement=per_text, queries=queries, n_train=N_TRAIN, log=log, every=1) as meter:
        for entry in logged:
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = entry.learning_rate
            batch = transformers.default_data_collator([examples[int(i)] for i in entry.records])
            batch.pop("record_id")
            plain.train()
            with meter.batch(entry.records):
                plain(**batch).loss.backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(
                torch.from_numpy(meter.last.influence), torch.from_numpy(entry.influence.copy()), rtol=1e-3, atol=1e-8
            )

    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(totals(tmp_path / "trainer.meter"), totals(log), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2, "max_steps": 4}])
def test_training_is_the_same_to_the_bit_with_the_callback_on(tmp_path, arguments):
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1}
    metered, plain = gpt2(**dropout), gpt2(**dropout)
    callback = meter_callback(**settings(tmp_path, "gpt2"))

    trainer(tmp_path, metered, "gpt2", callback, **arguments).train()
    trainer(tmp_path, plain, "gpt2", transformers.TrainerCallback(), numbered=False, **arguments).train()

    for mine, theirs in zip(metered.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    accumulated = arguments.get("gradient_accumulation_steps", 1)
    logged = list(entries(tmp_path / "trainer.meter"))
    assert [len(entry.records) for entry in logged] == [B * accumulated] * (8 // accumulated)


def test_a_resumed_training_goes_on_in_the_same_log(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5}
    model = gpt2()
    trainer(tmp_path, model, "gpt2", meter_callback(**settings(tmp_path, "gpt2")), **arguments).train()
    whole = totals(tmp_path / "trainer.meter")

    again = gpt2()
    resumed = trainer(tmp_path, again, "gpt2", meter_callback(**settings(tmp_path, "gpt2")), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))

    report = verify_log(tmp_path / "trainer.meter")
    assert report.is_valid and report.n_step == 5 + 2
    assert [entry.step for entry in entries(tmp_path / "trainer.meter")] == [0, 1, 2, 3, 4]
    torch.testing.assert_close(totals(tmp_path / "trainer.meter"), whole, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "pointer"),
    [
        ({"remove_unused_columns": True}, "/args/remove_unused_columns"),
        ({"bf16": True}, "/args/bf16"),
    ],
)
def test_arguments_under_which_records_cannot_be_told_apart_are_refused(tmp_path, arguments, pointer):
    before = gpt2()
    model = gpt2()

    with pytest.raises(EngineError) as refused:
        trainer(tmp_path, model, "gpt2", meter_callback(**settings(tmp_path, "gpt2")), **arguments).train()

    assert refused.value.pointer == pointer
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))
    assert not (tmp_path / "trainer.meter").exists()


def test_examples_without_a_number_are_refused_at_the_first_batch(tmp_path):
    callback = meter_callback(**settings(tmp_path, "gpt2"))
    with pytest.raises(EngineError) as refused:
        trainer(tmp_path, gpt2(), "gpt2", callback, numbered=False).train()
    callback.meter.close()

    assert refused.value.pointer == "/train_dataset/record_id"


def test_evaluation_between_steps_is_not_metered(tmp_path):
    callback = meter_callback(**settings(tmp_path, "gpt2"))
    trainer(tmp_path, gpt2(), "gpt2", callback, eval_strategy="steps", eval_steps=2, max_steps=4).train()

    assert len(list(entries(tmp_path / "trainer.meter"))) == 4
    assert isinstance(callback.meter, Meter) and callback.meter.step == 4


def test_the_engine_imports_transformers_only_inside_a_function():
    import attribution.engine

    for path in Path(attribution.engine.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [line for line in named if "transformers" in line or "accelerate" in line]
