"""Mutation testing, run on demand: which changed lines does no test notice?

    python tests/mutants.py                    # all, in about an hour on one idle core
    python tests/mutants.py pools.py 12        # those of a file, or one by its number

Each mutation changes one line in a copy of `src` in a temporary folder, and runs the tests that
should fail. Exit code 1 if a mutation survives.
"""

# ruff: noqa: E501
# Changed lines are quoted in full.

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 240
"""Seconds for the tests of one mutation; an endless loop counts as noticed."""
SURVIVES_ON_PURPOSE: dict[str, str] = {
    'temporary.open("xb")': "the file was just removed: only a link planted in between differs",
    "if not _exp_is_safe(max_s):": "sums that overflow are NaN, and read again with a shift",
}
"""Text before -> the reason why the change has no effect that a test could see."""


class Mutation(NamedTuple):
    file: str
    before: str
    after: str
    tests: str
    """Test files below `tests`, separated by spaces, the likeliest first."""


def _of(file: str, tests: str, *pairs: tuple[str, str]) -> list[Mutation]:
    return [Mutation(file, before, after, tests) for before, after in pairs]


MUTATIONS = [
    *_of(
        "fusion/pools.py",
        "fusion/test_target_use.py fusion/test_fuse.py fusion/test_weighting.py fusion/test_rules.py",
        ("top_logp_n = torch.where(rest_n < 0.5,", "top_logp_n = torch.where(rest_n < 0.0,"),
        ("prob_nV.scatter_(1, top_n[:, None], 0.0)", "pass"),
        ("max_logp_n, top_n = logp_nV.max(-1)", "max_logp_n, top_n = logp_nV.min(-1)"),
        ("share_n = score_n - self._total_n", "share_n = score_n - before_n"),
        ("before_n - self._total_n)", "before_n)"),
        ("mean_nV.add_(log_kept_n[:, None].to(dtype))", "pass"),
        ("entering_nV.add_(log_share_n[:, None].to(dtype))", "pass"),
        ("mean_nV.div_(self.exponent)", "pass"),
        ('scale = 1.0 - self.exponent if', "scale = 1.0 if"),
        ('kind = "logp" if self.in_logs else "prob"', 'kind = "prob"'),
        (".clamp(min=0.0)\n        return replace(stats", "\n        return replace(stats"),
    ),
    *_of(
        "fusion/fuse.py",
        "fusion/test_target_use.py fusion/test_fuse.py fusion/test_conflict.py",
        ("torch.log_softmax(target.logp_() / temperature, dim=-1)", "target.logp_() / temperature"),
        ("torch.log_softmax(target.logp_() / softness, dim=-1)", "target.logp_() / 1.0"),
        ('"logp", temperature=softness)', '"logp")'),
        ("self._needs_logp = use.reads_logp or", "self._needs_logp = False and"),
        ("weighted_Kn = self.weights_Kn * self.stats.entropy_KN", "weighted_Kn = self.weights_Kn"),
        ("within_n = torch.where(self.weights_Kn > 0, weighted_Kn, 0.0).sum(0)", "within_n = 0.0"),
        ("is_changed_n = (changed_Kn != score_Kn).any(0)", "is_changed_n = (changed_Kn != score_Kn).all(0)"),
        ("self._next_row = stop", "pass"),
        ("corrected_n = self._fusion.conflict.correct_(target.rows.values_nV, labels_n)", "corrected_n = None"),
    ),
    *_of(
        "fusion/calibration.py",
        "fusion/test_calibration.py",
        ("if len(tables.grid) == 1:", "if False:"),
        ("if float(nll_G.max() - nll_G.min()) < MIN_GAIN:", "if False:"),
        ("nll_G, entropy_G - nll_G)", "nll_G)"),
        ("best + (0 if slope_G[best] < 0 else -1)", "best + (0 if slope_G[best] > 0 else -1)"),
        ("return grid[max(left, 0)]", "return 1.0"),
        ("3 * drift - 2 * rise - fall", "3 * drift - rise - fall"),
        ("vertex = log_grid[1] - linear / (2 * square)", "vertex = log_grid[1] + linear / (2 * square)"),
        ("if temperature == grid[0]:", "if False:"),
        ("for octave in range(3, 6)", "for octave in range(3, 4)"),
        ("if nll_G[index] < best - MIN_GAIN:", "if nll_G[index] > best:"),
        ("next_document = int(documents.max()) + 1", "next_document = int(documents.max())"),
        ("gap = np.subtract(binned[\"confidence\"], binned[\"accuracy\"])", "gap = np.add(binned[\"confidence\"], binned[\"accuracy\"])"),
        ("label_GN = torch.logaddexp(label_GN, score_N + label_logp_KGN[other][g])", "label_GN = torch.logaddexp(label_GN, score_N)"),
    ),
    *_of(
        "fusion/rules.py",
        "fusion/test_weighting.py fusion/test_fuse.py fusion/test_rules.py",
        ("return -entropy_KN.clamp(min=MIN_ENTROPY).log()", "return -entropy_KN.clamp(min=1e-3).log()"),
        ("return -entropy_KN / self.tau", "return entropy_KN / self.tau"),
        ("return torch.log1p(-share_KN.clamp(max=1.0))", "return torch.log1p(-share_KN.clamp(max=0.5))"),
        ("carried_K = torch.where(continues, self.decay * carry.evidence_K, zero)", "carried_K = self.decay * carry.evidence_K"),
        ("distance *= 2", "distance *= 4"),
        ("return -stats.consensus_kl().double() / self.tau", "return -stats.consensus_kl().double()"),
        (".masked_fill(ce_KN > ce_KN.amin(0), -torch.inf)", ".masked_fill(ce_KN >= ce_KN.amax(0), -torch.inf)"),
        ("return torch.exp(-ce_KN) if", "return torch.exp(ce_KN) if"),
        ("return (sum_KD / count_KD.clamp(min=1.0))[:, place_N]", "return sum_KD[:, place_N]"),
    ),
    *_of(
        "fusion/conflict.py",
        "fusion/test_conflict.py fusion/test_target_use.py",
        ("jsd_n = mixture_entropy_n - (weights_Kn * entropy_Kn).sum(0)", "jsd_n = mixture_entropy_n"),
        ("torch.where(weight_entropy_n > 0, conflict_n, 0.0)", "conflict_n"),
        ("return (1.0 - disagreement_n) ** self.power", "return 1.0 - disagreement_n"),
        ("(gap_n + self.margin) / (1.0 + gap_n)", "self.margin / (1.0 + gap_n)"),
        ("logp_nV += torch.log1p(-share_n)[:, None]", "pass"),
        ("min_logp_n = logp_Kn.amax(0) + math.log(self.share)", "min_logp_n = logp_Kn.amax(0)"),
        ("(score_Kn < score_Kn.amax(0))", "(score_Kn <= score_Kn.amax(0))"),
        ("corrects_target = True", "corrects_target = False"),
    ),
    *_of(
        "fusion/merge.py",
        "fusion/test_merge.py fusion/test_mixed_answers.py",
        ("torch.where(prob_E > 0, -prob_E * named.logp, 0.0)", "-prob_E"),
        ("label_n[row_E[is_label_E]] = named.logp[is_label_E]", "pass"),
        ("return rest_N + self.num_others_N.log()", "return rest_N"),
        ("return logp_M - log_z_N[self.row_M], rest_N - log_z_N", "return logp_M, rest_N"),
        ("logw_KN = changed_KN.log_softmax(0)", "pass"),
        ("return (logw_KX.exp() * logp_KX).sum(0)", "return logp_KX.sum(0)"),
    ),
    *_of(
        "fusion/fitted.py",
        "fusion/test_fitted.py fusion/test_rules.py fusion/test_routing.py",
        ("while blocks and blocks[-1][0] >= mean:", "while False:"),
        ("weight_K = (explained_K + prior_K) / (num_rows + prior_K.sum())", "weight_K = explained_K / num_rows"),
        ("return torch.lerp(y_M[left_N], y_M[right_N], share_N)", "return y_M[left_N]"),
        ("if num_routed != len(rows):", "if False:"),
        ("number_N = torch.where(rows.teachers != 0, rows.teachers, number_N)", "pass"),
        ("score_KN = torch.where(is_here_N, domain_score_KN, score_KN)", "pass"),
    ),
    *_of(
        "kernels/plain.py",
        "kernels/test_kernels.py",
        ("if not _exp_is_safe(max_s):", "if False:"),
        ("NEARLY_CERTAIN = 0.01", "NEARLY_CERTAIN = 0.0"),
        ("count_s.log() + torch.log1p(rest_s / count_s)", "(count_s + rest_s).log()"),
        ("shifted_sV.div_(temperature)", "shifted_sV"),
        ("exp_sV.addcmul_(prob_sV, kd_s1, value=-1.0 / temperature)", "exp_sV.addcmul_(prob_sV, kd_s1, value=-1.0)"),
        ("grad_sV.mul_(slope_sV)", "pass"),
        ("grad_sV.mul_(rows.scale)", "pass"),
        ("mean_sV.mul_((1.0 - share_n)[part, None])", "pass"),
        ("MIN_UNIT = 1e-30", "MIN_UNIT = 0.0"),
    ),
    *_of(
        "kernels/rows.py",
        "losses/test_block_engine.py kernels/test_kernels.py",
        ("torch.promote_types(head.weight.dtype, torch.float32)", "head.weight.dtype"),
        ("add_product_(out_nV[:, part], hidden_nD, weight_VD[part].T, beta=0)", "add_product_(out_nV[:, part], hidden_nD, weight_VD[part].T)"),
        ("self.scale * (1.0 - tanh_E.square())", "self.scale * tanh_E"),
    ),
    *_of(
        "losses/divergences.py",
        "losses/test_divergences.py",
        ("return _kl(target_logp_nS.clamp(min=LOG_FLOOR), student_logp_nS)", "return _kl(student_logp_nS, target_logp_nS.clamp(min=LOG_FLOOR))"),
        ("return 0.5 * (target_nS - student_logp_nS.exp()).abs().sum(-1)", "return (target_nS - student_logp_nS.exp()).abs().sum(-1)"),
        ("logq_nS + math.log1p(-share))", "logq_nS + math.log(share))"),
        ("LOG_FLOOR = -1e4", "LOG_FLOOR = -1e1"),
        ("return -(mixed_n - a / total * target_n - b / total * student_n) / (a * b)", "return -(mixed_n - target_n - student_n) / (a * b)"),
    ),
    *_of(
        "losses/terms.py",
        "losses/test_row_losses.py losses/test_named_targets.py fusion/test_target_use.py train/test_terms.py",
        ("if temperature != 1.0 and target.temperature == temperature:", "if False:"),
        ("ce_n = ce_n + weights[name] * factors[name]", "ce_n = ce_n + weights[name]"),
        ("missing_n = (-ce_n * slope_n)", "missing_n = (-ce_n)"),
        ("return -torch.expm1(max_n + scaled_n.log())", "return 1 - max_n.exp()"),
        ("ce_n + share_n * pull_n)", "ce_n + share_n)"),
        ("logq_E.exp() * (tail_n / rest_n)[row_E] - t_E", "-t_E"),
    ),
    *_of(
        "losses/features.py",
        "losses/test_features.py",
        ("x_ND = x_ND / largest_N1.masked_fill(is_zero_N1, 1.0)", "pass"),
        (".masked_fill(is_zero_N1, 1.0))", ")"),
        ("return 1 - (ours_ND * theirs_ND).mean(-1)", "return 1 - (ours_ND * theirs_ND).sum(-1)"),
        ("std=student_width**-0.5", "std=1.0"),
    ),
    *_of(
        "losses/states.py",
        "losses/test_features.py",
        ("is_usable_K = ratio_K.isfinite() & (ratio_K > 0)", "is_usable_K = ratio_K > -1"),
        ("sums, self._sums = self._sums, None", "sums = self._sums"),
    ),
    *_of(
        "losses/attention.py",
        "losses/test_attention.py",
        ("return places_l <= rows_n[:, None]", "return places_l < rows_n[:, None] + 1000"),
        ("* states.scale", "* 1.0"),
        ("starts_M[rows.index[first]], rows", "rows.index[first], rows"),
        ("logp_Hnl.logsumexp(0) - math.log(len(logp_Hnl))", "logp_Hnl.mean(0)"),
        ("* (width / num_heads) ** -0.5", "* width ** -0.5"),
        ("square_Hnl.sum(-1) / is_past_nl.sum(-1)", "square_Hnl.mean(-1)"),
    ),
    *_of(
        "losses/schedule.py",
        "losses/test_schedule.py",
        ("position if position > 1 else", "position if position >= 1 else"),
        ("sum(step >= end", "sum(step > end"),
        ("min(max((step - start) / (end - start), 0.0), 1.0)", "(step - start) / (end - start)"),
        ("math.ceil(_steps(position, num_steps))", "int(_steps(position, num_steps))"),
    ),
    *_of(
        "losses/row_terms.py",
        "train/test_terms.py",
        ("if self.domains is None:", "if True:"),
        ("* self.temperature**2", ""),
    ),
    *_of(
        "losses/engine.py",
        "losses/test_block_engine.py",
        ("grads = [\n            None if grad is None else _scaled(grad, grad_output,", "grads = [\n            None if grad is None else _scaled(grad, grad_output * 0 + 1,"),
        ("if not is_kept:\n            ctx.grads = None", "if not is_kept:\n            pass"),
        ("dbias_V += gradient_nV.sum(0, dtype=self.dtype)", "pass"),
        (".square()\n\n    def attach", "\n\n    def attach"),
    ),
    *_of(
        "data/order.py",
        "data/test_encode.py data/test_pack.py data/test_corpus.py",
        ('seeded_hash(content_hash, seed, "split")', 'seeded_hash(content_hash, seed, "order")'),
        ('return "calibration" if share < validation + calibration else "train"', 'return "calibration" if share < calibration else "train"'),
        ("if is_shared.any():", "if False:"),
        ("_break_ties(ordered[part], corpus)", "pass"),
    ),
    *_of(
        "data/budgets.py",
        "data/test_corpus.py data/test_pack.py",
        ("room -= size", "pass"),
        ("used[name] += size", "pass"),
        ("size = truncated[place] = share", "size = share"),
    ),
    *_of(
        "data/layout.py",
        "data/test_pack.py",
        ("start = stop - 1", "start = stop"),
        ("room - (stop - start) if packing else 0", "room - (stop - start)"),
    ),
    *_of(
        "data/windows.py",
        "data/test_pack.py data/test_corpus.py",
        ('is_target[columns["position_ids"] == 0] = False', "pass"),
        ('num_bytes[columns["is_repeat"]] = 0', "pass"),
        ("if self._new_ids_V is None:\n            return self.facts", "if True:\n            return self.facts"),
    ),
    *_of(
        "data/corpus_folder.py",
        "data/test_corpus.py",
        ("sha256_of(path) != file.sha256", "False"),
        ("        self._check_unchanged()\n", ""),
    ),
    *_of(
        "data/pool.py",
        "data/test_corpus.py",
        ("return content.info if is_intact(folder, content.info.files) else None", "return content.info"),
        ("if content is None or content.info.key != shard_key(documents):", "if True:"),
    ),
    *_of(
        "data/tokens.py",
        "data/test_encode.py data/test_pack.py",
        ("is_target[:1] = False", "pass"),
        ("end_bytes[-1] = before[-1]", "pass"),
        ("np.maximum.accumulate(before[ends])", "before[ends]"),
    ),
    *_of(
        "storage/files.py",
        "storage/test_files.py",
        ("            os.fsync(file.fileno())\n", ""),
        ("        raise\n    # The rename is durable only once the directory entry is on disk.\n    fsync(path.parent)\n", "        raise\n"),
        ("temporary.unlink(missing_ok=True)\n        raise", "raise"),
        ("allow_nan=False", "allow_nan=True"),
        ("sort_keys=True, default=str", "default=str"),
        ('temporary.open("xb")', 'temporary.open("wb")'),
    ),
    *_of(
        "cache/keys.py",
        "cache/test_store.py cache/test_build.py run/test_caching.py",
        ("digest.update(np.ascontiguousarray(is_target, bool).tobytes())", "pass"),
        ("if sample >= 0 and is_target.any():", "if sample >= 0:"),
    ),
    *_of(
        "train/objective.py",
        "train/test_objective.py fusion/test_target_use.py",
        ("reads_logp=not is_plain_kl", "reads_logp=False"),
        ("== self._num_steps and not self._moved[name]:", "== 0:"),
    ),
    *_of(
        "train/meter.py",
        "train/test_meter.py",
        ("loss=sums.get(\"loss\", 0.0) / rows", "loss=sums.get(\"loss\", 0.0)"),
        ("grad_shares={n: x / total_norm", "grad_shares={n: x"),
        ("self._sums[name] + value if name in self._sums", "value if name in self._sums"),
    ),
    *_of(
        "cache/encode.py",
        "run/test_caching.py run/test_cached_features.py cache/test_build.py run/test_per_teacher.py",
        ("offset_N = batch.position_ids.flatten()[rows.index].cpu().numpy() + 1", "offset_N = batch.position_ids.flatten()[rows.index].cpu().numpy()"),
        ("offset_N += np.array([key.offset for key in key_N], np.int64)", "pass"),
        ("return pieces[starts.index(start)].start", "return 0"),
        ("scaled_nV = logp_nV / temperature", "scaled_nV = logp_nV * temperature"),
        ('"max_logp": logp_nV.amax(1)', '"max_logp": logp_nV.amin(1)'),
        ("num_rows += batch.num_rows()\n            if num_rows", "if num_rows"),
    ),
    *_of(
        "cache/codecs/targets.py",
        "cache/codecs/test_targets.py cache/codecs/test_renormalized.py",
        ("right=True)", "right=False)"),
        ("cdf_nV = logp_nV.to(torch.float64, copy=True)", "cdf_nV = logp_nV.to(torch.float32, copy=True)"),
        ("level_nN = torch.minimum(uniform_nN * total_n1, below_n1)", "level_nN = uniform_nN"),
        ("np.uint16 if vocab_size <= 2**16", "np.uint16 if vocab_size <= 2**17"),
        ("if (rows[\"counts\"] == 0).any() or", "if"),
        ("np.log(_row_sums(np.exp(logp), columns[\"sizes\"]))", "0.0"),
        ("STEP = 1 / 64", "STEP = 1 / 8"),
        ("key_n = _mix(document_n.astype(np.uint64) ^ _mix(np.array([seed], np.uint64)))", "key_n = _mix(document_n.astype(np.uint64))"),
    ),
    *_of(
        "cache/codecs/token_ranks.py",
        "cache/codecs/test_token_ranks.py cache/codecs/test_targets.py",
        ("is_zero[first] = False", "pass"),
        ("if (heights > floor_E).any():", "if False:"),
        ("np.argsort(-counts, kind=\"stable\")", "np.argsort(-counts)[::1]"),
        ("ranks.max()) >= len(vocabulary)", "ranks.max()) > len(vocabulary)"),
    ),
    *_of(
        "cache/codecs/hidden.py",
        "cache/codecs/test_hidden.py",
        ("centered_MD = hidden_MD - mean_D", "centered_MD = hidden_MD"),
        ("main_DR = vectors_DD[:, ::-1][:, :rank]", "main_DR = vectors_DD[:, :rank]"),
        ("np.float32(LEVELS)\n", "np.float32(LEVELS * 2)\n"),
        ("safe_n1 = np.where(scale_n > 0, scale_n, np.float32(1.0))[:, None]", "safe_n1 = scale_n[:, None]"),
    ),
    *_of(
        "cache/store.py",
        "cache/test_store.py cache/test_build.py run/test_caching.py",
        ("if len(self._groups) > MAX_GROUPS:", "if False:"),
        ("if num_targets != self.manifest.num_targets:", "if False:"),
        ("    for entry in (*([side] if side else []), *manifest.shards):\n        verify_file(Location.of(where), entry)\n", ""),
        ("require_identity(where, manifest.identity, expected)", "pass"),
    ),
    *_of(
        "cache/shards.py",
        "cache/test_index.py",
        ("return int(self.documents[n]) == key.document and self.windows[n].tobytes() == key.window", "return True"),
    ),
    *_of(
        "cache/shards.py",
        "cache/test_store.py",
        ("if n == 0 or one != windows[n - 1]]", "]"),
    ),
    *_of(
        "cache/cluster.py",
        "cache/test_cluster.py",
        ("waiting.appendleft(task)", "pass"),
        ("if changes := differing_fields(identity, source.identity()):", "if changes := []:"),
        ("if amount > available.get(name, 0):", "if False:"),
    ),
    *_of(
        "cache/store.py",
        "cache/test_index.py",
        ("if place is None and self._index.is_stored:", "if False:"),
        ("                self._verified.verify(entry)\n", ""),
        ("verified=not is_stored(self.manifest)", "verified=True"),
    ),
    *_of(
        "cache/index.py",
        "cache/test_index.py",
        ("windows[:, 0] ^ documents", "windows[:, 0]"),
        ("(rows[:2, 1:] != rows[:2, :-1]).any(0)", "(rows[:2, 1:] != rows[:2, :-1]).all(0)"),
        ("if n == stop or self.rows[1, n] != second:", "if n == stop:"),
        ("stored = None if is_fresh else PieceIndex.load(file)", "stored = PieceIndex.load(file)"),
    ),
    *_of(
        "cache/verified.py",
        "cache/test_index.py",
        ("if line is not None and line in self._lines:", "if line is not None:"),
        ("if line is not None and line in self._lines:", "if False:"),
        ("entry.bytes < REMEMBERED_BYTES", "False"),
        ('return f"{entry.sha256} {entry.bytes} {changed} {path}"', 'return f"{entry.sha256} {entry.bytes} {path}"'),
    ),
    *_of(
        "cache/manifest.py",
        "cache/test_store.py cache/test_build.py storage/test_location.py",
        ('if not isinstance(values, dict) or values.get("sha256") != manifest_digest(values):', "if not isinstance(values, dict):"),
        ("if sums != (self.num_targets, self.num_bytes):", "if False:"),
        ("if num_bytes != entry.bytes:", "if False:"),
        ("if location.sha256(entry.name) != entry.sha256:", "if False:"),
    ),
    *_of(
        "cache/build.py",
        "cache/test_build.py cache/test_processes.py",
        ("if name == file.name and sha256.startswith(match[2]):", "if name == file.name:"),
        ("if shutil.disk_usage(self.path).free < needed * SPACE_MARGIN:", "if False:"),
        ("missing = [number for number in numbers if number not in self.shards]", "missing = numbers"),
        ("require_identity(path, other.of_cache(), example.of_cache())", "pass"),
    ),
    *_of(
        "train/trainer.py",
        "train/test_trainer.py train/test_resume.py train/test_parts.py train/test_arguments.py",
        ("mean = total * (self.args.world_size if model.training else 1) / num_tokens", "mean = total / max(loss.num_rows, 1)"),
        ("num_rows += batch.num_rows().to(device)", "num_rows = batch.num_rows().to(device)"),
        ("self.step.objective.end_step()", "pass"),
        ('optimizer.add_param_group({"params": adapters, "weight_decay": 0.0})', 'optimizer.add_param_group({"params": adapters, "weight_decay": 0.5})'),
        ("self._inert(loss)", "pass"),
        ("self._meter.load(state.read(folder)", "len(state.read(folder)"),
        ("state.load_rng_state(states[rank])", "len(states)"),
        ("parameters = list(self.step.student.parameters())", "parameters = list(self.step.parameters())"),
        ("added = (loss - self._step_loss) * num_items_in_batch / self.args.world_size", "added = (loss - self._step_loss)"),
        ("means = {f\"{prefix}_{name}\": value / num_tokens", "means = {f\"{prefix}_{name}\": value"),
    ),
    *_of(
        "train/state.py",
        "train/test_parts.py train/test_resume.py train/test_checkpoint.py train/test_wrapped_models.py",
        ("scheduler.load_state_dict(record[\"scheduler\"])", "pass"),
        ("plain.config.use_cache = training_value", "pass"),
        ("scheduler._last_lr = rates", "pass"),
        ("random.setstate((version, tuple(internal), gauss))", "pass"),
    ),
    *_of(
        "train/checkpoint.py",
        "train/test_checkpoint.py train/test_resume.py",
        ("        fsync(path)\n        name = path.relative_to", "        name = path.relative_to"),
        ("    fsync(manifest)\n", ""),
        ("        if old.exists():\n            os.rename(old, final)\n        raise", "        raise"),
        ("by_rank[max(keep, 2) :]", "by_rank[max(keep, 1) :]"),
        ("problem = damage(folder, manifest.digests())", "problem = None"),
        ("if manifest.format > FORMAT:", "if False:"),
        ("            path.unlink()\n    for name, path in new.items():", "            pass\n    for name, path in new.items():"),
    ),
    *_of(
        "train/step.py",
        "train/test_parts.py train/test_objective.py train/test_router_loss.py losses/test_row_losses.py train/test_trainer.py",
        # The gradients of the adapters, which are not the student's, would never be cleared.
        ("        self.student = student\n", "        self.student = student\n        self.zero_grad = student.zero_grad\n"),
        ("square_norms[name] += engine.square_norm(gradient_nV)", "square_norms[name] = engine.square_norm(gradient_nV)"),
        ("sums[name] += value_n.sum(dtype=engine.dtype)", "sums[name] = value_n.sum(dtype=engine.dtype)"),
        ("router_weight(self.student)", "1.0"),
        ("if self.teachers and objective.needs_teachers and not labels_only:", "if self.teachers and not labels_only:"),
    ),
    *_of(
        "evaluate/metrics.py",
        "evaluate/test_metrics.py evaluate/test_scoring.py evaluate/test_results.py",
        ("return self.nll - _mean(self.entropy_N)", "return self.nll + _mean(self.entropy_N)"),
        ("nats / math.log(2) / num_bytes", "nats / num_bytes"),
    ),
    *_of(
        "evaluate/scoring.py",
        "evaluate/test_scoring.py",
        ("torch.sub(target_nV, logp_nV, out=scratch_nV)", "torch.sub(logp_nV, target_nV, out=scratch_nV)"),
        ("top1_n == labels_n", "top1_n != labels_n"),
        ("np.linspace(0, size, num_kept, endpoint=False)", "range(num_kept)"),
    ),
]  # fmt: skip


def main() -> int:
    words = sys.argv[1:]
    numbered = [
        (number, mutation)
        for number, mutation in enumerate(MUTATIONS)
        if not words or any(w in (str(number), Path(mutation.file).name) for w in words)
    ]
    # Imported once: each mutation runs in a fork, which has only our own modules to import.
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        source = Path(folder, "src")
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        # A test that fails anyway would kill everything.
        files = dict.fromkeys(test for _, m in numbered for test in m.tests.split())
        unchanged = _outcome(list(files), source, math.inf, is_shown=True)
        if unchanged != "survived":
            print(f"without a mutation: {unchanged}; must pass")
            return 1
        for number, mutation in numbered:
            started = time.monotonic()
            verdict = _verdict(mutation, source)
            if verdict not in ("killed", "timeout") and mutation.before not in SURVIVES_ON_PURPOSE:
                survivors.append(number)
            seconds = time.monotonic() - started
            line = mutation.before.strip().splitlines()[0][:60]
            print(f"{number:3} {verdict:9} {seconds:4.0f} s  {mutation.file}: {line}", flush=True)
    num_killed = len(numbered) - len(survivors)
    print(f"{num_killed} of {len(numbered)} killed or explained; survivors: {survivors}")
    return 1 if survivors else 0


def _verdict(mutation: Mutation, source: Path) -> str:
    path = source / "collegium" / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.before) != 1:
        return f"{text.count(mutation.before)} places"
    path.write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")
    try:
        return _outcome(mutation.tests.split(), source)
    finally:
        path.write_text(text, encoding="utf-8")


def _outcome(
    tests: list[str], source: Path, seconds: float = TIMEOUT, *, is_shown: bool = False
) -> str:
    child = os.fork()
    if child == 0:
        os.setsid()
        _run(tests, source, is_shown=is_shown)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            # Another exit code of pytest is no failed test: none was found, or it could not start.
            code = os.waitstatus_to_exitcode(status)
            return {0: "survived", 1: "killed"}.get(code, f"exit {code}")
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def _run(tests: list[str], source: Path, *, is_shown: bool) -> None:
    import pytest

    if not is_shown:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
    os.chdir(ROOT)
    sys.path.insert(0, str(source))
    # Child processes import test modules by their full names.
    sys.path.append(str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(source), str(ROOT / "tests"), str(ROOT)])
    sys.dont_write_bytecode = True
    options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", "-m", "not gpu and not slow"]
    # Plugins that the parent has imported are not rewritten, which is an error by our settings.
    options += ["-W", "ignore:Module already imported"]
    code = 1
    try:
        code = int(pytest.main([*options, *(str(ROOT / "tests" / test) for test in tests)]))
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
