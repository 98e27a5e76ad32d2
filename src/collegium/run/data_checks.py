"""Checks of the text of a run: splits, reserved tokens, prompts of tasks, and domains."""

from __future__ import annotations

from collections.abc import Mapping

from collegium.errors import ModelError, RecipeError, VocabularyError, nearest
from collegium.fusion.fitted import Route
from collegium.fusion.fuse import Fusion
from collegium.models.student import StudentOptions
from collegium.run.context import RunContext
from collegium.run.problems import CheckReport
from collegium.teachers.options import TeacherOptions

Models = Mapping[str, StudentOptions | TeacherOptions]
"""Path in the recipe -> options of a model."""


def check_datasets(context: RunContext, report: CheckReport) -> None:
    """Check that no text has a reserved token, and describe splits, sources and steps."""
    options = context.recipe.train
    report.lines.append(f"corpus: {context.corpus.line()}")
    for part, dataset in context.datasets.items():
        report.lines.append(
            f"data.{part}: {len(dataset.sample_names):,} documents, {len(dataset):,} windows, "
            f"{dataset.num_target_tokens:,} target tokens"
        )
        _check_reserved(context, dataset.token_ids(), f"data.{part}")
    for source in context.sources:
        report.lines += source.lines()
    stops = context.tokenizer.convert_ids_to_tokens(context.datasets["train"].stops)
    report.lines.append(f"student: generation stops at {', '.join(stops)}")
    windows = len(context.datasets["train"])
    needed = options.per_device_train_batch_size * options.gradient_accumulation_steps
    if windows < needed:
        report.warnings.append(
            f"data.train: {windows} windows, one optimizer step takes {needed}; every step sees "
            "all of them; give more text, or lower train.per_device_train_batch_size"
        )
    steps, epochs = context.num_steps, context.num_steps * needed / windows
    report.lines.append(f"train: {steps:,} steps of {needed} windows, {epochs:.1f} epochs")


def _check_reserved(context: RunContext, ids: set[int], where: str) -> None:
    """Check that no token of a text means another one in a teacher."""
    used = sorted(ids & {*context.reserved_ids})
    if used:
        name = context.tokenizer.convert_ids_to_tokens(used[0])
        raise VocabularyError(
            f"{where}: contains `{name}` (id {used[0]}), which has another name in the "
            f"tokenizer of {context.reserved_ids[used[0]]}; must be the same token; remove it "
            "from the texts, or set `data.special_tokens: text`"
        )


def check_suites(context: RunContext, report: CheckReport, models: Models) -> None:
    """Check the prompts of generation and tasks, and whether the fused target can be sampled."""
    recipe = context.recipe
    if recipe.evaluate.generation is None and not recipe.evaluate.tasks:
        return
    # Imported here: it takes longer than a whole check.
    from collegium.evaluate.generation import unsampled_reason
    from collegium.run.tasks import load_suite, suite_key, suite_names

    for name in suite_names(recipe.evaluate):
        suite, where = load_suite(context, name), suite_key(name)
        _check_reserved(context, {i for item in suite.items for i in item.prompt.ids}, where)
        longest = max(item.num_tokens for item in suite.items)
        for place, options in models.items():
            try:
                options.check_windows(place, packed=False, max_length=longest)
            except ModelError as error:
                raise ModelError(f"{where}: texts of {longest} tokens: {error}") from error
        metrics = ", ".join(suite.metrics)
        report.lines.append(f"{where}: {len(suite.items):,} prompts; {metrics}")
    if recipe.teachers and isinstance(recipe.fusion, Fusion):
        reason = unsampled_reason(recipe.fusion)
        if reason is not None:
            report.warnings.append(f"evaluate: no text of the fused target: {reason}")


def check_routing(context: RunContext, report: CheckReport) -> None:
    """Check the domains of a weighting against the data, and that teacher columns are read."""
    recipe = context.recipe
    weighting = recipe.fusion.weighting if isinstance(recipe.fusion, Fusion) else None
    domains = {name for part in context.datasets.values() for name in part.domains}
    listed = {} if weighting is None else weighting.domain_names()
    for path, names in listed.items():
        for name in [name for name in names if name not in domains]:
            raise RecipeError(
                f"fusion.weighting.{'.'.join(path)}: got `{name}`; "
                f"must be a domain of the data{nearest(name, domains)}"
            )
    columns = [
        f"data.{part}[{number}].teacher_column"
        for part, sources in recipe.data.sources.items()
        for number, source in enumerate(sources)
        if source.teacher_column is not None
    ]
    if isinstance(weighting, Route):
        if not weighting.domains and not columns:
            report.warnings.append(
                "fusion.weighting: route without `domains` and without a `teacher_column` sends "
                f"every row to `{weighting.default}`"
            )
    elif weighting is not None:
        no_effect = "has no effect; only the weighting `route` reads it"
        report.warnings += [f"{place}: {no_effect}" for place in columns]
