"""Commented recipe that `collegium init` writes."""

TEMPLATE = """\
# A recipe of Collegium: several frozen teachers, one student.
# `collegium check collegium.yaml` reports errors in it before any model is loaded.
# Relative paths are resolved from the current directory.
name: my-run
output_dir: runs/my-run
seed: 0

# The model to train: a Hugging Face folder or the name of a model on the Hub.
student:
  model: models/student
  dtype: float32

# The frozen models to distill, any number, each under a name of your choice.
# All must share the student's vocabulary.
teachers:
  general:
    model: models/teacher-general
    dtype: bfloat16
  code:
    model: models/teacher-code
    dtype: bfloat16

# Training text; results are grouped by `domain`.
data:
  train:
    - path: corpus/web/*.jsonl
      domain: web
    - path: corpus/code/*.jsonl
      domain: code
  max_length: 512

# How to fuse the teachers into one target: `auto` lets preflight choose. By hand, for example:
# fusion:
#   {weighting: {name: prefix_likelihood, eta: 0.3}, pool: linear, temperatures: {code: 1.2}}
fusion: auto

# kd_ratio * divergence(fused teachers, student) + (1 - kd_ratio) * cross-entropy
objective:
  kd_ratio: 0.9
  temperature: 1.0
  divergence: forward_kl

# Names of Hugging Face training arguments.
train:
  learning_rate: 1e-4
  max_steps: 1000
  per_device_train_batch_size: 16

# Measurements before training, on held-out text.
preflight:
  max_tokens: 20000

# Control students for comparison: ce_only, ce_only_equal_compute, best_single, uniform, entropy.
evaluate:
  controls: [ce_only]
"""
