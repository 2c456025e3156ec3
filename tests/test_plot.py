"""What is drawn are the numbers of the runs, and nothing else."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import picture
import plot
import published
import pytest
import yaml
from conftest import CONFIGS
from hypothesis import given
from hypothesis import strategies as st
from plot_panels import fill, relative, styles
from plot_runs import CLOCKS, Curve, band, beyond, find, grouped, read_run
from torch.utils.tensorboard import SummaryWriter

from hlbgpt.cli.main import main as hlbgpt

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

STEP_TOKENS = 1000
SECONDS = dict(zip(CLOCKS, (10.0, 2.0, 3.0, 1.5, 20.0), strict=True))


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the time that fine pictures take."""
    monkeypatch.setattr(picture, "_DOTS_PER_INCH", 30)


def write_run(
    folder: Path,
    losses: Sequence[float],
    seed: int = 0,
    finished: bool = True,
    purge_step: int | None = None,
    first_step: int = 10,
    seconds: float = 0.5,
    record: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Leave in `folder` what a run does that was validated, and logged, every ten steps."""
    tokens = None if purge_step is None else purge_step * STEP_TOKENS
    by_step = SummaryWriter(str(folder), purge_step=purge_step)
    by_tokens = SummaryWriter(str(folder / "by_tokens"), purge_step=tokens)
    for k, loss in enumerate(losses):
        step = first_step + 10 * k
        at = {"global_step": step * STEP_TOKENS, "walltime": seconds * step}
        for name, value in (("train_loss", loss - 0.25), ("val_loss", loss)):
            by_step.add_scalar(f"loss/{name}", value, step)
            by_tokens.add_scalar(f"loss_by_tokens/{name}", value, **at)
        by_step.add_scalar("progress/tokens_seen", step * STEP_TOKENS, step)
        by_step.add_scalar("lr/block_matrices", 0.5 / step, step)
        by_step.add_scalar("lr/embeddings", 0.25 / step, step)
        by_step.add_scalar("schedule/step_tokens", STEP_TOKENS, step)
        by_step.add_scalar("schedule/sequence_length", 32 if step < 30 else 64, step)
    by_step.close()
    by_tokens.close()
    config = {
        "seed_everything": seed,
        "time_to_target": {"monitor": "val_loss", "target": 2.0},
        "data": {"tokenizer": "bytes", "eval_sequence_length": 1024},
        "trainer": {"default_root_dir": str(folder.parent)},
        **settings,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if finished:
        found = {"seed": seed, "device": "cpu", **SECONDS, **(record or {})}
        (folder / "record.json").write_text(json.dumps(found))
    return folder


def lines(axes: Any, gid: str) -> list[tuple[list[float], list[float]]]:
    """Points of the lines that have one, and are called `gid`."""
    found = [line.get_data() for line in axes.lines if line.get_gid() == gid]
    return [(list(map(float, x)), list(map(float, y))) for x, y in found if len(x)]


def draw(*folders: Path, hlb_gpt: bool = False) -> dict[str, Any]:
    """The axes that are drawn, by their titles."""
    figure = Figure()
    runs, _ = find([str(folder) for folder in folders])
    fill(figure, grouped(runs), hlb_gpt)
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


LOSS = {"tokens": (1e-6 * STEP_TOKENS), "steps": 1.0, "seconds": 0.5}


@pytest.mark.parametrize("axis", LOSS)
def test_a_run_is_drawn_as_it_was(axis: str, tmp_path: Path) -> None:
    axes = draw(write_run(tmp_path, [4, 3, 2.5]))[f"validation loss by {axis}"]
    x = pytest.approx([LOSS[axis] * step for step in (10, 20, 30)])
    assert lines(axes, "validation") == [(x, [4, 3, 2.5])]
    assert lines(axes, "training") == [(x, [3.75, 2.75, 2.25])]
    assert lines(axes, "beyond") == []
    assert not axes.collections  # no band of a single run
    assert lines(axes, "target") == [([0, 1], [2, 2])]


def test_the_plan_and_the_time(tmp_path: Path) -> None:
    panels = draw(write_run(tmp_path, [4, 3, 2.5]))
    (rate,) = panels["learning rate / its peak"].lines  # that of both groups
    assert rate.get_xdata() == pytest.approx([0.01, 0.02, 0.03])
    assert rate.get_ydata() == pytest.approx([1, 1 / 2, 1 / 3])
    (length,) = panels["sequence length"].lines
    assert list(length.get_ydata()) == [32, 32, 64]
    assert list(panels["tokens a step"].lines[0].get_ydata()) == [STEP_TOKENS] * 3
    widths = [bar.get_width() for bar in panels["time"].patches]
    assert widths == [8, 2, 3, 1.5, 5.5]  # step, data wait, validation, compile, rest
    assert sum(widths) == SECONDS["wall_seconds"]


def test_seeds_make_a_band_as_far_as_all_of_them_are(tmp_path: Path) -> None:
    losses = [[5, 4, 3, 2.5], [5.5, 4.25, 2.75], [4.5, 4.5, 3.5]]
    for seed, run in enumerate(losses):
        clocks = {name: (seed + 1) * value for name, value in SECONDS.items()}
        write_run(tmp_path / f"version_{seed}", run, seed, record=clocks)
    panels = draw(tmp_path)
    axes = panels["validation loss by steps"]
    values = np.array([run[:3] for run in losses])
    assert lines(axes, "validation") == [([10, 20, 30], pytest.approx(values.mean(0)))]
    assert lines(axes, "training") == [([10, 20, 30], pytest.approx(values.mean(0) - 0.25))]
    assert lines(axes, "beyond") == [([30, 40], [3, 2.5])]
    (filled,) = axes.collections
    corners = {tuple(corner) for corner in filled.get_paths()[0].vertices}
    for k, x in enumerate((10, 20, 30)):
        assert {(x, values[:, k].min()), (x, values[:, k].max())} <= corners
    # The mean of the clocks, too.
    assert panels["time"].patches[1].get_width() == 2 * SECONDS["data_seconds"]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 20), st.floats(-5, 5)), min_size=1, max_size=8),
        min_size=1,
        max_size=4,
    )
)
def test_the_band_is_that_of_straight_lines_between_points(runs) -> None:
    curves = []
    for run in runs:
        points = sorted(dict(run).items())
        curves.append(Curve(*np.array(points, dtype=float).T))
    found = band(curves)
    everywhere = sorted({x for curve in curves for x in curve.x})
    common = [x for x in everywhere if all(c.x[0] <= x <= c.x[-1] for c in curves)]
    assert found.x.tolist() == common

    def at(curve: Curve, x: float) -> float:
        for k, known in enumerate(curve.x):
            if known == x:
                return curve.y[k]
            if known > x:
                share = (x - curve.x[k - 1]) / (known - curve.x[k - 1])
                return curve.y[k - 1] + share * (curve.y[k] - curve.y[k - 1])
        raise AssertionError

    for k, x in enumerate(common):
        values = [at(curve, x) for curve in curves]
        slow = (sum(values) / len(values), min(values), max(values))
        assert (found.mean[k], found.low[k], found.high[k]) == pytest.approx(slow, abs=1e-9)
    for curve in curves:
        after = beyond(curve, found)
        if common and len(after.x):
            assert after.x[0] == common[-1]
            assert after.y[0] == pytest.approx(at(curve, common[-1]), abs=1e-9)
        ends = [x for x in curve.x if not common or x > common[-1]]
        assert after.x.tolist()[len(after.x) - len(ends) :] == ends


def test_a_resumed_run_has_no_point_twice(tmp_path: Path) -> None:
    write_run(tmp_path, [4, 3.5, 9, 9], finished=False)
    write_run(tmp_path, [3, 2.5], purge_step=30, first_step=30)
    panels = draw(tmp_path)
    for axis, unit in LOSS.items():
        ((x, y),) = lines(panels[f"validation loss by {axis}"], "validation")
        assert x == pytest.approx([unit * step for step in (10, 20, 30, 40)])
        assert y == [4, 3.5, 3, 2.5]
    assert len(panels["sequence length"].lines[0].get_xdata()) == 4


def test_an_unfinished_run_is_drawn_by_itself(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / f"quickstart/version_{seed}", [4, 3, 2.5], seed)
    write_run(tmp_path / "quickstart/version_2", [9], 2, finished=False)
    panels = draw(tmp_path)
    found = [y for _, y in lines(panels["validation loss by steps"], "validation")]
    assert found == [[4, 3, 2.5], [9]]
    named = [line.get_label() for line in panels["validation loss by steps"].lines]
    assert "quickstart, unfinished" in named
    assert len(panels["time"].patches) == 5
    texts = [text.get_text() for text in panels["time"].texts]
    assert "quickstart, unfinished: no record" in texts


def names(*words: str) -> list[tuple[str, int]]:
    return [(group.name, len(group.runs)) for group in grouped(find(words)[0])]


def test_groups_are_runs_that_differ_in_their_seed_alone(tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "small"
    for seed in range(2):
        write_run(runs / f"version_{seed}", [3], seed)
        write_run(runs / f"version_{seed + 9}", [3], seed, model={"net": {"width": 8}})
    both = [("small, width not set", 2), ("small, width 8", 2)]
    assert names(str(tmp_path)) == both
    assert names(str(runs), str(runs / "version_0")) == both  # none twice
    assert names(f"ours={runs / 'version_9'}", f"theirs={runs / 'version_0'}") == [
        ("ours", 1),
        ("theirs", 1),
    ]
    assert names(f"ours={runs / 'version_9'}", f"ours={runs / 'version_10'}") == [("ours", 2)]
    # A seed that comes twice is no second sample.
    write_run(runs / "version_2", [3], 1)
    assert names(*(str(runs / f"version_{k}") for k in range(3))) == [
        ("small, version_0", 1),
        ("small, version_1", 1),
        ("small, version_2", 1),
    ]


def test_runs_of_a_benchmark_are_called_after_their_variants(tmp_path: Path) -> None:
    for variant in ("as_is", "larger_batch"):
        for seed in range(2):
            job = tmp_path / "quickstart" / variant / f"seed_{seed}"
            write_run(job / "version_0", [3], seed, data={"tokenizer": variant})
            (job / "made_from.json").write_text("{}")
    assert names(str(tmp_path)) == [("quickstart", 2), ("quickstart, larger batch", 2)]


def test_learning_rates_of_one_form_are_drawn_once() -> None:
    x = np.arange(1.0, 4.0)
    found = relative([Curve(x, 4 / x), Curve(x, 2 / x), Curve(x, x), Curve(x, 0 * x)])
    assert [curve.y.tolist() for curve in found] == [
        pytest.approx([1, 1 / 2, 1 / 3]),
        pytest.approx([1 / 3, 2 / 3, 1]),
    ]


def test_styles_differ_in_black_and_white() -> None:
    looks = styles(40)
    assert len({(style.marker, str(style.dashes)) for style in looks}) == 40


# --- hlb-gpt ----------------------------------------------------------------------------------


WIKITEXT = {
    "class_path": "hlbgpt.data.HubText",
    "init_args": {"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1"},
}
ALIKE = {"tokenizer": "gpt2", "eval_sequence_length": 1024, "source": WIKITEXT}


def test_the_published_curve_meets_the_target_where_its_seeds_did() -> None:
    tokens, losses = np.array(published.CURVE).T
    assert (np.diff(tokens) > 0).all()
    assert (np.diff(losses) < 0).all()
    met = np.interp(-published.TARGET, -losses, tokens)
    assert met == pytest.approx(47.9e6, abs=4.0e6)  # as its seeds, one by one


@pytest.mark.parametrize(
    ("data", "against", "drawn"),
    [
        (ALIKE, "auto", True),
        (ALIKE, "nothing", False),
        ({**ALIKE, "tokenizer": "bytes"}, "auto", False),
        ({**ALIKE, "eval_sequence_length": 256}, "auto", False),
        ({**ALIKE, "eval_sequence_length": 256}, "hlb-gpt", True),
        ({**ALIKE, "source": {"class_path": "hlbgpt.data.TextFiles"}}, "auto", False),
        ({**ALIKE, "source": {"class_path": "hlbgpt.data.TextFiles"}}, "hlb-gpt", True),
    ],
)
def test_hlb_gpt_is_drawn_beside_its_like(data, against, drawn, tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, [4], data=data))
    assert plot.draws_published(against, [run]) is drawn


@pytest.mark.parametrize(("config", "drawn"), [("speedrun", True), ("baseline", False)])
def test_shipped_configs_say_how_they_are_measured(config, drawn, tmp_path: Path, capsys) -> None:
    words = ["fit", "--config", str(CONFIGS / f"{config}.yaml"), "--print_config"]
    with pytest.raises(SystemExit):
        hlbgpt(words)
    settings = yaml.safe_load(capsys.readouterr().out)
    run = read_run(write_run(tmp_path, [4], **settings))
    assert plot.draws_published("auto", [run]) is drawn


@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-40GB", "NVIDIA H200", "cpu (2 threads)"])
def test_what_is_published_is_drawn_where_it_compares(device: str, tmp_path: Path) -> None:
    write_run(tmp_path, [4, 3.8], data=ALIKE, record={"device": device})
    panels = draw(tmp_path, hlb_gpt=True)
    ((x, y),) = lines(panels["validation loss by tokens"], "published")
    tokens, losses = np.array(published.CURVE[: len(x)]).T
    assert np.array(x) * 1e6 == pytest.approx(tokens)
    assert np.array(y) == pytest.approx(losses)
    assert y[-1] <= 3.8 < y[-2]
    for axes in panels.values():  # and can be seen
        assert all(max(x) <= axes.get_xlim()[1] for x, _ in lines(axes, "published"))
    times = lines(panels["validation loss by seconds"], "published")
    assert times == ([([100], [3.8])] if "A100" in device else [])
    assert lines(panels["validation loss by steps"], "published") == []
    legend = panels["time"].figure.legends[0]
    assert any(published.CURVE_SOURCE in text.get_text() for text in legend.texts)


# --- the command ------------------------------------------------------------------------------


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize(
    ("out", "left"),
    [
        ("x.SVG", ["x.SVG"]),
        ("x", ["x.png", "x.svg"]),
    ],
)
def test_files(out: str, left: list[str], tmp_path: Path, capsys) -> None:
    write_run(tmp_path / "good", [4, 3])
    write_run(tmp_path / "young", [])
    folder = tmp_path / "pictures"
    folder.mkdir()
    assert plot.main([str(tmp_path), "--out", str(folder / out)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == left
    assert (folder / left[0]).read_bytes()[:4] in (b"\x89PNG", b"<?xm")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "good: seed 0; last val_loss 3.0000"
    assert said[1].startswith("left out: ")
    assert said[1].endswith("young: no curve of val_loss by tokens")


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere: no such folder; name that of a run"),
        (["=good"], "=good: no name before the =; write NAME=FOLDER"),
        (["empty"], r"empty: no run in it: .* name a folder as hlbgpt fit makes it"),
        (["young"], "young: no curve of val_loss by tokens in its .*; wait for the first"),
        (["torn"], "torn/record.json: no JSON; is it the record.json of a run"),
        (["old"], "old/record.json: no data_seconds in it; is it a run of this version"),
        (["garbled"], "garbled/config.yaml: no YAML"),
        (["good", "--out", "x.pdf"], "--out x.pdf: name a file that ends in .png or .svg"),
        (["good", "--out", "none/x"], "--out none/x.png: cannot be written: No such file"),
        (["good", "--out", "taken"], "--out taken.svg: is a folder"),
        (["good", "--against", "hlb-gpt"], "--against hlb-gpt: .* data.tokenizer bytes; leave"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "taken.svg"):
        Path(name).mkdir()
    for name in ("good", "torn", "garbled", "old"):
        write_run(Path(name), [4])
    write_run(Path("young"), [])
    Path("torn/record.json").write_text('{"seed')
    clocks = {name: value for name, value in SECONDS.items() if name != "data_seconds"}
    Path("old/record.json").write_text(json.dumps(clocks))
    Path("garbled/config.yaml").write_text("a: [")
    before = sorted(tmp_path.rglob("*"))
    assert plot.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"plot.py: error: {says}", line)
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    write_run(tmp_path, [4])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "pip install -e '.[plot]'" in capsys.readouterr().err
