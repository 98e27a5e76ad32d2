"""Files that somebody has written on purpose: all are refused in one message, none is obeyed.

Digests in them are right, so that what protects from damage does not protect from these.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

import cache_cases
import run_fixture
from collegium.cli import app
from collegium.storage.files import fingerprint
from recipes_for_tests import minimal

CANARY = "canary-7f3a"
TITLE = "\x1b]0;pwned\x07"
DEEP = "[" * 100_000
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]")
ODD: Mapping[str, Any] = {
    "null": None,
    "a list": [],
    "an object": {},
    "text": "x",
    "escapes": TITLE,
    "a negative number": -1,
    "a fraction": 1.5,
    "a huge number": 10**400,
    "true": True,
}
"""Values that are wrong in most places."""

Case = Callable[[Path], list[str]]
"""Writes hostile files into a folder, and returns a command that reads them."""
CASES: dict[str, Case] = {}


def manifest_case(change: Callable[[dict[str, Any]], object], command: str) -> Case:
    def write(folder: Path) -> list[str]:
        cache_cases.build(folder / "cache", num_shards=1)
        cache_cases.rewrite_manifest(folder / "cache", change)
        return ["cache", command, str(folder / "cache")]

    return write


for value_name, odd in ODD.items():
    for field in ("format", "identity", "shards", "num_targets", "num_bytes", "side_file"):
        if (field, value_name) not in {("side_file", "null"), ("identity", "an object")}:
            CASES[f"cache manifest: {field} is {value_name}"] = manifest_case(
                lambda m, field=field, odd=odd: m.update({field: odd}), "verify"
            )
    for field in ("name", "sha256", "bytes", "targets"):
        CASES[f"cache manifest: {field} of a shard is {value_name}"] = manifest_case(
            lambda m, field=field, odd=odd: m["shards"][0].update({field: odd}), "verify"
        )
    for field in ("kind", "targets", "vocab_size"):
        CASES[f"cache identity: {field} is {value_name}"] = manifest_case(
            lambda m, field=field, odd=odd: m["identity"].update({field: odd}), "verify"
        )
NAMES = (
    "/etc/passwd", "../secret", "shard-00000-../../../etc", "C:\\secret", "shard-0.parquet\0",
    "", ".", "shard-00000-0123456789abcdef.parquet/../x", "con", "shard-00000-" + "a" * 300,
)  # fmt: skip
for name in NAMES:
    for command in ("info", "verify"):
        CASES[f"cache {command}: shard named {name!r:.30}"] = manifest_case(
            lambda m, name=name: m["shards"][0].update(name=name), command
        )


def text_case(file: str, text: str, *command: str) -> Case:
    def write(folder: Path) -> list[str]:
        if command[0] == "cache":
            cache_cases.build(folder / "cache", num_shards=1)
        else:
            run_fixture.write_run(folder / "run", controls=())
            (folder / "recipe.yaml").write_text(minimal(output_dir=str(folder / "run")))
        (folder / file).write_bytes(text.encode("utf-8", "surrogatepass"))
        return [part.format(folder=folder) for part in command]

    return write


REPORT = ("report", "{folder}/recipe.yaml")
TEXTS = {
    "nothing": "",
    "deep lists": DEEP,
    "deep objects": '{"a":' * 100_000,
    "a lone surrogate": '{"a": "\ud800"}',
    "a control character": '{"a": "\x1b"}',
    "two values": "{} {}",
    "not a number": "[NaN]",
    "a list of lists": "[[]]",
    "a text": json.dumps(TITLE),
}
for text_name, text in TEXTS.items():
    CASES[f"cache manifest: {text_name}"] = text_case(
        "cache/manifest.json", text, "cache", "verify", "{folder}/cache"
    )
    for file in ("stages.json", "preflight.json", "results.json", "environment.json"):
        if (file, text_name) not in {("environment.json", "a lone surrogate")}:
            CASES[f"run folder: {file} is {text_name}"] = text_case(f"run/{file}", text, *REPORT)
    if text:
        CASES[f"run folder: log.jsonl is {text_name}"] = text_case(
            "run/train/log.jsonl", f"{text}\n", *REPORT
        )


def stage_case(entry: dict[str, Any], key: str = "train") -> Case:
    def write(folder: Path) -> list[str]:
        run_fixture.write_run(folder / "run", controls=())
        (folder / "recipe.yaml").write_text(minimal(output_dir=str(folder / "run")))
        sealed = {**entry, "sha256": fingerprint([key, entry])}
        run_fixture.write_json(folder / "run/stages.json", {key: sealed})
        (folder / "secret").write_text(CANARY)
        return ["report", str(folder / "recipe.yaml")]

    return write


DIGEST = {"bytes": 1, "sha256": "0" * 64}
for value_name, odd in ODD.items():
    for field in ("status", "key", "note", "started", "seconds", "files"):
        is_allowed = odd is None or isinstance(odd, str) or (field, odd) == ("files", {})
        is_number = field == "seconds" and isinstance(odd, int | float)
        if not (is_allowed or is_number) or (field, value_name) in {("files", "text")}:
            CASES[f"stage: {field} is {value_name}"] = stage_case({field: odd})
    CASES[f"stage: a digest is {value_name}"] = stage_case({"files": {"results.json": odd}})
for name in ("/etc/passwd", "../secret", "a/../../secret", "a\\b", "\0", "", TITLE):
    CASES[f"stage: a file named {name!r:.20}"] = stage_case({"files": {name: DIGEST}})
for name in ("preflight.json", "results.json", "train/log.jsonl"):
    CASES[f"stage: another {name}"] = stage_case({"files": {name: DIGEST}})


def shard_case(table: Callable[[pa.Table], pa.Table]) -> Case:
    def write(folder: Path) -> list[str]:
        cache = folder / "cache"
        cache_cases.build(cache, num_shards=1)
        (shard,) = cache.glob("shard-*")
        pq.write_table(table(pq.read_table(shard)), shard)
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        named = shard.rename(cache / f"shard-00000-{digest[:16]}.parquet")
        entry = {"name": named.name, "sha256": digest, "bytes": named.stat().st_size}
        cache_cases.rewrite_manifest(
            cache,
            lambda m: m.update(num_bytes=entry["bytes"], shards=[{**m["shards"][0], **entry}]),
        )
        return ["cache", "verify", str(cache)]

    return write


def replaced(name: str, values: Callable[[pa.Table], pa.Array]) -> Callable[[pa.Table], pa.Table]:
    return lambda t: t.set_column(t.schema.get_field_index(name), name, values(t))


for column in ("document", "offset", "window", "sizes", "gaps", "counts", "vocabulary", "entropy"):
    CASES[f"shard: {column} is text"] = shard_case(
        lambda t, column=column: (
            replaced(column, lambda t: pa.array(["x"] * len(t)))(t)
            if column in t.column_names
            else t.append_column("more", pa.array(["x"] * len(t)))
        )
    )
    CASES[f"shard: without {column}"] = shard_case(
        lambda t, column=column: (
            t.drop_columns([column]) if column in t.column_names else t.slice(0, 0)
        )
    )
    CASES[f"shard: empty lists of {column}"] = shard_case(
        lambda t, column=column: (
            replaced(column, lambda t: pa.array([[]] * len(t), pa.list_(pa.uint8())))(t)
            if column in t.column_names
            else t.slice(0, 1)
        )
    )


def recipe_case(text: str | bytes, *overrides: str) -> Case:
    def write(folder: Path) -> list[str]:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        (folder / "recipe.yaml").write_bytes(data)
        return ["check", str(folder / "recipe.yaml"), *overrides]

    return write


RECIPES = {
    "an alias bomb": "a: &a [x]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)},' * 9}]\n" for i in range(9)),
    "an alias of itself": "a: &a [*a]",
    "code": minimal() + "x: !!python/object/apply:os.system [true]\n",
    "a class": minimal() + "_target_: os.system\n",
    "deep lists": f"student: {DEEP}",
    "deep objects": "student: " + '{"a":' * 100_000,
    "escapes in a key": minimal() + json.dumps(TITLE) + ": 1\n",
    "escapes in a value": minimal(fusion=json.dumps(TITLE)),
    "escapes in a name": minimal(name=json.dumps(TITLE)),
    "a reversing mark": minimal(name='"\u202egnp"'),
    "a NUL": minimal(output_dir='"a\\0b"'),
    "a surrogate": minimal(name='"\\ud800"'),
    "raw escapes": minimal() + f"{TITLE}: 1\n",
    "UTF-16": minimal().encode("utf-16"),
    "binary": bytes(range(256)),
    "nothing": "",
    "a list": "[1]",
    "two documents": "a: 1\n---\nb: 2\n",
    "a huge number": minimal(seed="1" + "0" * 5000),
    "an infinite number": minimal(train="{max_steps: .inf}"),
    "a huge file": "#" * 2_000_000,
    "many keys": "".join(f"k{i}: 1\n" for i in range(300)),
    "a secret": minimal(student=f"{{model: m, api_key: {CANARY}}}"),
    "a password in a URL": minimal(cache=f'{{url: "s3://a:{CANARY}@b/c"}}'),
    "a password in a path": minimal(data=f'{{train: [{{path: "https://a:{CANARY}@b/c"}}]}}'),
    "a signed URL": minimal(cache=f'{{url: "https://b/c?sig={CANARY}"}}'),
    "a secret in a broken line": f"student: {{password: [{CANARY}",
    "a token as a key": f"hf_{'a' * 20}{CANARY}: 1",
    "a merge key": "<<: {a: 1}\n",
    "a key that is a list": "? [a]\n: 1\n",
    "a teacher named as a path": minimal(teachers="{../../x: {model: m}}"),
    "a run named as a path": minimal(name="../../x"),
}
for recipe_name, recipe_text in RECIPES.items():
    CASES[f"recipe: {recipe_name}"] = recipe_case(recipe_text)
OVERRIDES = (
    f"train.password={CANARY}", f"cache.url=s3://a:{CANARY}@b", f"cache={{api_key: {CANARY}",
    f"cache={{url: 's3://a:{CANARY}@b'}}", TITLE, f"{TITLE}=1", f"seed={TITLE}", "seed=" + DEEP,
    "a" * 100_000, ".=1", "data.train.99999999999999999999.path=x", "seed=!!python/name:os.system",
    "x.y.z=&a [*a]", "name=../x", "seed=1e999", f"fusion={'{a: ' * 500}",
)  # fmt: skip
for number, override in enumerate(OVERRIDES):
    CASES[f"override {number}"] = recipe_case(minimal(), override)
URLS = (
    f"s3://a:{CANARY}@b/c", f"https://{CANARY}@b/c", f"https://b/c?X-Amz-Signature={CANARY}",
    f"memory://x:{CANARY}@y", f"ftp://:{CANARY}@h/p", "nowhere://x", f"{TITLE}://x",
)  # fmt: skip
for number, url in enumerate(URLS):
    for command in ("info", "verify"):
        CASES[f"cache {command}: URL {number}"] = lambda _, url=url, command=command: [
            "cache", command, url
        ]  # fmt: skip


def refusal(result: Result) -> str:
    """Check that a command was refused in words, without a traceback or anything hostile."""
    assert isinstance(result.exception, SystemExit), (result.exception, result.output)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    shown = result.stdout + result.stderr
    assert not CONTROLS.search(shown), shown
    assert "Traceback" not in shown
    assert CANARY not in shown
    return result.stderr


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_hostile_input_is_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = CASES[case](tmp_path)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    message = refusal(CliRunner().invoke(app, arguments))
    assert len(message) < 120_000
    after = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert after == before


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 200


LINKS = (
    ".results.json.tmp", ".stages.json.tmp", ".recipe.json.tmp", ".recipe.yaml.tmp", "recipe.yaml",
    ".environment.json.tmp", "environment.json", ".report.html.tmp", "report.html",
)  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_a_run_folder_is_not_followed(name: str, tmp_path: Path) -> None:
    run = run_fixture.write_run(tmp_path / "run", controls=())
    (tmp_path / "victim").write_text(CANARY)
    from collegium.report.page import write_report
    from collegium.run.folder import RunFolder

    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "victim")
    RunFolder(run).claim({"seed": 1}, "seed: 1\n")
    with RunFolder(run).stage("evaluate", "k"):
        pass
    write_report(run)
    assert (tmp_path / "victim").read_text() == CANARY


def test_a_merge_copies_no_file_from_outside(tmp_path: Path) -> None:
    for name in NAMES:
        shutil.rmtree(tmp_path / "theirs", ignore_errors=True)
        shutil.rmtree(tmp_path / "mine", ignore_errors=True)
        for folder in ("mine", "theirs"):
            cache_cases.build(tmp_path / folder, num_shards=1)
        (tmp_path / "secret").write_text(CANARY)
        cache_cases.rewrite_manifest(
            tmp_path / "theirs", lambda m, name=name: m["shards"][0].update(name=name)
        )
        paths = [str(tmp_path / folder) for folder in ("mine", "theirs")]
        refusal(CliRunner().invoke(app, ["cache", "merge", *paths]))
