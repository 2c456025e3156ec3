"""The picture shows the numbers that the runs logged."""

import math
import re
import shutil
import xml.dom.minidom
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import open_logger
from test_read_record import BROKEN, write_record

pytest.importorskip("matplotlib")
import plot
from matplotlib.colors import to_rgb
from matplotlib.spines import Spine
from matplotlib.text import Text
from plot import BY, COLORS_ON_ANY_PAGE, GREY, HLB_GPT, draw, draw_one
from run_curves import Curve, band, find_runs, group_by_variant

STEP_TOKENS = 1000
CLOCKS = {
    "train": 10.0,
    "data": 2.0,
    "validation": 3.0,
    "compile": 1.5,
    "checkpoint": 0.5,
    "wall": 20.0,
}
# Unit of each axis, per step of the runs that `write_run` writes.
AXES = {"million tokens": 1e-6 * STEP_TOKENS, "steps": 1.0, "seconds of training": 0.5}


def write_run(
    folder: Path,
    losses: Sequence[float],
    seed: int | None = 0,
    finished: bool = True,
    resumed_at: int = 0,
    record: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write the files of a run that validated and logged every ten steps."""
    logger = open_logger(folder, resumed_at, resumed_at * STEP_TOKENS)
    for number, loss in enumerate(losses):
        step = resumed_at + 10 * (number + 1)
        values = {"val_loss": loss, "lr/embeddings": 0.5 / step}
        place = {"tokens_seen": step * STEP_TOKENS, "train_seconds": 0.5 * step}
        logger.log_metrics({**values, **place}, step - 1)  # Lightning counts steps from 0
    logger.experiment.close()
    config = {
        "seed_everything": seed,
        "time_to_target": {"init_args": {"monitor": "val_loss", "target": 2.0}},
        "trainer": {"default_root_dir": str(folder)},
        **settings,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if finished:
        clocks = {f"{name}_seconds": value for name, value in CLOCKS.items()}
        write_record(folder, **{"seed": seed, **clocks, **(record or {})})
    return folder


def draw_folder(folder: Path, hlb_gpt: bool = False) -> dict[str, Any]:
    """The panels of the picture of all runs in `folder`, by the names of their x-axes."""
    figure = draw(group_by_variant(find_runs([str(folder)])), hlb_gpt=hlb_gpt)
    names = ("time", "learning rate")
    return dict(zip([*AXES, *names], figure.axes, strict=True))


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Points of the lines of a panel by their labels, without the thin lines of single seeds."""
    labelled = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): tuple(map(list, line.get_data())) for line in labelled}


def groups(*arguments: str | Path) -> dict[str, int]:
    """Labels of the groups of runs, and the number of runs in each."""
    found = group_by_variant(find_runs([str(argument) for argument in arguments]))
    return {label: len(runs) for label, runs in found.items()}


@pytest.mark.parametrize("axis", AXES)
def test_losses_and_target_of_one_run(axis: str, tmp_path: Path) -> None:
    axes = draw_folder(write_run(tmp_path / "mine", [4, 3, 2.5], seed=7))[axis]
    x = pytest.approx([AXES[axis] * step for step in (10, 20, 30)])
    assert lines(axes) == {"mine: seed 7": (x, [4, 3, 2.5]), "target 2": ([0, 1], [2, 2])}
    assert not axes.collections  # no band for a single run


def test_learning_rate_and_times(tmp_path: Path) -> None:
    panels = draw_folder(write_run(tmp_path, [4, 3, 2.5]))
    (rate,) = panels["learning rate"].lines
    assert rate.get_xdata() == pytest.approx([10, 20, 30])
    assert rate.get_ydata() == pytest.approx([1, 1 / 2, 1 / 3])
    widths = [bar.get_width() for bar in panels["time"].patches]
    assert widths == [8, 2, 3, 1.5, 0.5, 5]  # steps, data, validation, compilation, saving, rest
    assert sum(widths) == CLOCKS["wall"]


def test_seeds_share_a_mean_and_a_band_over_their_common_range(tmp_path: Path) -> None:
    losses = [[5, 4, 3, 2.5], [5.5, 4.25, 2.75], [4.5, 4.5, 3.5]]
    for seed, run in enumerate(losses):
        write_run(tmp_path / f"seed_{seed}", run, seed, record={"data_seconds": float(seed)})
    panels = draw_folder(tmp_path)
    values = np.array([run[:3] for run in losses])
    (found,) = [points for name, points in lines(panels["steps"]).items() if "3 seeds" in name]
    assert found == ([10, 20, 30], pytest.approx(values.mean(0)))
    (filled,) = panels["steps"].collections
    corners = {tuple(corner) for corner in filled.get_paths()[0].vertices}
    for k, x in enumerate((10, 20, 30)):
        assert {(x, values[:, k].min()), (x, values[:, k].max())} <= corners
    thin = [list(line.get_ydata()) for line in panels["steps"].lines]
    assert all(run in thin for run in losses)  # each seed as far as it got
    assert panels["time"].patches[1].get_width() == 1  # mean of the waits for data


def test_band_interpolates_linearly() -> None:
    first = Curve(np.array([0.0, 2.0, 4.0]), np.array([4.0, 2.0, 0.0]))
    second = Curve(np.array([1.0, 3.0]), np.array([1.0, 5.0]))
    x, mean, low, high = band([first, second])
    assert x.tolist() == [1, 2, 3]
    assert mean.tolist() == [2, 2.5, 3]
    assert low.tolist() == [1, 2, 1]
    assert high.tolist() == [3, 3, 5]


def test_a_resumed_run_has_no_point_twice(tmp_path: Path) -> None:
    write_run(tmp_path, [4, 3.5, 9, 9], finished=False)
    write_run(tmp_path, [3, 2.5], resumed_at=20)
    panels = draw_folder(tmp_path)
    for axis, unit in AXES.items():
        x, y = next(iter(lines(panels[axis]).values()))
        assert x == pytest.approx([unit * step for step in (10, 20, 30, 40)])
        assert y == [4, 3.5, 3, 2.5]


def test_an_unfinished_run_has_its_own_line_and_no_bar(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / f"quickstart/version_{seed}", [4, 3, 2.5], seed)
    write_run(tmp_path / "quickstart/version_2", [9], 2, finished=False)
    panels = draw_folder(tmp_path)
    found = {name: y for name, (_, y) in lines(panels["steps"]).items()}
    assert found["quickstart: 2 seeds"] == [4, 3, 2.5]
    assert found["quickstart, unfinished: seed 2"] == [9]
    assert [label.get_text() for label in panels["time"].get_yticklabels()] == ["quickstart"]


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    axes = draw_folder(write_run(tmp_path, [4, 3, float("inf"), float("nan")]))["steps"]
    assert axes.get_ylim() == pytest.approx((1.95, 4.05))


def test_runs_that_differ_in_the_seed_only_are_a_group(tmp_path: Path) -> None:
    small = tmp_path / "small"
    for seed in range(2):
        write_run(small / f"version_{seed}", [3], seed)
        write_run(small / f"version_{seed + 2}", [3], seed, model={"net": {"width": 8}})
    both = {f"small ({small}/version_0)": 2, f"small ({small}/version_2)": 2}
    assert groups(tmp_path) == both
    assert groups(tmp_path, small / "version_0") == both  # read once
    named = [f"{name}={small}/version_{k}" for name, k in (("wide", 2), ("wide", 3), ("base", 0))]
    assert groups(*named) == {"wide": 2, "base": 1}
    # Two runs with the same seed are not two samples.
    write_run(small / "version_4", [3], 1)
    assert sorted(groups(tmp_path).values()) == [1, 2, 2]


def test_runs_of_a_benchmark_have_the_names_of_their_variants(tmp_path: Path) -> None:
    for variant in ("as_is", "lr=2"):
        for seed in range(2):
            folder = tmp_path / "quickstart" / variant / f"seed_{seed}"
            write_run(folder, [3], seed, data={"tokenizer": variant})
    assert groups(tmp_path) == {"quickstart, as is": 2, "quickstart, lr=2": 2}
    assert groups(tmp_path / "quickstart" / "lr=2") == {"quickstart, lr=2": 2}


def test_the_published_curve(tmp_path: Path) -> None:
    write_run(tmp_path, [4, 3.8])
    panels = draw_folder(tmp_path, hlb_gpt=True)
    published = lines(panels["million tokens"])["hlb-gpt 0.4.0, 25 seeds"]
    assert published == (HLB_GPT.x.tolist(), HLB_GPT.y.tolist())
    assert not any("hlb" in name for name in lines(panels["steps"]))


@pytest.mark.parametrize("by", BY)
def test_one_panel_with_labels_at_its_lines(by: str, tmp_path: Path) -> None:
    write_run(tmp_path / "near/version_0", [4, 2.25])
    write_run(tmp_path / "met/version_0", [3, 1.97], seed=3)
    write_run(tmp_path / "met/version_1", [4, 1.93], seed=4)
    runs = group_by_variant(find_runs([str(tmp_path / name) for name in ("near", "met")]))
    figure = draw_one(runs, BY[by], hlb_gpt=False, caption="On a CPU.")
    (axes,) = figure.axes
    assert axes.get_xlabel() == BY[by]
    assert figure.get_supxlabel() == "On a CPU."
    labels = [(text.get_text(), text.get_color()) for text in axes.texts]
    near, met = COLORS_ON_ANY_PAGE[:2]
    assert labels == [
        ("near: seed 0\n2.25", near),
        ("met: 2 seeds\n1.95", met),
        ("target 2", GREY),
    ]
    for text in axes.texts[:2]:
        assert text.xy == pytest.approx((20 * AXES[BY[by]], float(text.get_text().split()[-1])))
    # A target that is out of sight is left out.
    runs = group_by_variant(find_runs([str(tmp_path / "near")]))
    (axes,) = draw_one(runs, BY[by], hlb_gpt=False, caption="").axes
    assert len(axes.texts) == 1
    assert axes.get_ylim() == pytest.approx((2.2, 4.05))


def contrast(first: Any, second: Any) -> float:
    """Contrast of two colours as WCAG defines it, from 1 to 21."""
    parts = np.array([to_rgb(first), to_rgb(second)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_one_panel_is_readable_on_a_white_and_on_a_dark_page(page: str, tmp_path: Path) -> None:
    runs = group_by_variant(find_runs([str(write_run(tmp_path, [4, 3]))]))
    figure = draw_one(runs, BY["tokens"], hlb_gpt=True, caption="On a CPU.")
    figure.draw_without_rendering()  # makes the labels of the ticks
    assert all(contrast(color, page) >= 3 for color in COLORS_ON_ANY_PAGE)
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert len(texts) > 10
    spines = [spine for spine in figure.findobj(Spine) if spine.get_visible()]
    for color in [text.get_color() for text in texts] + [spine.get_edgecolor() for spine in spines]:
        assert contrast(color, page) >= 3
    assert [patch.get_facecolor()[3] for patch in (figure.patch, figure.axes[0].patch)] == [0, 0]


def test_an_svg_is_small_and_always_the_same(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [4, 3.5, 3] * 30)
    words = [str(folder), "--by", "tokens", "--caption", "On a CPU.", "--out"]
    files = [tmp_path / name for name in ("a.svg", "b.svg")]
    for file in files:
        assert plot.main([*words, str(file)]) == 0
    text = files[0].read_text()
    assert text == files[1].read_text()
    assert ">On a CPU.</text>" in text
    assert len(text) < 50_000
    assert "<metadata>" not in text


@pytest.mark.parametrize("name", ["x.png", "x.SVG"])
def test_the_command_writes_a_picture(name: str, tmp_path: Path, capsys) -> None:
    write_run(tmp_path / "good", [4, 3])
    write_run(tmp_path / "young", [])
    (tmp_path / "out").mkdir()
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "out" / name)]) == 0
    (picture,) = (tmp_path / "out").iterdir()
    assert picture.name == name
    assert picture.read_bytes()[:4] in (b"\x89PNG", b"<?xm")
    assert capsys.readouterr().out.splitlines() == [
        "not drawn, without a finite validation loss: 1",
        f"written: {picture}",
    ]


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
BROKEN_CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "holds None, so it is no config of a run"),
    "a list": ("[1, 2]", "holds \\[1, 2\\], so it is no config"),
    "cut short": ("trainer: {", "cannot be read: while parsing a flow node"),
    "not UTF-8": (b"\xff\xfe\xfa", "cannot be read: 'utf-8' codec"),
    "deep": ("[" * 600, "cannot be read: maximum recursion"),
    "aliases": (BOMB, "holds .* settings, so it is no config of a run"),
    "an endless alias": ("a: &a [*a]", "cannot be read: maximum recursion"),
    "code": ("a: !!python/name:os.system", "cannot be read: could not determine a constructor"),
    "an odd tag": ("a: !!bool maybe", "cannot be read: 'maybe'"),
    "a key that is a list": ("? [1, 2]\n: 3", "cannot be read: while constructing a mapping"),
    "a target in words": (
        "time_to_target: {init_args: {target: low}}",
        "time_to_target.init_args.target: 'low' is not a number",
    ),
    "a target that is a list": (
        "time_to_target: {init_args: {target: [1]}}",
        r"time_to_target.init_args.target: \[1\] is not a number",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be copied."""
    return write_run(tmp_path_factory.mktemp("good") / "good", [4, 3])


def one_line(words: Sequence[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    """The line in which the command ends; it leaves nothing half-written."""
    before = sorted(Path().rglob("*"))
    assert plot.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sorted(Path().rglob("*")) == before
    return line.removeprefix("plot.py: error: ")


@pytest.mark.parametrize(("text", "message"), BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS)
def test_a_broken_config_is_named(
    text: str | bytes, message: str, good: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good, "run")
    Path("run/config.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    assert re.match(
        f"{tmp_path}/run/config.yaml: {message}.*; restore it", one_line(["run"], capsys)
    )


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_named(
    text: str | bytes, message: str, good: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good, "run")
    Path("run/record.json").write_bytes(text.encode() if isinstance(text, str) else text)
    assert re.match(f"{tmp_path}/run/record.json: .*({message})", one_line(["run"], capsys))


def cut(events: bytes) -> bytes:
    return events[: len(events) // 2]


def garbage(events: bytes) -> bytes:
    return bytes(range(256)) * 2


@pytest.mark.parametrize("broken", [cut, garbage, lambda _: b"", lambda e: e[:300] + e[301:]])
def test_event_files_without_a_loss_are_named(
    broken: Callable[[bytes], bytes], good: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good, "run")
    (events,) = Path("run").glob("events*")
    events.write_bytes(broken(events.read_bytes()))
    message = f"{tmp_path}/run: its event files hold no validation loss; restore them"
    assert one_line(["run"], capsys).startswith(message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.yaml", "run/config.yaml: cannot be read: .*Is a directory"),
        ("events", "run: its curves cannot be read: .*Is a directory"),
    ],
)
def test_a_folder_in_the_place_of_a_file(
    name: str, message: str, good: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good, "run")
    (path,) = Path("run").glob(f"{name}*")
    path.unlink()
    path.mkdir()
    assert re.match(f"{tmp_path}/{message}", one_line(["run"], capsys))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("by", [[], ["--by", "steps"]])
def test_losses_that_are_never_finite(
    loss: float, by: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("bad"), [loss, loss])
    message = f"{tmp_path}/bad: its validation losses are not finite"
    assert one_line(["bad", *by], capsys).startswith(message)


def test_a_run_that_diverged_has_its_label_where_it_was_last_finite(tmp_path: Path) -> None:
    runs = group_by_variant(find_runs([str(write_run(tmp_path / "x", [4, 3, math.nan]))]))
    (label,) = draw_one(runs, BY["steps"], hlb_gpt=False, caption="").axes[0].texts
    assert label.get_text() == "x: seed 0\nnan"
    assert label.xy == (20, 3)


def test_seeds_without_a_common_range_are_not_averaged(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("x/version_0"), [4, 3], seed=0)
    write_run(Path("x/version_1"), [2, 1], seed=1, resumed_at=50)
    assert one_line(["x"], capsys).startswith("x: its runs have no million tokens in common")


def test_runs_without_a_seed_are_samples_of_their_own(tmp_path: Path) -> None:
    for number in range(3):
        write_run(tmp_path / f"x/version_{number}", [4, 3], seed=None)
    assert groups(tmp_path) == {"x": 3}
    write_run(tmp_path / "y/version_0", [4, 3], seed=None)
    axes = draw_folder(tmp_path)["steps"]
    assert {*lines(axes)} == {"x: 3 seeds", "y: no seed", "target 2"}


NAMES = {  # of folders, and as they are drawn
    "cost $5 for $\\frac$": "cost $5 for $\\frac$",
    "_mine_": " _mine_",
    "two\nlines\t and\a bell": "two lines and bell",
    "😀 日本 \U000f0000": "😀 日本",
    "<b>&amp;%s {x}": "<b>&amp;%s {x}",
    "x" * 150: "x" * 29 + " … " + "x" * 29,
}


@pytest.mark.parametrize("words", [[], ["--by", "tokens", "--caption", "$\a\\frac😀"]])
def test_odd_names_are_drawn_as_they_are(
    words: list[str], good: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for name in NAMES:
        shutil.copytree(good, tmp_path / name / "version_0")
    drawn = {f"{name}: seed 0" for name in NAMES.values()}
    assert drawn == {*lines(draw_folder(tmp_path)["steps"])} - {"target 2"}
    picture = tmp_path / "x.svg"
    assert plot.main([str(tmp_path), *words, "--out", str(picture)]) == 0
    texts = xml.dom.minidom.parse(str(picture)).getElementsByTagName("text")
    written = [text.firstChild.data for text in texts]
    assert "cost $5 for $\\frac$: seed 0" in written
    assert any("_mine_" in text for text in written)
    assert not words or "$ \\frac😀" in written
    assert not recwarn.list


def test_too_many_groups_are_told_and_many_seeds_are_drawn(
    good: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(61):
        shutil.copytree(good, f"many/run{number}/version_0")
    assert one_line(["many"], capsys).startswith("61 groups of runs are too many for a picture")
    for number in range(61):
        Path(f"many/run{number}/config.yaml").unlink(missing_ok=True)
    assert plot.main(["same=many/run0", "same=many/run1"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: contains no run; name a folder with config.yaml and events"),
        (["x=empty"], "x=empty: contains no run; name a folder"),
        (["empty/file"], "empty/file: contains no run; name a folder"),
        ([""], ": contains no run; name a folder"),
        (["x="], "x=: contains no run; name a folder"),
        (["x" * 5000], "x{100}: cannot be read: .*File name too long"),
        (["loop"], "loop: (cannot be read: .*loop|contains no run)"),
        (["young"], ".*/young: no validation loss yet; wait for the first one"),
        (["good", "--out", "x.doc"], r"--out: x.doc does not end in .png, .svg, .pdf"),
        (["good", "--out", "x"], r"--out: x does not end in .png, .svg, .pdf"),
        (["good", "--out", ".png"], r"--out: .png does not end in"),
        (["good", "--out", "x.pgf"], r"--out: x.pgf does not end in"),
        (["good", "--out", "none/x.png"], "--out: cannot write none/x.png: .*No such file"),
        (["good", "--out", "empty/file/x.png"], "--out: cannot write .*: .*Not a directory"),
        (["good", "--out", "folder.png"], "--out: cannot write folder.png: .*Is a directory"),
        (["good", "--out", f"{'y' * 300}.png"], "--out: cannot write y+.png: .*too long"),
    ],
)
def test_errors_are_one_line(words, message, good, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty/file").touch()
    Path("folder.png").mkdir()
    Path("loop").symlink_to("loop")
    shutil.copytree(good, "good")
    write_run(Path("young"), [], finished=False)
    assert re.match(message, one_line(words, capsys))
