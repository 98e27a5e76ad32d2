"""The load-balancing loss of a mixture of experts is a term of the student's loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from collegium.data.collate import Collator
from collegium.errors import ModelError
from collegium.models.forward import forward_rows, router_weight
from collegium.types import Batch
from refusals import refused
from training_runs import VOCAB, small_model, trainer

SHAPE: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "head_dim": 4,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}
FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "ernie4_5_moe", "minimax"]


def expert(family: str = "mixtral", seed: int = 0, **more: Any) -> Any:
    return small_model(seed, model_type=family, **(SHAPE | more))


def rows() -> list[dict[str, Any]]:
    """Rows of different lengths, so that a batch has padding."""
    generator = torch.Generator().manual_seed(2)
    lengths = (10, 7, 9, 4)
    ids = [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": one, "labels": one, "attention_mask": [1] * len(one)} for one in ids]


def padded() -> dict[str, torch.Tensor]:
    columns = {"input_ids": 1, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([row[name] + [fill] * (10 - len(row[name])) for row in rows()])
        for name, fill in columns.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_term_is_the_loss_of_the_model_without_padding(family: str) -> None:
    model = expert(family)
    batch = Batch.from_inputs(padded())
    states = forward_rows(model, batch, batch.rows(), vocab_size=VOCAB, is_student=True)
    own = model(**padded())
    assert router_weight(model) == 0.5
    assert states.router_loss is not None
    assert float(states.router_loss) == pytest.approx(float(own.aux_loss), rel=1e-5)
    assert forward_rows(model, batch, batch.rows(), vocab_size=VOCAB).router_loss is None


def test_the_term_is_trained_logged_and_evaluated(tmp_path: Path) -> None:
    """The whole loss and all gradients are those of the model itself."""
    made = trainer(
        tmp_path,
        model=expert(),
        teachers=[],
        train_dataset=rows(),
        eval_dataset=rows(),
        data_collator=Collator(),
        options={
            "max_steps": 1, "logging_steps": 1, "max_grad_norm": 0, "optim": "sgd",
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        },
    )  # fmt: skip
    own = expert()
    loss = own(**padded()).loss
    loss.backward()
    inputs = made.data_collator(rows())
    ours = made.compute_loss(made.model, inputs)
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, theirs), mine in zip(own.named_parameters(), made.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)
    made.model.zero_grad()
    metrics = made.evaluate()
    assert metrics["eval_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    made.train()
    row = next(row for row in made.state.log_history if "loss" in row)
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert row["term_weights/router"] == 0.5
    assert row["loss"] == pytest.approx(row["terms/ce"] + 0.5 * row["terms/router"], rel=1e-5)


@pytest.mark.parametrize("off", [{"output_router_logits": False}, {"router_aux_loss_coef": 0.0}])
def test_a_model_that_does_not_ask_for_it_has_no_term(tmp_path: Path, off: dict[str, Any]) -> None:
    made = trainer(tmp_path, model=expert(**off), options={"max_steps": 1})
    made.train()
    assert not any("terms/router" in row for row in made.state.log_history)


def test_a_loss_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with refused(ModelError, "doge: "):
        trainer(tmp_path, model=expert("doge", num_experts=16, is_moe=True))
