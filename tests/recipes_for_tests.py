"""Smallest valid recipe, as text, and variations of it."""

MINIMAL = """\
student: {model: models/student}
teachers:
  code: {model: models/code}
  prose: {model: models/prose}
data:
  train:
    - path: corpus/*.jsonl
      domain: web
objective:
  kd_ratio: 0.9
train:
  max_steps: 10
"""


def minimal(**replaced: str) -> str:
    """Render `MINIMAL` with sections replaced (`train="{max_steps: 3}"`), dropped (`""`) or new."""
    sections: dict[str, str] = {}
    for line in MINIMAL.splitlines():
        if not line.startswith(" "):
            key, _, rest = line.partition(":")
            sections[key] = rest
        else:
            sections[key] += "\n" + line
    sections.update({key: f" {value}" for key, value in replaced.items()})
    return "".join(f"{key}:{value}\n" for key, value in sections.items() if value.strip())
