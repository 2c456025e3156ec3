"""What all scripts do alike: help, and packages that are missing."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
import benchmark
import gpu_measure
import gpu_report
import plan
import plot
import sweep

SCRIPTS = Path(__file__).parents[1] / "scripts"
MAINS = [benchmark.main, gpu_measure.main, gpu_report.main, plan.main, plot.main, sweep.main]


@pytest.mark.parametrize("main", MAINS, ids=lambda main: main.__module__)
def test_help_is_printed_at_once(
    main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    try:
        code = main()
    except SystemExit as stopped:
        code = stopped.code
    assert code == 0
    summary = sys.modules[main.__module__].__doc__.splitlines()[0]
    assert summary[:60] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("script", "package", "extra"),
    [("benchmark_results", "scipy", "bench"), ("plot", "matplotlib", "plot")],
)
def test_a_missing_package_is_named(
    script: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"{package} is missing; run pip install .*{extra}"):
        runpy.run_path(str(SCRIPTS / f"{script}.py"))


def test_the_sweep_names_its_missing_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(sys, "argv", ["sweep.py"])
    assert sweep.main() == 2
    assert "optuna is missing; run pip install optuna" in capsys.readouterr().err
