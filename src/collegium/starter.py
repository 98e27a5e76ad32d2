"""The commented recipe that `collegium init` writes."""

TEMPLATE = """\
# A recipe of Collegium: several frozen teachers, one student.
# `collegium check collegium.yaml` tells what is wrong with it before anything heavy is loaded.
# Relative paths are relative to the folder in which you run the command.
name: my-run
output_dir: runs/my-run
seed: 0

# The model that learns: a Hugging Face folder or the name of a model on the hub.
student:
  model: models/student
  dtype: float32

# The frozen models that it learns from, as many as you like, each under a name of your own.
# All must share the student's vocabulary.
teachers:
  general:
    model: models/teacher-general
    dtype: bfloat16
  code:
    model: models/teacher-code
    dtype: bfloat16

# Text to learn from; `domain` groups the rows of the results.
data:
  train:
    - path: corpus/web/*.jsonl
      domain: web
    - path: corpus/code/*.jsonl
      domain: code
  max_length: 512

# How the teachers become one target: `auto` takes what preflight measures to be best. By hand, for example:
# fusion: {weighting: {name: prefix_likelihood, eta: 0.3}, pool: linear, temperatures: {code: 1.2}}
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

# What is measured before training, on held-out text.
preflight:
  max_tokens: 20000

# Students trained for comparison: ce_only, ce_only_equal_compute, best_single, uniform, entropy.
evaluate:
  controls: [ce_only]
"""
