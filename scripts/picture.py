"""What the pictures of the scripts share: their style, and how they get into files."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hlbgpt.utils.errors import InputError

ENDINGS = (".png", ".svg")
# For pictures 7 to 9 inches wide, so that text stays legible at the width of a README, some 800
# pixels.
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlesize": 11,
    "svg.fonttype": "none",
    "svg.hashsalt": "hlbgpt",  # the same file every time
}
_DOTS_PER_INCH = 220


def draw(
    key: str, paths: Sequence[Path], inches: tuple[float, float], fill: Callable[[Any], None]
) -> None:
    """Have `fill` draw into a figure, and write it into PNG and SVG files: into all, or into none.

    Args:
        key: Option that named the paths, for what is wrong with them.
        paths: Where to.
        inches: Width and height.
        fill: Given a `matplotlib.figure.Figure`.

    Raises:
        InputError: for another kind of file, one that cannot be written, or without matplotlib.
    """
    for path in paths:
        if path.suffix.lower() not in ENDINGS:
            raise InputError(f"{key} {path}: name a file that ends in .png or .svg")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"{key}: matplotlib is not installed; pip install -e '.[plot]'") from error
    with rc_context(STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        fill(figure)
        _save(figure, key, paths)


def _save(figure: Any, key: str, paths: Sequence[Path]) -> None:
    temporary = {path: path.with_name(f".{path.name}.tmp") for path in paths}
    if folder := next((path for path in paths if path.is_dir()), None):
        raise InputError(f"{key} {folder}: is a folder; name a file")
    try:
        for path, beside in temporary.items():
            kind = path.suffix.lower().removeprefix(".")
            metadata = {"Date": None} if kind == "svg" else {}
            figure.savefig(beside, format=kind, dpi=_DOTS_PER_INCH, metadata=metadata)
        for path, beside in temporary.items():
            beside.replace(path)
    except OSError as error:
        raise InputError(
            f"{key} {path}: cannot be written: {error.strerror}; name a file in a folder that can "
            "be written to"
        ) from error
    finally:
        for beside in temporary.values():
            with contextlib.suppress(OSError):
                beside.unlink()
