"""Files that were changed at random make a line of error, or a result, and never a traceback."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_read_record import changed

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
import gpu_report_text
import plot
from benchmark_results import BenchmarkRun, markdown, summarize
from run_curves import find_runs, group_by_variant
from test_plot import write_run

from hlbgpt.runs.record import read_record
from hlbgpt.utils.errors import InputError
from hlbgpt.utils.files import write_json

ODD: list[Any] = [None, True, "", "x", "\ud800", "a\nb|c", -1, 0, 0.5, 1e300, 10**40, [], {}]
ODD += [float("nan"), float("inf"), [[1]], {"a": {"b": 1}}, "9" * 50, ["x", 1], 2**63]
CONFIG = {
    "time_to_target": {"init_args": {"monitor": "val_loss", "target": 2.0, "mode": "min"}},
    "model": {"net": {"class_path": "GPT", "init_args": {"width": 8}}, "betas": [0.9, 0.95]},
    "data": {"source": {"class_path": "PythonDocs"}},
}
TABLES = {"steps": [{"windows x tokens": [4, 32], "forward ms": 1.0, "backward ms": 2.0}]}
TABLES["steps"][0]["optimizer ms"] = 0.5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is a run, and the results of a GPU report too."""
    out = tmp_path_factory.mktemp("whole")
    run = write_run(out / "race" / "mine_0", [4, 3, 2.5], **CONFIG)
    (run / "output.log").write_text("$ hlbgpt\nlast words\n")
    (out / "steps" / "mine").mkdir(parents=True)
    write_json(out / "steps" / "mine" / "measured.json", TABLES)
    (out / "steps" / "mine" / "output.log").write_text("$ python\n")
    return out


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to every value in nested dicts and lists."""
    if not isinstance(value, (dict, list)):
        return []
    found = []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found += [(*path, key), *places(inner, (*path, key))]
    return found


def change_value(text: str, chance: random.Random, *, is_json: bool) -> bytes:
    """Replace, remove or add something in the content of a file."""
    content = json.loads(text) if is_json else yaml.safe_load(text)
    *parents, last = chance.choice(places(content))
    inner = content
    for key in parents:
        inner = inner[key]
    match chance.randrange(4):
        case 0:
            del inner[last]
        case 1 if isinstance(inner, dict):
            inner[chance.choice(["", "x", "\ud800", "a.b"])] = inner.pop(last)
        case _:
            inner[last] = chance.choice(ODD)
    written = json.dumps(content) if is_json else yaml.safe_dump(content)
    return written.encode(errors="surrogatepass")


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    """Cut, repeat or overwrite some bytes."""
    start, length = chance.randrange(len(data)), chance.randrange(1, 40)
    match chance.randrange(4):
        case 0:
            return data[:start]
        case 1:
            return data[:start] + data[start + length :]
        case 2:
            return data[:start] + chance.randbytes(length) + data[start + length :]
        case _:
            return data[: start + length] + data[start:]


def through_benchmark(out: Path) -> None:
    found = read_record(out / "race" / "mine_0")
    if found["value"] is None or found["validation"] is None:
        return
    runs = [BenchmarkRun("a", seed, record=changed(value=3.7 + seed)) for seed in range(2)]
    runs += [BenchmarkRun("b", seed, record=found) for seed in range(2)]
    results = summarize(runs, "benchmark.py")
    write_json(out / "results.json", results)
    (out / "results.md").write_text(markdown(results), "utf-8")


def through_plot(out: Path) -> None:
    runs = [run for run in find_runs([str(out)]) if run.is_drawable]
    groups = group_by_variant(runs)
    if groups:
        plot.draw(groups, hlb_gpt=False).draw_without_rendering()
        plot.draw_one(groups, plot.STEPS, hlb_gpt=True, caption="x").draw_without_rendering()


def through_report(out: Path) -> None:
    gpu_report_text.write_report(out, "mine", "theirs", "gpu_report.py")


FILES: dict[str, list[Callable[[Path], None]]] = {
    "race/mine_0/record.json": [through_benchmark, through_plot, through_report],
    "race/mine_0/config.yaml": [through_plot],
    "race/mine_0/events*": [through_plot],
    "race/mine_0/output.log": [through_report],
    "steps/mine/measured.json": [through_report],
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("changes", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_changed_file_makes_no_traceback(
    name: str, changes: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gpu_report_text, "save_figure", lambda figure, _: figure.draw_without_rendering()
    )
    chance = random.Random(f"{name} {changes}")
    shutil.copytree(whole, out := tmp_path / "out")
    (file,) = out.glob(name)
    data, messages = file.read_bytes(), []
    for _ in range(changes):
        if file.suffix in (".json", ".yaml") and chance.random() < 0.7:
            changed_data = change_value(data.decode(), chance, is_json=file.suffix == ".json")
        else:
            changed_data = change_bytes(data, chance)
        file.write_bytes(changed_data)
        for read in FILES[name]:
            try:
                read(out)
            except InputError as error:
                messages.append(str(error))
    for message in messages:
        assert len(message.splitlines()) == 1, message
        assert len(message) < 500 + len(str(out))
        assert str(out) in message or "no million tokens in common" in message
