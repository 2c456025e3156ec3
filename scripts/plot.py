"""Draw runs as one picture: loss by tokens, steps and seconds, where the time went, and the plan.

    python scripts/plot.py runs/quickstart/version_0 --out curves.png
    python scripts/plot.py runs/benchmark --out curves
    python scripts/plot.py before=runs/quickstart/version_0 after=runs/quickstart/version_1

Runs that differ in nothing but their seed make one line, the mean, with a band from the least to
the greatest; it ends where the first of them does, and the others go on as thin lines. A run that
has not got to its end is drawn as far as it got, by itself.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from picture import ENDINGS, draw
from plot_panels import fill, inches
from plot_runs import Group, Run, find, grouped

from hlbgpt.data.sources import WIKITEXT, WIKITEXT_NAME
from hlbgpt.utils.errors import InputError

AUTO, HLB_GPT, NOTHING = AGAINST = ("auto", "hlb-gpt", "nothing")


def files(out: Path) -> list[Path]:
    """What is to be written: `out`, or without an ending both a PNG and an SVG of that name."""
    if out.suffix:
        return [out]
    return [out.with_name(out.name + ending) for ending in ENDINGS]


def draws_published(against: str, runs: Sequence[Run]) -> bool:
    """Whether what was published of hlb-gpt is drawn.

    Of itself it is only beside runs whose settings say that they are measured alike. If asked for,
    it is unless other tokens make the loss another quantity, which raises InputError.
    """
    tokenizers = {run.settings.get("data.tokenizer") for run in runs}
    if against == HLB_GPT and tokenizers != {"gpt2"}:
        raise InputError(
            "--against hlb-gpt: its losses are per token of gpt2, these runs have data.tokenizer "
            f"{', '.join(sorted(map(str, tokenizers)))}; leave it out"
        )
    return against == HLB_GPT or (against == AUTO and all(map(_is_measured_alike, runs)))


def _is_measured_alike(run: Run) -> bool:
    """Whether `run` says that it is of WikiText-103 in hlb-gpt's tokens and windows."""
    data = {key: run.settings.get(f"data.{key}") for key in ("tokenizer", "eval_sequence_length")}
    source = {
        key: run.settings.get(f"data.source.{key}")
        for key in ("class_path", "init_args.path", "init_args.name")
    }
    return (
        data == {"tokenizer": "gpt2", "eval_sequence_length": 1024}
        and source["class_path"] == "hlbgpt.data.HubText"
        and source["init_args.path"] == WIKITEXT
        and source["init_args.name"] in (None, WIKITEXT_NAME)  # None is its default
    )


def report(groups: Sequence[Group], without: Sequence[Path]) -> str:
    """What is drawn and what is not, a line each."""
    lines = []
    for group in groups:
        last = [run.losses["val_loss", "tokens"].y[-1] for run in group.runs]
        seeds = ", ".join(str(run.seed) for run in group.runs)
        values = f"{min(last):.4f}" + (f" to {max(last):.4f}" if len(last) > 1 else "")
        lines.append(f"{group.name}: seed {seeds}; last val_loss {values}")
    lines += [f"left out: {folder}: no curve of val_loss by tokens" for folder in without]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what is asked for; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]FOLDER",
        help="a run, or a folder with runs in it, such as that of a benchmark",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("curves"),
        help="a .png or .svg file; without an ending, both (default: %(default)s)",
    )
    parser.add_argument(
        "--against",
        choices=AGAINST,
        default=AUTO,
        help="draw hlb-gpt's published figures; auto (the default): if all runs are of "
        "WikiText-103 from the hub, in gpt2's tokens, with a data.eval_sequence_length of 1024",
    )
    options = parser.parse_args(arguments)
    try:
        runs, without = find(options.runs)
        groups = grouped(runs)
        hlb_gpt = draws_published(options.against, runs)
        draw(
            "--out",
            paths := files(options.out),
            inches(groups),
            lambda figure: fill(figure, groups, hlb_gpt),
        )
    except InputError as error:
        sys.stderr.write(f"plot.py: error: {error}\n")
        return 2
    print(report(groups, without))
    print(f"written: {', '.join(map(str, paths))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
