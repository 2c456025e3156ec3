"""Every command and file of the README works; CI runs the two commands that set everything up."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CONFIGS, fitting

ROOT = CONFIGS.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
SETUP = [line for line in COMMANDS if "venv" in line]
# Arguments that make the work of a script small.
FEWER = {
    "tests/crash_test.py": ["--kills", "1", "--steps", "8"],
    "scripts/benchmark.py": ["--seeds", "1", "--"],
    "scripts/gpu_report.py": [
        "--device",
        "cpu",
        "--only",
        "hardware",
        "--config",
        "configs/quickstart.yaml",
    ],
}


def test_every_block_is_known() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml"}
    programs = ("hlbgpt ", "tensorboard ", "python scripts/", "python tests/")
    assert all(line.startswith(programs) or line in SETUP for line in COMMANDS)
    assert "<!-- quickstart -->\n```bash\n" + SETUP[0] in README
    assert "<!-- tests -->\n```bash\n" + SETUP[1] in README
    for language, text in BLOCKS:
        name, *lines = text.splitlines()
        if language != "bash":
            assert re.fullmatch(r"# \w+\.(py|yaml)", name)
            assert len(lines) <= 20


@pytest.mark.parametrize("folder", ["", "configs", "scripts", "tests", "hlbgpt", "hlbgpt/*"])
def test_links_lead_somewhere(folder: str) -> None:
    files = list(ROOT.glob(f"{folder}/README.md" if folder else "README.md"))
    assert files
    for file in files:
        links = re.findall(r"\]\((?!http)([^)]+)\)", file.read_text())
        assert [link for link in links if not (file.parent / link).exists()] == []


def write_files(folder: Path) -> None:
    """Write what the commands of the README read into the current folder."""
    for name in ("configs", "scripts", "tests"):
        Path(name).symlink_to(ROOT / name)
    for name, split in {"train": "train", "validation": "valid", "test": "test"}.items():
        shutil.copy(folder / f"wiki.{split}.raw", f"{name}.txt")
    Path("my_texts").mkdir()
    shutil.copy("train.txt", "my_texts")
    for language, block in BLOCKS:
        if language != "bash":
            Path(block.splitlines()[0].removeprefix("# ")).write_text(block)


def small(words: list[str], tiny: list[str]) -> list[str]:
    """The words of a command, and arguments that make everything small that they leave open."""
    if "--ckpt_path" in words:
        return [*words, "--trainer.max_steps=6"] if words[0] == "fit" else words
    extra = fitting(Path(words[words.index("--config") + 1]), tiny)
    if "schedule.yaml" in words:
        extra = [word for word in extra if not word.startswith("--schedule")]
        extra += ["--model.net.init_args.max_sequence_length=128"]
    typed = tuple(f"{word}." for word in words if word.startswith("--"))
    return [*words, *[word for word in extra if not f"{word.split('=')[0]}.".startswith(typed)]]


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in COMMANDS if "proxy" in line])
def test_comparisons_of_recipes(
    command: str, tmp_path: Path, folder: Path, gpt2: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(folder)
    _, *words = shlex.split(re.sub(r"seeds \d", "seeds 1", command.replace("FOLDER", str(folder))))
    run(*words, "--trainer.max_steps=2", "--trainer.limit_val_batches=1")
    results = json.loads((Path(words[words.index("--out") + 1]) / "results.json").read_text())
    count = words.count("--config") * (1 + words.count("--variant"))
    assert len(results["runs"]) == count


def test_commands_in_the_order_of_the_readme(
    hlbgpt: Callable[..., str], tiny: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_files(folder)
    hlbgpt("fit", "--config", "configs/quickstart.yaml", *tiny)
    runpy.run_path("use.py")
    out = capfd.readouterr().out
    assert out.startswith("Return the ")
    assert "runs/quickstart/version_1" in out
    assert Path("quickstart.safetensors").is_file()
    shutil.rmtree("runs/quickstart/version_1")
    for line in COMMANDS:
        program, *words = shlex.split(line.replace("FOLDER", str(folder)))
        if line in SETUP or "proxy" in line:
            continue
        if program == "python":
            of_benchmark = tiny if words[0] == "scripts/benchmark.py" else []
            run(*words, *FEWER.get(words[0], []), *of_benchmark)
        elif program == "tensorboard":
            assert "val_loss" in run("-m", "tensorboard.main", "--inspect", *words)
        else:
            out = hlbgpt(*small(words, tiny))
            assert words[0] != "fit" or "target NOT met" in out, line
            assert words[0] != "predict" or out.startswith(("Return the ", "If ")), line
            greets = "mine.SayHello" in line or "more.yaml" in line
            assert not greets or "hello, reader" in out
