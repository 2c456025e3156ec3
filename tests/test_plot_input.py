"""What plot.py cannot draw ends in one line, and odd names are drawn as they are."""

import math
import re
import shutil
import xml.dom.minidom
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from test_read_record import BROKEN

pytest.importorskip("matplotlib")
import plot
from plot import BY, draw_one
from run_curves import find_runs, group_by_variant
from test_plot import draw_folder, groups, lines, write_run

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
BROKEN_CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "holds None, so it is no config of a run"),
    "a list": ("[1, 2]", "holds \\[1, 2\\], so it is no config"),
    "cut short": ("trainer: {", "cannot be read: YAML: no YAML at line"),
    "not UTF-8": (b"\xff\xfe\xfa", "cannot be read: 'utf-8' codec"),
    "deep": ("[" * 600, "cannot be read: YAML: line 1: nested deeper"),
    "aliases": (BOMB, "cannot be read: YAML: .* its aliases stand for more than 100000 values"),
    "an endless alias": ("a: &a [*a]", "cannot be read: YAML: line 1: nested .* in itself"),
    "code": (
        "a: !!python/name:os.system",
        "cannot be read: YAML: .*could not determine a constructor",
    ),
    "an odd tag": ("a: !!bool maybe", "cannot be read: YAML: .*'maybe'"),
    "a key that is a list": ("? [1, 2]\n: 3", "cannot be read: YAML: .*found unhashable key"),
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
