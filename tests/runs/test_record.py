"""The record: what is written is what is read, nothing half-written is ever seen, bad files are named plainly."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlora.errors import CheckpointError, ConfigError
from weightlora.runs.record import AdapterScore, Kept, PhaseResult, Record, collect_versions, machine

texts = st.text(max_size=8)
counts = st.integers(0, 2**53)
numbers = st.floats(allow_nan=True, allow_infinity=True)
plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
phases = st.builds(
    PhaseResult,
    name=texts,
    steps=counts,
    seconds=st.floats(0, 1e9),
    micro_batch=st.none() | counts,
    accumulation=st.none() | counts,
    kept_activation_bytes=st.none() | counts,
    peak_memory_bytes=st.none() | counts,
    flops_per_step=st.none() | counts,
    trainable_params=counts,
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Any record that the class accepts, odd text and non-finite floats included."""
    names = draw(st.lists(texts, unique=True, max_size=4))
    adapters = tuple(
        AdapterScore(
            name=name,
            block=draw(st.none() | st.integers(0, 99)),
            kind=draw(texts),
            omega=draw(numbers),
            score=draw(st.none() | numbers),
            kept=draw(st.booleans()),
        )
        for name in names
    )
    kept = tuple(Kept(name=a.name, omega=a.omega, rank=draw(st.integers(1, 64))) for a in adapters if a.kept)
    return Record(
        status=draw(st.sampled_from(["running", "ok", "failed"])),
        method=draw(texts),
        preset=draw(texts),
        task=draw(texts),
        model=draw(texts),
        seed=draw(st.integers()),
        k=draw(st.none() | counts),
        r=draw(st.none() | counts),
        n_adapters=len(adapters),
        kept=kept,
        adapters=adapters,
        trainable_params={"warmup": draw(counts), "final": draw(counts)},
        metrics=draw(st.dictionaries(texts, numbers, max_size=3)),
        metric=draw(texts),
        phases=tuple(draw(st.lists(phases, max_size=2))),
        seam_step=draw(st.none() | counts),
        max_steps=draw(st.none() | counts),
        why=draw(texts),
        versions=draw(st.dictionaries(texts, texts, max_size=3)),
        argv=tuple(draw(st.lists(texts, max_size=3))),
        config=draw(st.dictionaries(texts, plain_json, max_size=3)),
        error=draw(st.none() | texts),
        machine=draw(st.dictionaries(texts, texts | counts, max_size=3)),
    )


def example(**changes: Any) -> Record:
    """A small finished run."""
    adapters = tuple(
        AdapterScore(name=f"layer.{i}.query", block=i, kind="query", omega=0.5 * i, score=None, kept=i == 2)
        for i in range(3)
    )
    final = PhaseResult(
        name="final",
        steps=4,
        seconds=2.0,
        micro_batch=8,
        accumulation=1,
        kept_activation_bytes=1000,
        peak_memory_bytes=None,
        flops_per_step=2000,
        trainable_params=64,
    )
    fields: dict[str, Any] = dict(
        status="ok",
        method="weightlora",
        preset="recommended",
        task="sst2",
        model="minilm",
        seed=0,
        k=1,
        r=4,
        n_adapters=3,
        kept=(Kept(name="layer.2.query", omega=1.0, rank=4),),
        adapters=adapters,
        trainable_params={"warmup": 192, "final": 64},
        metrics={"accuracy": 0.9},
        metric="accuracy",
        phases=(final,),
        seam_step=None,
        max_steps=4,
        why="largest omega",
        versions={"python": "3.11.0"},
        argv=("weightlora", "train"),
        config={"lr": 1e-3},
        error=None,
        machine={"cores": 2},
    )
    return Record(**(fields | changes))


def expected(value: Any) -> Any:
    """What a value reads back as: tuples of plain data, every float that is not finite as the text "not finite"."""
    if isinstance(value, dict):
        return {key: expected(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [expected(item) for item in value]
    return "not finite" if isinstance(value, float) and not math.isfinite(value) else value


@settings(max_examples=60, deadline=None)
@given(records())
def test_round_trip(record: Record) -> None:
    text = record.to_json()
    again = Record.from_json(text)
    before, after = dataclasses.asdict(record), dataclasses.asdict(again)
    for adapter in before["adapters"]:  # an undefined score has a word of its own
        if adapter["score"] is not None and not math.isfinite(adapter["score"]):
            adapter["score"] = None
    assert expected(before) == expected(after)
    assert again.to_json() == text
    strict = json.loads(text, parse_constant=pytest.fail)
    assert list(strict) == [field.name for field in dataclasses.fields(Record)]


def test_equal_records_are_equal_bytes() -> None:
    one = example(metrics={"accuracy": 0.9, "loss": 0.1})
    two = example(metrics={"loss": 0.1, "accuracy": 0.9})
    assert one == two
    assert one.to_json() == two.to_json()


def test_non_finite_floats_become_null_and_nan() -> None:
    text = example(metrics={"accuracy": math.inf}).to_json()
    assert json.loads(text)["metrics"] == {"accuracy": None}
    assert math.isnan(Record.from_json(text).metrics["accuracy"])


def test_surrogates_in_argv_survive(tmp_path: Path) -> None:
    """File names need not be valid text; Python hands them over as lone surrogates."""
    record = example(argv=("train", b"\xff.csv".decode("utf-8", "surrogateescape"), "Ω"))
    assert Record.read(record.write(tmp_path / "record.json")).argv == record.argv


def test_unknown_keys_are_ignored() -> None:
    data = json.loads(example().to_json())
    data["new"] = 1
    data["phases"][0]["also_new"] = [2]
    assert Record.from_json(json.dumps(data)) == example()


KEYS = [f.name for f in dataclasses.fields(Record) if f.default_factory is dataclasses.MISSING]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_required(key: str) -> None:
    data = json.loads(example().to_json())
    del data[key]
    with pytest.raises(CheckpointError, match=f"has no key '{key}'"):
        Record.from_json(json.dumps(data))


def test_a_record_from_before_budgets_still_loads() -> None:
    data = json.loads(example().to_json())
    del data["budget"]
    assert Record.from_json(json.dumps(data)).budget == {}


def test_nested_missing_key_is_named_by_its_place() -> None:
    data = json.loads(example().to_json())
    del data["adapters"][1]["omega"]
    with pytest.raises(CheckpointError, match=r"has no key 'adapters\[1\]\.omega'"):
        Record.from_json(json.dumps(data))


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0])
def test_other_schema_versions_are_refused(version: object) -> None:
    data = json.loads(example().to_json()) | {"schema_version": version}
    with pytest.raises(CheckpointError, match=rf"schema version {version!r}; this release reads 1: update weightlora"):
        Record.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", "0", "key 'seed' must be a whole number, not text"),
        ("seed", 0.0, "key 'seed' must be a whole number, not a number"),
        ("seed", True, "key 'seed' must be a whole number, not true or false"),
        ("k", [], "key 'k' must be a whole number, not a list"),
        ("status", "fine", "key 'status' is 'fine'; allowed are running, ok, failed"),
        ("metrics", {"accuracy": "high"}, "key 'metrics.accuracy' must be a number, not text"),
        ("metrics", {"accuracy": True}, "key 'metrics.accuracy' must be a number, not true or false"),
        ("metrics", {"accuracy": 10**400}, "key 'metrics.accuracy' is a whole number too large for a float"),
        ("metrics", [], "key 'metrics' must be an object, not a list"),
        ("kept", {}, "key 'kept' must be a list, not an object"),
        ("kept", [1], r"key 'kept\[0\]' must be an object, not a whole number"),
        ("argv", ["a", 1], r"key 'argv\[1\]' must be text, not a whole number"),
        ("machine", {"cores": 1.5}, "key 'machine.cores' must be text, not a number"),
        ("config", None, "key 'config' must be an object, not null"),
        ("n_adapters", -1, "contradicts itself: n_adapters is -1"),
    ],
)
def test_wrong_values_are_named(key: str, value: object, message: str) -> None:
    data = json.loads(example().to_json()) | {key: value}
    with pytest.raises(CheckpointError, match=message):
        Record.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not strict JSON: Expecting value"),
        ('{"schema_version": 1', "not strict JSON"),
        ('{"schema_version": NaN}', "not strict JSON: NaN is not JSON"),
        ("[]", "must be a JSON object, not a list"),
        ("{}", "no key 'schema_version': this is not a run's record.json"),
    ],
)
def test_text_that_is_no_record(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        Record.from_json(text)
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=rf"record\.json: .*{message}"):
        Record.read(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no record can be read here"):
        Record.read(tmp_path / "none.json")
    with pytest.raises(CheckpointError, match="no record can be read here"):
        Record.read(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"bytes\.json: .*codec"):
        Record.read(tmp_path / "bytes.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "done"}, "status is 'done'; allowed are running, ok, failed"),
        ({"schema_version": 2}, "schema_version is 2; this release writes 1"),
        ({"n_adapters": 2}, "adapters lists 3, but n_adapters is 2"),
        ({"n_adapters": 0, "adapters": ()}, "1 adapters are kept, but n_adapters is 0"),
        ({"kept": ()}, r"differ in \['layer\.2\.query'\]"),
        ({"kept": (Kept(name="elsewhere", omega=1.0, rank=1),)}, r"kept names \['elsewhere'\], which adapters"),
        ({"kept": example().kept * 2}, "kept names .* more than once"),
        ({"trainable_params": {"warmup": 1}}, "needs both 'warmup' and 'final'"),
        ({"trainable_params": {"warmup": 1, "final": 1, "later": 1}}, r"has the keys \['later'\]"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        example(**changes)


def test_parts_validate_themselves() -> None:
    with pytest.raises(ConfigError, match="'a' has rank 0; a rank is 1 or more"):
        Kept(name="a", omega=1.0, rank=0)
    with pytest.raises(ConfigError, match=r"phase 'final': seconds is -1\.0; it cannot be negative or undefined"):
        dataclasses.replace(example().phases[0], seconds=-1.0)
    with pytest.raises(ConfigError, match="steps has 1329 bits; 63 are enough"):
        dataclasses.replace(example().phases[0], steps=10**400)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"a": [{1, 2}]}}, r"record\.config\.a\[0\] is a set"),
        ({"config": {"a": {1: 2}}}, r"record\.config\.a has the key 1"),
        ({"max_steps": 1.5}, "cannot be stored: key 'max_steps' must be a whole number, not a number"),
        ({"metric": None}, "cannot be stored: key 'metric' must be text, not null"),
    ],
)
def test_what_cannot_be_read_is_never_written(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = example().write(tmp_path / "record.json")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=message):
        example(**changes).write(path)
    assert path.read_bytes() == before


def test_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert example(why="x" * 10_000).write(path) == path
    example().write(str(path))
    assert Record.read(path) == example()
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]
    if os.name == "posix":
        plain = tmp_path / "plain"
        plain.touch()
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up while the temporary file is written, or the rename is refused."""
    path = example().write(tmp_path / "record.json")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        example(seed=1).write(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_headline_and_phases() -> None:
    record = example()
    assert record.score == 0.9
    assert example(metric="f1").score is None
    assert record.final_phase is record.phases[0]
    assert record.phases[0].seconds_per_step == 0.5
    assert dataclasses.replace(record.phases[0], steps=0).seconds_per_step is None
    assert example(phases=()).final_phase is None


def test_versions_and_machine() -> None:
    versions = collect_versions()
    assert versions["python"] == platform.python_version()
    for package in ("torch", "transformers", "peft", "accelerate"):
        assert versions[package] == metadata.version(package)
    kind = machine()
    assert kind["architecture"] == platform.machine()
    assert 1 <= int(kind["cores"]) <= (os.cpu_count() or 1)
    assert platform.node() not in kind.values()
    assert Record.from_json(example(versions=versions, machine=kind).to_json()).machine == kind


def test_imports_no_torch() -> None:
    code = (
        "import sys; from weightlora.runs.record import collect_versions; collect_versions(); "
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules); sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
