"""Evaluations during training that choose the student: its best checkpoint, and early stopping."""

from __future__ import annotations

import sys
from typing import Any

from transformers import EarlyStoppingCallback, TrainerState

from collegium.train.options import METRIC, TrainOptions


class Selection(EarlyStoppingCallback):
    """Early stopping of transformers, with a checkpoint of the best evaluation and of the stop.

    A run that is started again finds the checkpoint of the stop, and takes no more steps. The count
    of evaluations that were no better is part of each checkpoint.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do without the warning about a last model, which an option asks for."""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # Curves of training and validation share their steps, and the last one counts all tokens.
        control.should_log |= control.should_evaluate

    def on_evaluate(  # type: ignore[override]
        self, args: Any, state: TrainerState, control: Any, metrics: Any, **kwargs: Any
    ) -> None:
        if args.metric_for_best_model is None:
            return
        is_best = state.best_metric is None or metrics[f"eval_{METRIC}"] < state.best_metric
        super().on_evaluate(args, state, control, metrics, **kwargs)
        control.should_save |= control.should_training_stop
        control.should_save |= is_best and args.load_best_model_at_end


def selection_callback(options: TrainOptions) -> Selection:
    """Return the callback of a run with `eval_steps`, for `DistillTrainer(callbacks=...)`."""
    patience = options.early_stopping_patience
    # Without a patience it never stops.
    return Selection(patience or sys.maxsize, options.early_stopping_threshold)


def stopped_early(state: TrainerState) -> bool:
    """Return True if the run of a checkpoint ended there, before its last step."""
    states: Any = state.stateful_callbacks or {}
    saved = states.get(Selection.__name__)
    if saved is None or state.global_step >= state.max_steps:
        return False
    count = saved["attributes"]["early_stopping_patience_counter"]
    return count >= saved["args"]["early_stopping_patience"]
