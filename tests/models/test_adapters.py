"""A student with a LoRA adapter of PEFT on its head: loss and gradients equal the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from collegium.data.encode import Encoded
from collegium.data.windows import PackedDataset
from collegium.errors import ModelError
from collegium.models.forward import forward_rows, model_head
from collegium.models.probe import probe
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import row_losses
from collegium.train.trainer import DistillTrainer, TrainOptions, training_arguments
from collegium.types import Batch
from refusals import refused

peft = pytest.importorskip("peft")
IDS = torch.arange(48).reshape(2, 24) % 40


def student(**options: Any) -> Any:
    """A tiny model with nonzero adapters on its query projections and on its head."""
    model = tiny.tiny_model(seed=0, tie_word_embeddings=False)
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "lm_head"], **options}
    )
    torch.manual_seed(1)
    model.add_adapter(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.3)
    return model


def vocab_size(model: Any) -> int:
    return model.config.vocab_size


def batch() -> Batch:
    position_BT = torch.arange(24).expand(2, -1).contiguous()
    sample_BT = torch.arange(2)[:, None].expand(-1, 24).contiguous()
    return Batch(IDS, position_BT, IDS, sample_BT)


def test_loss_and_gradients_equal_those_of_the_models_logits() -> None:
    model = student().eval()
    adapters = [p for n, p in model.named_parameters() if "lora" in n]
    assert adapters
    assert all(p.requires_grad for p in adapters)
    rows = batch().rows()
    states = forward_rows(model, batch(), rows, vocab_size=vocab_size(model))
    ours = row_losses(Objective(ObjectiveOptions(), None), states, [], rows).total
    logits_BTV = model(input_ids=IDS, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(ours, expected)
    for actual, reference in zip(
        torch.autograd.grad(ours, adapters), torch.autograd.grad(expected, adapters), strict=True
    ):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-5)
        assert reference.abs().max() > 0


def test_the_probe_accepts_a_head_with_an_adapter() -> None:
    model = student()
    probe(model, vocab_size=vocab_size(model), where="student")
    adapted = model_head(model, vocab_size(model)).weight
    model.disable_adapters()
    plain = model_head(model, vocab_size(model)).weight
    assert not torch.equal(adapted, plain)
    probe(model, vocab_size=vocab_size(model), where="student")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_the_trainer_updates_only_the_adapters(tmp_path: Path) -> None:
    model = student()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = IDS.repeat(1, 4).flatten().numpy()
    document = Encoded(ids, ids >= 0, ids * 0 + 1, True)
    trainer = DistillTrainer(
        model,
        args=training_arguments(
            TrainOptions(max_steps=2, learning_rate=1e-2, logging_steps=1, save_steps=2),
            output_dir=tmp_path,
            seed=0,
            on_cpu=True,
        ),
        train_dataset=PackedDataset([document], max_length=24),
    )
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora" in n}


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=["dropout", "dora"]
)
def test_an_adapter_that_is_not_plain_lora_is_refused(options: dict[str, Any]) -> None:
    model = student(**options).train()
    with refused(ModelError, "adapter `default` on the head"):
        model_head(model, vocab_size(model))
