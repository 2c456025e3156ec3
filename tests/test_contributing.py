"""What contributors and newcomers meet first: CI, hooks, templates, records, notebook, sweep."""

import builtins
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark
import optuna
import pytest
import rich
import sweep
import yaml
from benchmark_results import BenchmarkRun, summarize, variant_row
from conftest import CONFIGS, fitting

import hlbgpt as package

ROOT = CONFIGS.parent
GITHUB = ROOT / ".github"
CONTRIBUTING = (GITHUB / "CONTRIBUTING.md").read_text()
RECORDS = (GITHUB / "RECORDS.md").read_text()
NOTEBOOK = json.loads((ROOT / "scripts" / "hlbgpt.ipynb").read_text())
CI_SCRIPT = (ROOT / ".ci" / "run").read_text()
LINT = ["ruff check", "ruff format", "mypy"]


def settings(arguments: list[str]) -> dict[str, Any]:
    """Arguments of the command line as settings of `fit`."""
    return dict(argument.removeprefix("--").split("=", 1) for argument in arguments)


# --- workflow, hooks and templates ----------------------------------------------------------------


def test_the_workflow_runs_the_commands_of_the_readme() -> None:
    workflow = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    blocks = re.findall(
        r"^<!-- (\w+) -->\n```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S
    )
    assert {name for name, _ in blocks} == {"quickstart", "tests"}
    (extract,) = re.findall(r"^readme\(\) .*$", CI_SCRIPT, re.M)
    for name, text in blocks:
        assert f'bash -euxo pipefail "$work/{name}.sh"' in CI_SCRIPT
        words = ["bash", "-c", f"{extract}\nreadme {name}"]
        assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout == text


def test_hooks_ci_and_contributing_name_the_same_checks() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert [hook["entry"].removesuffix(" --fix") for hook in hooks] == LINT
    commands = re.findall(r"\| `([^`]+)` \|$", CONTRIBUTING, re.M)
    assert commands[2:4] == ["ruff check . && ruff format --check .", "mypy"]
    for command in " && ".join(commands[2:4]).split(" && "):
        assert f"\n{command}\n" in CI_SCRIPT
    assert commands[1] in (ROOT / "README.md").read_text()


def test_links_lead_somewhere() -> None:
    for text in (CONTRIBUTING, RECORDS):
        links = re.findall(r"\]\((?!http)([^)#]+)", text)
        assert [link for link in links if not (GITHUB / link).exists()] == []
        paths = re.findall(r"\b(?:configs|scripts|tests)/[\w./-]*\w", text)
        assert paths
        assert [path for path in paths if not (ROOT / path).exists()] == []


def test_templates_ask_for_a_record_and_a_p_value() -> None:
    forms = {path.stem: path.read_text() for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml")}
    assert sorted(forms) == ["bug", "idea"]
    for form in map(yaml.safe_load, forms.values()):
        assert form["name"]
        assert form["description"]
        ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert len(ids) == len(set(ids))
        assert all(part["attributes"] for part in form["body"])
    for text in (forms["idea"], (GITHUB / "pull_request_template.md").read_text()):
        for asked in ("record.json", "ardware", "p-value", "RECORDS.md", "results.md"):
            assert asked in text
        assert "](" not in text  # GitHub resolves links of templates against another address


def test_benchmarks_of_contributing_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^python scripts/benchmark.py (.*)$", CONTRIBUTING, re.M)
    assert len(commands) == 2
    for command in commands:
        jobs = benchmark.make_jobs(*benchmark.parse(shlex.split(command)))
        assert len(jobs) >= 10


def test_the_citation_names_this_version() -> None:
    assert f"version = {{{package.__version__}}}" in CONTRIBUTING


# --- records --------------------------------------------------------------------------------------

COPIED = ("n", "final value", "p of target", "tokens", "train_seconds")  # from results.md


def rows(section: str) -> list[dict[str, str]]:
    """The rows of the table in a section of RECORDS.md."""
    (text,) = re.findall(rf"^## {section}\n(.*?)^## ", RECORDS, re.M | re.S)
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("|")]
    names, _, *cells = [re.split(r"\s*\|\s*", line) for line in lines]
    return [dict(zip(names, row, strict=True)) for row in cells]


def linked(cell: str) -> Path:
    """The file to which the link in a cell of RECORDS.md leads."""
    return (GITHUB / cell[cell.index("](") + 2 : -1]).resolve()


def problems(row: dict[str, str], results: dict[str, Any], track: str) -> list[str]:
    """What keeps a row from being a record of a track, given its results.json."""
    config = linked(row["config"])
    runs = [run for run in results["runs"] if run["variant"] == f"{config.stem}, as is"]
    (found,) = [each for each in results["variants"] if each["variant"] == f"{config.stem}, as is"]
    records = [run["record"] for run in runs]
    fingerprints = {record["validation"]["fingerprint"] for record in records}
    rules = {
        "the date is not YYYY-MM-DD": re.fullmatch(r"20\d\d-\d\d-\d\d", row["date"]),
        "the config is not in configs/": config.parent == CONFIGS and config.is_file(),
        "fewer than 10 runs": len(runs) >= 10,
        "the seeds are not 0 to n - 1": sorted(run["seed"] for run in runs) == [*range(len(runs))],
        "a run failed": not any(run["error"] for run in runs),
        "n-grams were counted": track == "Open" or not any(map(counted, records)),
        "the change does not say how many tokens were counted": track == "Network"
        or {f"{counted(record):,}" in row["change"] for record in records} == {True},
        "a run is no record": not any(record["caveats"] for record in records),
        "the validation texts differ": len(fingerprints) == 1,
        "p is not below 0.01": found["target_p"] is not None and found["target_p"] < 0.01,
        "the target is not 3.8": (results["monitor"], results["target"]) == (["val_loss"], ["3.8"]),
        "the hardware is another": results["device"] == [row["hardware"]],
        "the revision is not one, or has changes": len(results["git_revision"]) == 1
        and not results["git_revision"][0].endswith("-dirty"),
    }
    shown = variant_row(found)
    cells = [f"{name} should be {shown[name]}" for name in COPIED if row[name] != shown[name]]
    return [rule for rule, holds in rules.items() if not holds] + cells


@pytest.mark.parametrize("track", ["Network", "Open"])
def test_records_are_what_their_results_say(track: str) -> None:
    for row in rows(track):
        results = json.loads(linked(row["results"]).read_text())
        assert problems(row, results, track) == []


def counted(record: dict[str, Any]) -> int:
    return int(record["counted_tokens"])


def example(
    count: int = 10, mean: float = 3.79, track: str = "Network", **changes: Any
) -> list[str]:
    """The problems of a record that was made up."""
    record = {
        "monitor": "val_loss",
        "target": 3.8,
        "mode": "min",
        "device": "GPU",
        "torch": "2.13.0",
        "caveats": changes.pop("caveats", []),
    }
    record |= {"git_revision": changes.pop("revision", "abc"), "tokens": 20_000_000}
    record |= {"counted_tokens": changes.pop("counted", 0)}
    record |= {"train_seconds": 30.0, "compile_seconds": 60.0, "wall_seconds": 100.0}
    runs = []
    for seed in set(range(count)) - {changes.get("left_out")}:
        error = "killed" if seed == changes.get("failed") else None
        value: dict[str, Any] = {"value": mean + seed % 2 * 0.001}
        other = seed == changes.get("other_text")
        validation = {"fingerprint": "b" if other else "a", "sequence_length": 1024}
        value |= {"validation": {**validation, "complete": True}}
        runs.append(BenchmarkRun("speedrun, as is", seed, error=error, record=record | value))
    results = json.loads(json.dumps(summarize(runs, "benchmark.py ...")))
    cells = variant_row(results["variants"][0])
    row = {
        "date": "2027-01-31",
        "change": "n-grams of 1,000 tokens",
        "config": "[speedrun](../configs/speedrun.yaml)",
    }
    row |= {"hardware": "GPU", **{name: cells[name] for name in COPIED}}
    return problems(row | changes, results, track)


def test_a_row_has_to_keep_the_rules() -> None:
    assert example() == []
    assert example(count=9) == ["fewer than 10 runs"]
    assert example(count=12, left_out=3) == ["the seeds are not 0 to n - 1"]
    assert example(count=12, failed=3) == ["a run failed", "p is not below 0.01"]
    assert example(mean=3.7997) == ["p is not below 0.01"]
    assert example(caveats=["validated on 10% of the split"]) == ["a run is no record"]
    assert example(other_text=3) == ["the validation texts differ", "p is not below 0.01"]
    assert example(counted=1000) == ["n-grams were counted"]
    assert example(counted=1000, track="Open") == []
    assert example(track="Open", change="more") == [
        "the change does not say how many tokens were counted"
    ]
    assert example(hardware="CPU") == ["the hardware is another"]
    assert example(revision="abc-dirty") == ["the revision is not one, or has changes"]
    assert example(date="today") == ["the date is not YYYY-MM-DD"]
    assert example(config="[speedrun](speedrun.yaml)") == ["the config is not in configs/"]
    assert example(tokens="10,000,000 ± 0") == ["tokens should be 20,000,000 ± 0"]


def test_the_proxies_are_those_of_the_readme() -> None:
    (text,) = re.findall(r"^## Measured here.*", RECORDS, re.M | re.S)
    measured = re.findall(r"\d\.\d+ ± 0\.\d+", text)
    assert len(measured) == 5
    told = "".join((ROOT / name).read_text() for name in ("README.md", "configs/EXPERIMENTS.md"))
    assert [figure for figure in measured if figure not in told] == []


# --- notebook and sweep ---------------------------------------------------------------------------


def sources(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == kind]


def test_the_notebook_has_the_form_of_one_and_no_output() -> None:
    assert NOTEBOOK["nbformat"] == 4
    assert NOTEBOOK["nbformat_minor"] >= 5
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    assert {cell["cell_type"] for cell in NOTEBOOK["cells"]} == {"markdown", "code"}
    assert all(isinstance(cell["metadata"], dict) for cell in NOTEBOOK["cells"])
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert {cell["execution_count"] for cell in code} == {None}
    paths = re.findall(r"`((?:configs|scripts|\.github)/[^`]+)`", "".join(sources("markdown")))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_cells_of_the_notebook_run(
    hlbgpt: Callable[..., str],
    tiny: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fit, small = package.fit, settings(tiny) | dict.fromkeys(sweep.LENGTH[:2], 20)
    monkeypatch.setattr(
        package, "fit", lambda config, asked, callbacks: fit(config, asked | small, callbacks)
    )
    monkeypatch.setenv("MPLBACKEND", "agg")
    shell = type("ZMQInteractiveShell", (), {})  # by which libraries know a notebook
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    monkeypatch.setattr(rich, "_console", None)  # which would stay one of a notebook
    Path("configs").symlink_to(CONFIGS)
    install, *cells = sources("code")
    assert "git clone" in install
    names: dict[str, Any] = {}
    printed = ""
    for cell in cells:
        for command in re.findall(r"^ *!hlbgpt (.*) \| cat$", cell, re.M):
            words = shlex.split(command)
            out = hlbgpt(*words, *fitting(Path(words[words.index("--config") + 1]), tiny))
            assert "target NOT met" in out
        # A line for the shell or for IPython becomes one that does nothing.
        exec(re.sub(r"^( *)[!%].*$", r"\1...", cell, flags=re.M), names)
        printed += capfd.readouterr().out
    assert names["losses"].steps == [10, 20]
    assert "Return the " in printed
    assert re.search("target NOT met.*\n *\n *training +[0-9.]+ s, of which", printed)
    assert f"files in {names['run'].folder}" in printed
    assert list(Path("runs").glob("*/*/events*"))  # for `%tensorboard --logdir runs`


def test_the_sweep_finds_the_best_of_its_trials(
    hlbgpt: Callable[..., str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("configs").symlink_to(CONFIGS)
    monkeypatch.setattr(sweep, "SAME", sweep.SAME | settings(tiny))
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(sweep.objective, n_trials=2)
    records = [json.loads(path.read_text()) for path in Path("runs").glob("*/*/record.json")]
    assert len(records) == 2
    assert study.best_value == min(record["value"] for record in records)
    assert {record["seed"] for record in records} == {1000}
    assert set(study.best_params) <= {"model.lr_scheduler.max_lr", "model.lr_scheduler.pct_start"}
