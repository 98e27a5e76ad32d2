"""`make gpu`, at toy sizes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_the_dry_run_writes_a_table_of_every_step(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Without `--all`, only of the steps that start few processes."""
    tables = {"half_heads": "| K | rounded, ms |", "sharded_step": "| FSDP2 |"}
    if request.config.getoption("--all"):
        tables |= {"tests": "skipped", "training": "| targets | tokens/s |"}
        tables["loss"] = "| K | case | seconds |"
    ended = run("--dry-run", "--output-dir", tmp_path, "--steps", *tables)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{len(tables)} of {len(tables)} steps done" in ended.stdout
    summary = (tmp_path / "summary.md").read_text()
    for table in tables.values():
        assert table in summary


def test_a_failed_step_stops_no_other_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    def step(name: str, code: str, minutes: float = 1.0) -> object:
        (tmp_path / f"{name}.py").write_text(code)
        return gpu.Step(name, name, "", str(tmp_path / f"{name}.py"), minutes, saves=False)

    steps = (
        step("bad", "print('why it failed'); raise SystemExit(3)"),
        step("endless", "import time; time.sleep(60)", 0.01),
        step("good", "print('a table')"),
    )
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--output-dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    assert "1 of 3 steps done" in capsys.readouterr().out
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "failed with exit code 3" in summary
    assert "why it failed" in summary
    assert "stopped at its limit" in summary
    assert "a table" in summary
