"""The picture shows the numbers that the runs logged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import open_logger
from test_read_record import write_record

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
