"""Every command, file and link in the documents works; CI runs the two that set all up."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import CONFIGS, fitting
from test_text import write_hub_layout

from hlbgpt.cli.main import build

ROOT = CONFIGS.parent
FOLDERS = ("", "configs/", "hlbgpt/", "hlbgpt/*/", "scripts/", "tests/")
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in FOLDERS
    for path in sorted(ROOT.glob(f"{folder}[RE]*.md"))  # README.md and EXPERIMENTS.md
}
README = DOCUMENTS["README.md"]
HUB_NAME = "roneneldan/TinyStories"
# What a command leaves or prints, beyond what every command of its kind does.
EFFECTS: dict[str, Callable[[str], object]] = {
    "mine.SayHello": lambda out: "hello, reader" in out,
    "more.yaml": lambda out: "hello, reader" in out,
    "--run_name wide": lambda out: Path("runs/wide/version_0/record.json").is_file(),
    "CSVLogger": lambda out: [*Path("logs").rglob("metrics.csv")],
    "Milestone": lambda out: '"milestones": [\n    {' in newest_record(),
    "default_root_dir jobs/quickstart": lambda out: Path("jobs/quickstart/record.json").is_file(),
}
# Arguments that make the work of a script small.
FEWER = {
    "tests/crash_test.py": ["--kills", "1", "--steps", "8"],
    "scripts/benchmark.py": ["--seeds", "1", "--"],
    "scripts/gpu_report.py": [
        *("--device", "cpu", "--only", "hardware", "--config", "configs/quickstart.yaml")
    ],
}


class Block(NamedTuple):
    """A fenced block: `text` of a file, of commands, or of an output."""

    language: str
    text: str


def blocks(document: str) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", document, flags=re.DOTALL | re.MULTILINE)
    return [Block(*block) for block in found]


def commands_of_table(document: str) -> list[str]:
    """The commands in the second column of tables; arguments alone are those of the quickstart."""
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \|$", document, flags=re.MULTILINE)
    spans = [span for row in rows for span in re.findall(r"`([^`]+)`", row)]
    start = "hlbgpt fit --config configs/quickstart.yaml "
    return [start + span for span in spans if span.startswith("--")] + [
        span for span in spans if span.startswith(PROGRAMS)
    ]


PROGRAMS = ("hlbgpt ", "tensorboard ", "python scripts/", "python tests/", "torchrun ")
BLOCKS = [block for document in DOCUMENTS.values() for block in blocks(document)]
FILES = {text.splitlines()[0]: text for language, text in BLOCKS if language in ("python", "yaml")}
JOBS = [text for language, text in BLOCKS if language == "bash" and text.startswith("#!")]
SHELL = "".join(text for language, text in BLOCKS if language == "bash" and text not in JOBS)
TYPED = re.sub(r"\\\n *", "", SHELL).splitlines()
SETUP = [line for line in TYPED if "venv" in line]
CHECKS = [line for line in TYPED if line.startswith(("pytest ", "ruff "))]
COMMANDS = commands_of_table(README) + [line for line in TYPED if line not in SETUP + CHECKS]
# Those that take hours with the recipes as they are, and a picture of them.
LONG = re.compile(r"prox|race\.svg|configs/(midsize|short)\.yaml")
RECIPES = [line for line in COMMANDS if LONG.search(line)]
SEVERAL = [line for line in COMMANDS if line.startswith("torchrun ")]
WITH_GPT2 = [line for line in COMMANDS if "--data.tokenizer gpt2" in line]


def test_every_block_is_known() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml", "text"}
    assert all(line.startswith(PROGRAMS) for line in COMMANDS)
    assert "<!-- quickstart -->\n```bash\n" + SETUP[0] in README
    assert "<!-- tests -->\n```bash\n" + SETUP[1] in README
    assert len(SETUP) == 2
    assert len(commands_of_table(README)) > 20
    assert len(set(COMMANDS)) == len(COMMANDS)  # nothing is said twice
    assert len(FILES) == sum(language in ("python", "yaml") for language, _ in BLOCKS)
    for name, text in FILES.items():
        assert re.fullmatch(r"# \w+\.(py|yaml)", name)
        assert len(text.splitlines()) <= 26


def anchors(document: str) -> set[str]:
    """The names that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", document, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", DOCUMENTS[name]):
        path, _, anchor = link.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), link
        assert not anchor or anchor in anchors(file.read_text()), link


def test_commands_for_developers(request: pytest.FixtureRequest) -> None:
    """CI runs the checks; markers and files of the other commands exist."""
    known = {line.partition(":")[0] for line in request.config.getini("markers")}
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert len(CHECKS) > 3
    for line in CHECKS:
        if line.startswith("ruff"):
            assert set(line.split(" && ")) <= set(ci)
            continue
        _, *words = shlex.split(line, comments=True)
        marks = words[words.index("-m") + 1] if "-m" in words else ""
        assert set(marks.split()) <= known | {"and", "or", "not"}
        assert all((ROOT / word).exists() for word in words if word.endswith(".py"))
    extras = [re.findall(r"pip install -e '\.\[(.+?)\]'", text) for text in DOCUMENTS.values()]
    asked = {extra for found in extras for group in found for extra in group.split(",")}
    assert {"dev", "plot"} <= asked <= set(metadata("hlbgpt").get_all("Provides-Extra") or ())


def test_the_output_that_the_readme_promises(
    hlbgpt: Callable[..., str], tiny: list[str], folder: Path
) -> None:
    """Line for line but for the numbers, and what is between the lines."""
    (promised,) = [text for language, text in BLOCKS if language == "text"]
    Path("configs").symlink_to(CONFIGS)
    words = shlex.split(SETUP[0])[-3:]
    assert words[0] == "fit"
    out = hlbgpt(*words, *tiny, "--time_to_target.target=9")
    printed = iter([shape(line) for line in out.splitlines()])
    for line in filter(None, promised.splitlines()):
        assert shape(line) in printed, line  # looks on from where the last line was


def shape(line: str) -> str:
    """A line without its numbers and without the number of spaces."""
    return " ".join(re.sub(r"\d[\d.,]*", "0", line).split())


@pytest.fixture
def files(
    hlbgpt: Callable[..., str], folder: Path, hub_cache: None, request: pytest.FixtureRequest
) -> dict[str, str]:
    """Write what the commands read into the current folder; names of what else they read."""
    for name in ("configs", "scripts", "tests"):
        Path(name).symlink_to(ROOT / name)
    splits = {"train": "train", "validation": "valid", "test": "test"}
    for name, split in splits.items():
        shutil.copy(folder / f"wiki.{split}.raw", f"{name}.txt")
    Path("my_texts").mkdir()
    shutil.copy("train.txt", "my_texts")
    for name, text in FILES.items():
        Path(name.removeprefix("# ")).write_text(text)
    texts = {name: Path(f"{name}.txt").read_text() for name in splits}
    return {"FOLDER": str(folder), HUB_NAME: str(write_hub_layout(Path("hub").resolve(), texts))}


def words_of(command: str, files: dict[str, str]) -> list[str]:
    """The words of a command behind its program, with names of files that are here."""
    for name, path in files.items():
        command = command.replace(name, path)
    return shlex.split(command)[1:]


def small(words: list[str], tiny: list[str]) -> list[str]:
    """The words of a command, and arguments that make everything small that they leave open."""
    if "--config" not in words:  # as the run was that is continued
        # The newest run may be one with a class of the reader's own.
        trust = ["--trust"] if "last" in words else []
        return [*words, *trust, *(["--trainer.max_steps=6"] if words[0] == "fit" else [])]
    extra = fitting(Path(words[words.index("--config") + 1]), tiny)
    if "--ckpt_path" in words:
        extra += ["--trainer.max_steps=6"]
    if "schedule.yaml" in words:
        extra = [word for word in extra if not word.startswith("--schedule")]
        extra += ["--model.net.init_args.max_sequence_length=128"]
    typed = tuple(f"{word}." for word in words if word.startswith("--"))
    setting = {word: word.partition("=")[0].replace(".init_args", "") + "." for word in extra}
    return [*words, *[word for word in extra if not setting[word].startswith(typed)]]


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout
    return done.stdout


def run_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script in this process, which has imported most of what the script needs."""
    monkeypatch.setattr(sys, "argv", words)
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stopped:
        if stopped.code:
            raise


def newest_record() -> str:
    return max(
        Path("runs").rglob("record.json"), key=lambda path: path.stat().st_mtime_ns
    ).read_text()


@pytest.mark.slow
def test_comparisons_of_recipes(
    files: dict[str, str], gpt2: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(".github").mkdir()
    assert len(RECIPES) == 10
    for command in RECIPES:
        words = words_of(re.sub(r"seeds \d", "seeds 1", command), files)
        program = ["-m", "hlbgpt"] if command.startswith("hlbgpt") else []
        few = (
            []
            if words[0] == "scripts/plot.py"
            else ["--trainer.max_steps=2", "--trainer.limit_val_batches=1"]
        )
        run(*program, *words, *few)
        if words[0] == "scripts/benchmark.py":
            results = json.loads(Path(words[words.index("--out") + 1], "results.json").read_text())
            assert len(results["runs"]) == words.count("--config") * (1 + words.count("--variant"))
    picture = Path(".github/race.svg").read_text()
    assert all(name in picture for name in ("speedrun", "hlb-gpt 0.4.1", "hlb-gpt 0.1.0", "CPU"))


@pytest.mark.slow  # CI runs it
def test_completion_in_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bash completes after a tab, with the script that the README's command prints."""
    pytest.importorskip("shtab")
    monkeypatch.chdir(tmp_path)
    (words,) = re.findall(r'`eval "\$\(hlbgpt (.*?)\)"`', README)
    Path("completion").write_text(run("-m", "hlbgpt", *words.split()))
    for typed, completed in {
        "--trainer.max_st": "--trainer.max_steps",
        "--time_to_target.ta": "--time_to_target.target",
    }.items():
        ask = (
            f"source completion; COMP_WORDS=(hlbgpt fit {typed}); COMP_CWORD=2; "
            '_shtab_hlbgpt; echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [completed]


@pytest.mark.slow  # CI runs it
def test_commands_and_files_in_their_order(
    hlbgpt: Callable[..., str],
    tiny: list[str],
    files: dict[str, str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hlbgpt("fit", "--config", "configs/quickstart.yaml", *tiny)
    for line in COMMANDS:
        program, words = line.split()[0], words_of(line, files)
        if line in (*RECIPES, *WITH_GPT2, *SEVERAL):
            continue
        if words[0] == "tests/crash_test.py":  # forks
            run(*words, *FEWER[words[0]])
        elif program == "python":
            of_benchmark = tiny if words[0] == "scripts/benchmark.py" else []
            run_script([*words, *FEWER.get(words[0], []), *of_benchmark], monkeypatch)
        elif program == "tensorboard":
            assert "val_loss" in run("-m", "tensorboard.main", "--inspect", *words)
        elif "configs/machines/ddp.yaml" in words:  # started by test_ranks.py
            build(words[1:])
        else:
            check(line, words, hlbgpt(*small(words, tiny)))
    capfd.readouterr()
    runpy.run_path("use.py")
    assert capfd.readouterr().out.startswith("Return the ")
    assert {path.name for path in Path("quickstart").iterdir()} > {"config.json"}
    assert Path("quickstart.safetensors").is_file()
    assert runpy.run_path("parts.py")["logits"].shape == (1, 3, 256)
    assert Path("parts/record.json").is_file()


# Starts two processes on this machine, as srun does on its nodes.
SRUN = """#!/bin/bash
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_NNODES=1 SLURM_NODELIST=127.0.0.1 SLURM_NODEID=0
export SLURM_JOB_NAME=train
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & SLURM_PROCID=0 SLURM_LOCALID=0 "$@" && wait $!
"""


@pytest.mark.slow
def test_commands_for_several_machines(
    files: dict[str, str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two processes on this one."""
    Path("bin").mkdir()
    arguments = shlex.join([*fitting(CONFIGS / "speedrun.yaml", tiny), "--trainer.max_steps=-1"])
    arguments += " --trainer.devices 2 --trainer.num_nodes 1"
    programs = {
        "hlbgpt": f'#!/bin/bash\nexec {sys.executable} -m hlbgpt "$@" {arguments}\n',
        "torchrun": f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@" {arguments}',
        "srun": SRUN,
    }
    for name, text in programs.items():
        Path("bin", name).write_text(text)
        Path("bin", name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').resolve()}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    (line,), (job,) = SEVERAL, JOBS
    one_machine = {"--nnodes 2": "--nnodes 1", "node 8": "node 2", "node0": "localhost"}
    for there, here in one_machine.items():
        assert there in line
        line = line.replace(there, here)
    for command in (line, job):
        subprocess.run(["bash", "-c", command], check=True, timeout=200)
    for folder in ("runs/speedrun/version_0", "jobs/77"):
        assert json.loads(Path(folder, "record.json").read_text())["devices"] == 2


def test_commands_with_the_tokenizer_of_gpt2(
    hlbgpt: Callable[..., str], tiny: list[str], files: dict[str, str], gpt2: object
) -> None:
    assert WITH_GPT2
    for line in WITH_GPT2:
        words = words_of(line, files)
        check(line, words, hlbgpt(*small(words, tiny)))


def check(line: str, words: list[str], out: str) -> None:
    """The command did what it is for."""
    assert words[0] != "fit" or "target NOT met" in out, line
    if words[0] == "predict":
        prompts = words[words.index("--data.prompts") + 1]
        assert out.startswith(json.loads(prompts)[0] if prompts[0] == "[" else prompts), line
    for part, effect in EFFECTS.items():
        assert part not in line or effect(out), line
