"""Training arguments do what they do in `transformers.Trainer`, as the table in the docs says."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from collegium.errors import TrainingError
from collegium.train import trainer as trainer_module
from collegium.train.arguments import UNSUPPORTED, adopt_arguments, check_accelerator
from collegium.train.progress import TrainingProgress
from collegium.train.trainer import DistillTrainer
from refusals import refused
from training_runs import VOCAB, small_model

TABLE = Path(__file__).parents[2] / "docs" / "trainer_arguments.md"
REFUSED: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "fp16": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "use_liger_kernel": True,
    "use_cache": True,
    "auto_find_batch_size": True,
    "save_only_model": True,
    "save_total_limit": 1,
    "enable_jit_checkpoint": True,
    "push_to_hub": True,
    "label_names": ["start_positions"],
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "parallelism_config": object(),
}
DISTRIBUTED: dict[str, Any] = {
    "average_tokens_across_devices": False,
    "accelerator_config.split_batches": True,
    "accelerator_config.dispatch_batches": True,
    "accelerator_config.even_batches": False,
}
EVALUATING: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}
BEST = EVALUATING | {"save_strategy": "steps", "save_steps": 2, "metric_for_best_model": "loss"}
WORKERS: dict[str, Any] = {"dataloader_num_workers": 1, "num_train_epochs": 2, "max_steps": -1}
SAME: dict[str, dict[str, Any]] = {
    "per_device_train_batch_size": {"per_device_train_batch_size": 3},
    "num_train_epochs": {"max_steps": -1, "num_train_epochs": 1.5},
    "max_steps": {"max_steps": 5},
    "learning_rate": {"learning_rate": 3e-3},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "lr_scheduler_kwargs": {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-3},
    },
    "warmup_steps": {"warmup_steps": 2},
    "optim": {"optim": "adafactor"},
    "optim_args": {"optim": "adafactor", "optim_args": "decay_rate=-0.5"},
    "weight_decay": {"weight_decay": 0.3},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_epsilon": {"adam_epsilon": 1e-2},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "max_grad_norm": {"max_grad_norm": 0.05},
    "no max_grad_norm": {"max_grad_norm": 0},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "gradient_checkpointing_kwargs": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "activation_checkpointing": {"activation_checkpointing": True},
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 2},
    "logging_strategy": {
        "logging_strategy": "epoch",
        "max_steps": 8,
        # A loss is a mean over tokens, so it differs where a batch of the epoch is smaller.
        "dataloader_drop_last": True,
    },
    "no logging_strategy": {"logging_strategy": "no"},
    "logging_first_step": {"logging_first_step": True, "logging_steps": 4},
    "logging_steps": {"logging_steps": 2},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "all"},
    "eval_strategy": {"eval_strategy": "epoch", "max_steps": 6},
    "eval_steps": EVALUATING,
    "eval_delay": EVALUATING | {"eval_delay": 3},
    "eval_on_start": EVALUATING | {"eval_on_start": True},
    "prediction_loss_only": EVALUATING | {"prediction_loss_only": True},
    "eval_accumulation_steps": EVALUATING | {"eval_accumulation_steps": 1},
    "save_strategy": {"save_strategy": "epoch", "max_steps": 6},
    "best save_strategy": BEST | {"save_strategy": "best"},
    "save_steps": {"save_strategy": "steps", "save_steps": 1},
    "save_total_limit": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2},
    "load_best_model_at_end": BEST | {"load_best_model_at_end": True, "learning_rate": 0.5},
    "metric_for_best_model": BEST,
    "greater_is_better": BEST
    | {"greater_is_better": True, "load_best_model_at_end": True, "save_total_limit": 2},
    "full_determinism": {"full_determinism": True},
    "seed": {"seed": 5, "data_seed": 5},
    "dataloader_drop_last": {"dataloader_drop_last": True, "max_steps": 6},
    "dataloader_pin_memory": {"dataloader_pin_memory": False},
    "dataloader_num_workers": WORKERS,
    "dataloader_persistent_workers": WORKERS | {"dataloader_persistent_workers": True},
    "dataloader_prefetch_factor": WORKERS | {"dataloader_prefetch_factor": 1},
    "dataloader_in_order": WORKERS | {"dataloader_in_order": True},
    "train_sampling_strategy": {"train_sampling_strategy": "sequential"},
    "length_column_name": {
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "size",
    },
    "debug": {"debug": "underflow_overflow"},
    "neftune_noise_alpha": {"neftune_noise_alpha": 0.1},
    "skip_memory_metrics": {"skip_memory_metrics": False},
}
"""Settings of a run for each argument, which both trainers get."""


def rows(num: int = 9, seed: int = 5) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (num, 8), generator=generator).tolist()
    return [{"input_ids": one, "labels": one, "size": 8} for one in ids]


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([item[key] for item in items]) for key in ("input_ids", "labels")}


def script(cls: type[Trainer], folder: Path, settings: dict[str, Any], **more: Any) -> Any:
    """The script that both trainers run."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "data_seed": 3,
        "remove_unused_columns": False,
    }
    torch.manual_seed(0)
    model = more.pop("model", None) or small_model()
    if cls is not Trainer:
        more["callbacks"] = [*more.get("callbacks", ()), TrainingProgress(quiet=True)]
    return cls(
        model=model,
        args=TrainingArguments(**(defaults | settings)),
        train_dataset=rows(),
        eval_dataset=rows(seed=6),
        data_collator=collate,
        **more,
    )


def observed(made: Any) -> dict[str, Any]:
    """The log, evaluations, checkpoints, and the best of them."""
    keys = ("step", "learning_rate", "loss", "grad_norm", "eval_loss", "num_input_tokens_seen")
    history = [row for row in made.state.log_history if "loss" in row or "eval_loss" in row]
    folders = {path.name for path in Path(made.args.output_dir).glob("checkpoint-*")}
    best = made.state.best_model_checkpoint
    return {
        "history": [{key: row[key] for key in keys if key in row} for row in history],
        "steps": made.state.global_step,
        "checkpoints": folders,
        "best": None if best is None else Path(best).name,
        "best metric": made.state.best_metric,
    }


def assert_same(ours: Any, theirs: Any, rel: float = 5e-4) -> None:
    # Sums in another order move the norm of a gradient by 1.7e-4 after three steps.
    left, right = observed(ours), observed(theirs)
    assert len(left["history"]) == len(right["history"])
    for a, b in zip(left.pop("history"), right.pop("history"), strict=True):
        assert a == pytest.approx(b, rel=rel)
    best = left.pop("best metric"), right.pop("best metric")
    assert best == (None, None) or best[0] == pytest.approx(best[1], rel=rel)
    assert left == right
    for (name, a), b in zip(
        ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", SAME)
def test_an_argument_does_the_same(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It sets variables of the environment and flags of torch.
    for variable in (
        "CUDA_LAUNCH_BLOCKING",
        "CUBLAS_WORKSPACE_CONFIG",
        "FLASH_ATTENTION_DETERMINISTIC",
    ):
        monkeypatch.setenv(variable, "")
    made = []
    for cls in (DistillTrainer, Trainer):
        # Trained at once: some samplers draw from the global generator, which a trainer seeds.
        made.append(script(cls, tmp_path / cls.__name__, copy.deepcopy(SAME[name])))
        made[-1].train()
    torch.use_deterministic_algorithms(False)
    assert_same(*made)


def test_early_stopping_counts_across_a_resumed_run(tmp_path: Path) -> None:
    settings = BEST | {
        "learning_rate": 0.05,  # so that the first evaluation stays the best
        "load_best_model_at_end": True,
        "max_steps": 12,
        "restore_callback_states_from_checkpoint": True,
    }

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            control.should_training_stop = state.global_step == 4

    results = []
    for cls in (DistillTrainer, Trainer):
        folder = tmp_path / cls.__name__
        patience = [EarlyStoppingCallback(early_stopping_patience=3)]
        script(cls, folder, settings, callbacks=[*patience, Stop()]).train()
        rest = script(
            cls, folder, settings, callbacks=[EarlyStoppingCallback(early_stopping_patience=3)]
        )
        rest.train(resume_from_checkpoint=True)
        results.append(rest.state.global_step)
    assert results == [8, 8]


def test_a_finished_run_is_resumed_with_its_best_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = BEST | {"load_best_model_at_end": True, "learning_rate": 0.05, "max_steps": 12}
    made = script(DistillTrainer, tmp_path, settings | {"save_total_limit": 2})
    made.train()
    assert observed(made)["best"] == "checkpoint-2"
    assert observed(made)["checkpoints"] == {"checkpoint-2", "checkpoint-12"}
    again = script(DistillTrainer, tmp_path, settings | {"save_total_limit": 2})
    again.train(resume_from_checkpoint=True)
    for a, b in zip(again.model.parameters(), made.model.parameters(), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "checkpoint-2" / "state.json").unlink()
    script(DistillTrainer, tmp_path, settings).train(resume_from_checkpoint=True)
    assert "the best model is not loaded" in caplog.text


@pytest.mark.parametrize("length", [6, 8])
def test_a_longer_run_goes_on_with_the_rates_of_its_length(tmp_path: Path, length: int) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    script(DistillTrainer, tmp_path, saving).train()
    rest = script(DistillTrainer, tmp_path, saving | {"max_steps": length})
    rest.train(resume_from_checkpoint=True)
    rates = [row["learning_rate"] for row in rest.state.log_history if "loss" in row][4:]
    linear = [1e-2 * (1 - step / length) for step in range(4, length)]
    assert rates == pytest.approx(linear)


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 1e-4},
        {"weight_decay": 0.2},
        {"lr_scheduler_type": "cosine"},
        {"bf16": True},
    ],
)
def test_arguments_that_a_checkpoint_would_overrule_are_refused(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    script(DistillTrainer, tmp_path, saving).train()
    other = script(DistillTrainer, tmp_path, saving | changed | {"max_steps": 6})
    with refused(TrainingError, "checkpoint-4: "):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_is_refused(tmp_path: Path, name: str) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    setattr(args, name, REFUSED[name])
    with refused(TrainingError, f"{name}: ", volatile=r"<object.*?>"):
        DistillTrainer(small_model(), args=args, train_dataset=rows())


def test_several_gpus_in_one_process_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with refused(TrainingError, "n_gpu: "):
        adopt_arguments(TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_an_argument_is_refused_with_several_processes(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    head, _, tail = name.partition(".")
    setattr(getattr(args, head) if tail else args, tail or head, DISTRIBUTED[name])
    adopt_arguments(args)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with refused(TrainingError, f"{name}: "):
        adopt_arguments(args)


def test_the_table_in_the_docs_is_complete_and_true() -> None:
    lines = re.findall(
        r"^\| `(\w+)` \| (same|inherited|different|refused) \| (.*?) ?\|$", TABLE.read_text(), re.M
    )
    names = [name for name, _, _ in lines]
    assert len(names) == len(set(names))
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert known <= set(names), sorted(known - set(names))
    kinds = {name: kind for name, kind, _ in lines}
    remarks = {name: remark for name, _, remark in lines}
    listed = {name for name, kind in kinds.items() if kind == "refused"}
    distributed = {name.partition(".")[0] for name in DISTRIBUTED}
    assert listed == {*REFUSED, *distributed}
    assert set(UNSUPPORTED) == {*REFUSED, "n_gpu"}
    assert all(remarks[name] for name in names if kinds[name] in ("different", "refused"))
    # An argument that is compared is never refused, but for the value that the remark names.
    compared = {name.split()[-1] for name in SAME}
    assert compared <= set(names)
    assert {name for name in compared if kinds[name] == "refused"} == {"save_total_limit"}
    different = {name for name, kind in kinds.items() if kind == "different"}
    assert compared - different - listed == {n for n, kind in kinds.items() if kind == "same"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_precision_of_accelerate_is_that_of_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    if precision == "fp16":
        with refused(TrainingError, "mixed_precision of accelerate: "):
            script(DistillTrainer, tmp_path, {})
        return
    made = script(DistillTrainer, tmp_path, {"max_steps": 1})
    kinds = []
    layer = made.model.model.layers[0].mlp
    layer.register_forward_hook(lambda m, i, output: kinds.append(output.dtype))
    made.train()
    assert set(kinds) == {torch.bfloat16}


@pytest.mark.parametrize("wrong", ["version", "offload", "single", "deepspeed"])
def test_a_config_of_accelerate_that_cannot_work_is_refused(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    policy = CPUOffloadPolicy() if wrong == "offload" else OffloadPolicy()
    plugin = SimpleNamespace(fsdp_version=1 if wrong == "version" else 2, cpu_offload=policy)
    state = {"fsdp_plugin": None if wrong == "single" else plugin}
    state |= {"deepspeed_plugin": object()} if wrong == "deepspeed" else {}
    accelerator: Any = SimpleNamespace(mixed_precision="no", state=SimpleNamespace(**state))
    kind = "deepspeed" if wrong == "deepspeed" else "fsdp"
    with refused(TrainingError, f"{kind} of accelerate: "):
        check_accelerator(accelerator)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_a_sharded_student_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model

    create = DistillTrainer.create_accelerator_and_postprocess

    def created(made: DistillTrainer) -> None:
        create(made)
        made.is_fsdp_enabled = True

    monkeypatch.setattr(DistillTrainer, "create_accelerator_and_postprocess", created)
    model = get_peft_model(small_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with refused(TrainingError, "student: "):
        script(DistillTrainer, tmp_path, {}, model=model)


def test_sharding_leaves_the_precision_to_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    plugin = SimpleNamespace(
        fsdp_version=2,
        cpu_offload=OffloadPolicy(),
        cpu_ram_efficient_loading=True,
        mixed_precision_policy=policy,
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    check_accelerator(cast(Any, SimpleNamespace(mixed_precision="bf16", state=state)))
    assert plugin.mixed_precision_policy is None
    assert plugin.cpu_ram_efficient_loading is False


def test_the_arguments_of_torch_compile_reach_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = small_model(), []
    monkeypatch.setattr(model.base_model, "compile", lambda **how: seen.append(how))
    how = {"torch_compile_backend": "eager", "torch_compile_mode": "default"}
    script(DistillTrainer, tmp_path, how, model=model)
    assert seen == [{"backend": "eager", "mode": "default"}]


class Penalized(DistillTrainer):
    """Adds 1 to the loss, and a gradient."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
        share = 1.0 / self.args.gradient_accumulation_steps if self.is_in_train else 1.0
        loss = loss + share + 0 * self.step.student.lm_head.weight.sum()
        return (loss, outputs) if return_outputs else loss


class Other(DistillTrainer):
    """Trains on something else."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any
    ) -> Any:
        loss = self.step.student.lm_head.weight.square().mean()
        return (loss, None) if return_outputs else loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_logged_loss_is_the_trained_one_under_a_subclass(
    tmp_path: Path, accumulate: int
) -> None:
    settings = {
        "gradient_accumulation_steps": accumulate, "max_grad_norm": 0, "max_steps": 2,
    }  # fmt: skip
    plain, more, other = (
        script(cls, tmp_path / cls.__name__, settings) for cls in (DistillTrainer, Penalized, Other)
    )
    assert more.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"] + 1)
    weight = other.model.lm_head.weight
    expected = float(weight.detach().square().mean())
    assert other.evaluate()["eval_loss"] == pytest.approx(expected)
    for one in (plain, more, other):
        one.train()
    losses = [
        [row["loss"] for row in made.state.log_history if "loss" in row] for made in (plain, more)
    ]
    assert losses[1] == pytest.approx([loss + 1 for loss in losses[0]], rel=1e-4)
    first = next(row["loss"] for row in other.state.log_history if "loss" in row)
    assert first == pytest.approx(accumulate * expected)


def test_the_student_is_at_the_root_of_what_is_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = script(DistillTrainer, tmp_path, {"max_steps": 1, "hub_model_id": "someone/student"})
    made.train()
    uploads = []

    class Hub:
        def create_repo(self, *arguments: Any, **named: Any) -> Any:
            return type("Url", (str,), {"repo_id": "someone/student"})("https://hub.invalid/s")

        def upload_folder(self, *, folder_path: str, **named: Any) -> None:
            uploads.append({path.name for path in Path(folder_path).iterdir()})

    monkeypatch.setattr("transformers.trainer.hf_api", lambda *arguments, **named: Hub())
    monkeypatch.setattr(made, "create_model_card", lambda **named: None)
    made.push_to_hub()
    assert {"config.json", "model.safetensors"} <= uploads[0]
    assert trainer_module.DistillTrainer is DistillTrainer
