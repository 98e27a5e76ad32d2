"""The page of serving commands: its script runs the blocks that have an output."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmark_modules import ROOT, load_benchmark

PAGE = """\
## a
```python
print(open("runs/demo/name").read(), 1 + 1)
```

```text
old
```

Not run:

```sh
false
```

```sh
echo two; echo lines
```

```text
```
"""


@pytest.fixture(scope="module")
def serving():
    return load_benchmark("serving")


def test_blocks_with_an_output_are_run_and_no_others(serving, tmp_path: Path) -> None:
    (tmp_path / "name").write_text("student")
    text = serving.run_page(PAGE, tmp_path)
    assert "```text\nstudent 2\n```" in text
    assert "```text\ntwo\nlines\n```" in text
    assert "```sh\nfalse\n```" in text
    assert serving.run_page(text, tmp_path) == text


def test_a_failing_block_is_an_error(serving, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        serving.run_page("```sh\nfalse\n```\n\n```text\n```", tmp_path)


def test_every_block_of_the_page_has_an_output_or_is_marked() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert [one.split("\n", 1)[0] for one in sections] == [
        "transformers",
        "ONNX Runtime",
        "llama.cpp",
        "Ollama",
        "vLLM",
    ]
    for section in sections:
        for before, code, after in re.findall(
            r"([^\n]*)\n+```(?:python|sh)\n(.*?)```\n*(```text\n.*?\n```)?", section, re.DOTALL
        ):
            has_output = re.fullmatch(r"```text\n.+\n```", after, re.DOTALL)
            assert has_output or "Not run" in section, (before, code)
    outputs = re.findall(r"```text\n(.*?)\n?```", text, re.DOTALL)
    assert all(outputs), "run benchmarks/serving.py"


def test_the_python_of_the_page_compiles() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, "docs/serving.md", "exec")
