"""Checks before anything expensive: files, models, vocabularies, data, disk. No run is written.

The cheapest come first. Models are built on the meta device only, and weight files are read last.
"""

from __future__ import annotations

import shutil
from collections import Counter

import torch

from collegium.cache.cluster import require_ray
from collegium.cache.manifest import read_manifest, require_identity
from collegium.cache.options import TopK
from collegium.cache.processes import Ranks
from collegium.config.recipe import Recipe, check_recipe
from collegium.data.sources import check_sources
from collegium.errors import RecipeError, nearest
from collegium.fusion.fuse import Fusion
from collegium.kernels.backends import require_backend
from collegium.losses.pairing import (
    AttentionOptions,
    EmbeddingOptions,
    LayerTerm,
    RelationOptions,
    feature_map,
)
from collegium.losses.row_terms import RouterTerm, RowTerm
from collegium.losses.schedule import first_idle_step
from collegium.models.loading import vocab_size_of
from collegium.models.lora import adapter_identity
from collegium.models.options import ModelOptions
from collegium.models.student import StudentOptions
from collegium.models.weights import weights_digest, weights_layout, weights_sample
from collegium.report.formats import amount
from collegium.run.caches import Cache, FusedCache
from collegium.run.context import RunContext
from collegium.run.corpora import check_sample
from collegium.run.data_checks import Models, check_datasets, check_routing, check_suites
from collegium.run.estimates import estimate_lines, estimate_warnings
from collegium.run.exports import check_exports
from collegium.run.memory import MemoryPlan
from collegium.run.problems import CheckReport, Problems
from collegium.run.speeds import check_speeds
from collegium.teachers.options import TeacherOptions
from collegium.train.arguments import BFLOAT16_RATE, bfloat16_warning
from collegium.train.checkpoint import require_valid_checkpoint
from collegium.vocabulary.verdict import compare, require_compatible


def check_run(context: RunContext, *, trains: bool = True) -> CheckReport:
    """Check a run. Raises CollegiumError with all problems and remedies if it could not work.

    A check that reads what another one found to be damaged is skipped.
    """
    report, problems = CheckReport(), Problems()
    recipe, collect = context.recipe, problems.collect
    is_consistent = collect(check_recipe, recipe)
    collect(_check_machine, recipe, trains=trains)
    collect(context.folder.check_place)
    sources = recipe.data.sources.items()
    has_files = all([collect(check_sources, one, where=f"data.{part}") for part, one in sources])
    # A student may be bound to a teacher that does not exist.
    models = _models(context) if is_consistent else _teachers(context)
    models = {where: one for where, one in models.items() if collect(one.check, where)}
    has_student, is_complete = "student" in models, len(models) == len(recipe.teachers) + 1
    has_student = has_student and collect(_check_tokenizer, context, report)
    has_text = has_student and has_files and context.corpus.is_readable()
    if has_student and has_files and not has_text:
        collect(check_sample, context, report)
    if has_student:
        collect(_check_precision, context, report)
    for where, options in models.items():
        if has_student and isinstance(options, TeacherOptions):
            collect(_check_vocabulary, context, report, where, options)
        collect(_check_windows, context, where, options)
    if recipe.student.vocabulary != "all":  # the tokens of the text
        has_student = has_text = has_text and collect(_check_used, context, report, models)
    collect(_check_checkpoints, context)
    whole = {"student": context.whole_student} if "student" in models else {}
    collect(_check_distinct, {**models, **whole}, report)
    if has_student:
        collect(_check_cache, context)
        collect(check_exports, context)
        collect(check_speeds, context)
        if is_complete:
            collect(_check_states, context)
    if has_text:
        _check_text(context, report, problems, models)
    for where, options in models.items():
        collect(_check_weights, where, options, report)
    problems.raise_all()
    folder = context.folder.path
    disk = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(disk).free
    report.lines.append(f"disk: {free / 1e9:.1f} GB free at {recipe.output_dir}")
    return report


def _check_text(
    context: RunContext, report: CheckReport, problems: Problems, models: Models
) -> None:
    collect = problems.collect
    if collect(check_datasets, context, report):
        collect(check_suites, context, report, models)
        collect(check_routing, context, report)
        collect(_check_terms, context)
        if not problems.errors:
            collect(_check_finished_caches, context)


def plan_run(context: RunContext) -> CheckReport:
    """Plan memory and time of a checked run, which takes about as long as its check."""
    plan = MemoryPlan(context)
    return CheckReport(estimate_lines(plan), estimate_warnings(plan))


def _check_machine(recipe: Recipe, *, trains: bool) -> None:
    ranks = Ranks.from_environment()
    if trains and not ranks.is_single and recipe.export.recover is not None:
        raise RecipeError(
            f"export.recover: got {recipe.export.recover.steps} steps in a run of "
            f"{ranks.world_size} processes; must be trained by a single one; remove it, and run "
            "`collegium export RUN --recover N` afterwards"
        )
    if recipe.train.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise RecipeError(
            "train.bf16: got true; must be false on a CUDA device without bfloat16; remove it"
        )
    require_backend(recipe.objective.backend)
    if recipe.cache.ray is not None:
        require_ray()


def _teachers(context: RunContext) -> Models:
    return {f"teachers.{name}": one for name, one in context.recipe.teachers.items()}


def _models(context: RunContext) -> Models:
    return {**_teachers(context), "student": context.student}


def _check_tokenizer(context: RunContext, report: CheckReport) -> None:
    size = vocab_size_of(context.whole_tokenizer)
    report.lines.append(f"vocabulary: {size:,} tokens")


def _check_vocabulary(
    context: RunContext, report: CheckReport, where: str, options: TeacherOptions
) -> None:
    verdict = compare(
        context.whole_tokenizer,
        options.load_tokenizer(where),
        student_head_size=vocab_size_of(context.whole_tokenizer),
        teacher_head_size=options.head_rows(where),
        where=where,
    )
    require_compatible(verdict)
    report.lines.append(f"{where}: vocabulary {verdict.kind}; {verdict.message}")
    context.reserved_ids.update(dict.fromkeys(verdict.reserved, where))


def _check_used(context: RunContext, report: CheckReport, models: Models) -> None:
    """Check that the teachers can answer for the kept tokens, and count the others."""
    used = context.used
    if used is None:
        return
    places, reserved = used.new_ids(), dict(context.reserved_ids)
    context.reserved_ids.clear()
    context.reserved_ids.update({int(places[i]): where for i, where in reserved.items()})
    for where, options in models.items():
        if isinstance(options, TeacherOptions):
            options.check_used(used.kept_U, where)
    line = f"student.vocabulary: {len(used.kept_U):,} tokens kept"
    if not context.student.needs_loading:
        whole = context.whole_student.facts("student").num_parameters
        saved = whole - context.student_facts.num_parameters
        line += f", which saves {amount(saved)} of {amount(whole)} parameters"
    report.lines.append(f"{line}; preflight measures the mass of the others in each teacher")


def _check_windows(
    context: RunContext, where: str, options: StudentOptions | TeacherOptions
) -> None:
    """Check that a model can score the windows: their length, and several documents."""
    data, limit = context.recipe.data, options.max_length(where)
    if limit is not None and data.max_length > limit:
        raise RecipeError(
            f"data.max_length: got {data.max_length}; must be at most {limit}, the "
            f"max_position_embeddings of {where}; lower it"
        )
    options.check_windows(where, packed=data.packing, max_length=data.max_length)


def _check_weights(
    where: str, options: StudentOptions | TeacherOptions, report: CheckReport
) -> None:
    report.warnings += options.warnings(where)


def _check_checkpoints(context: RunContext) -> None:
    folder = context.folder.path
    for place in (folder / "train", *sorted(folder.glob("controls/*/train"))):
        if not (place / "summary.json").is_file():
            require_valid_checkpoint(place)


def _check_precision(context: RunContext, report: CheckReport) -> None:
    """Check that the trained weights can follow the optimizer's steps."""
    recipe = context.recipe
    dtype, rate = getattr(context.student, "dtype", None), recipe.train.learning_rate
    if dtype == "float16":
        raise RecipeError(
            "student.dtype: got float16; must be float32 or bfloat16, since AdamW's epsilon is 0 "
            "in float16; use float32 with train.bf16"
        )
    # Adapters are float32 under weights of any type.
    if dtype == "bfloat16" and context.student.lora is None and rate < BFLOAT16_RATE:
        report.warnings.append(bfloat16_warning("student.dtype", rate))


def _check_terms(context: RunContext) -> None:
    """Check that a term has a weight at each step, and the domains of the terms."""
    options = context.recipe.objective
    terms, num_steps = [one.term for one in options.placed_terms()], context.num_steps
    # A load-balancing loss trains no model by itself.
    trained = [term for term in terms if not isinstance(term, RouterTerm)]
    if (step := first_idle_step(trained, num_steps)) is not None:
        raise RecipeError(
            f"objective.terms: got no weight at step {step} of {num_steps}; must have a term with "
            "some at each step; change a schedule"
        )
    domains = context.datasets["train"].domains
    for key, term in ((one.key, one.term) for one in options.placed_terms()):
        names = (isinstance(term, RowTerm) and term.domains) or []
        for name in (name for name in names if name not in domains):
            raise RecipeError(
                f"{key}.domains: got `{name}`; must be a domain of the data{nearest(name, domains)}"
            )


def _check_states(context: RunContext) -> None:
    """Check that the inner states that the terms read exist."""
    recipe, options = context.recipe, context.recipe.objective
    if context.student.needs_loading:
        return
    for name, teacher in recipe.teachers.items():
        for key, term in options.state_terms() if not teacher.needs_loading else ():
            if term.teacher_weight(name) > 0:
                _check_pairs(context, name, key, term)


def _check_pairs(
    context: RunContext, name: str, key: str, term: LayerTerm | EmbeddingOptions
) -> None:
    """Check the layers that a term pairs, and that it can read their attention."""
    models = {"student": context.student_facts, f"teachers.{name}": context.teacher_facts[name]}
    taps = [list(facts.tap_widths) if facts else [] for facts in models.values()]
    feature_map(term, *taps, where=key)
    if not isinstance(term, AttentionOptions | RelationOptions):
        return
    for where, facts in models.items():
        if facts is None or not facts.has_attention:
            raise RecipeError(
                f"{key}: got {term.log_name} terms; must be omitted with {where} (its attention "
                "cannot be read); remove the term"
            )
        # The first batch checks keys: a config may name heads of keys that its family ignores.
        if isinstance(term, RelationOptions) and "query" in term.relations:
            width, num_heads = facts.query_width or 0, term.num_heads or 1
            if width % num_heads:
                raise RecipeError(
                    f"{key}.num_heads: got {num_heads}; must divide {width}, the width of all "
                    f"queries of {where} together; omit it, or choose a common divisor"
                )


def _check_cache(context: RunContext) -> None:
    cache = context.recipe.cache
    if cache.enabled and cache.path is not None and cache.path.is_file():
        raise RecipeError(f"cache.path: got {cache.path}, which is a file; must be a folder")
    size = context.vocab_size
    if cache.enabled and isinstance(cache.targets, TopK) and cache.targets.k > size:
        raise RecipeError(
            f"cache.targets.k: got {cache.targets.k}; must be at most the vocabulary size, {size}"
        )


def _check_finished_caches(context: RunContext) -> None:
    """Compare finished caches with the run, except for a fusion that is not chosen yet."""
    # Imported here: it takes longer than a whole check.
    from collegium.run.artifacts import caches

    recipe = context.recipe
    if not recipe.cache.enabled or not recipe.teachers:
        return
    if recipe.cache.features is not None and context.student.needs_importance:
        return  # which hidden states are cached follows from a measurement
    if recipe.cache.kind == "fused" and not isinstance(recipe.fusion, Fusion):
        built, unknown = [FusedCache(context, Fusion())], {"fusion"}
    else:
        built, unknown = caches(context), set[str]()
    for cache in built:
        assert isinstance(cache, Cache)
        if cache.is_own:
            continue  # set aside, and built again
        manifest = read_manifest(cache.location)
        if manifest is not None:
            pair = (manifest.identity, cache.identity())
            old, new = ({k: v for k, v in one.items() if k not in unknown} for one in pair)
            require_identity(cache.location, old, new)


def _stress(options: ModelOptions) -> tuple[object, ...]:
    """Return the options that make another teacher of the same weights."""
    return (getattr(options, "quantize", None), getattr(options, "logit_scale", 1.0))


def _check_distinct(checked: Models, report: CheckReport) -> None:
    """Check that no two teachers are the same: one teacher would be counted twice."""
    models = {w: one for w, one in checked.items() if isinstance(one, ModelOptions)}
    layouts = {where: weights_layout(options.model) for where, options in models.items()}
    count = Counter(layouts.values())
    # Whole files are read only of models that share names, types, shapes and some values.
    samples = {
        where: (layouts[where], weights_sample(options.model))
        for where, options in models.items()
        if count[layouts[where]] > 1
    }
    count = Counter(samples.values())
    seen: dict[object, str] = {}
    for where, options in models.items():
        if where not in samples or count[samples[where]] == 1:
            continue
        digest = weights_digest(options.model)
        revision = None if layouts[where] else options.revision
        adapter = options.adapter and adapter_identity(options.adapter, where=where)
        # With another scale it is another teacher, as in stress tests and studies of copies.
        key = (digest, revision, str(adapter), *_stress(options))
        other = seen.setdefault(key, where)
        if other != where and where == "student":
            effect = "its distillation loss to that teacher starts at 0"
            report.warnings.append(f"student: equals {other}; {effect}")
        elif other != where:
            raise RecipeError(
                f"{other} and {where} are the same weights (sha256 {digest[:12]}...); must differ; "
                "remove one"
            )
