"""Every command and example of the README works; CI runs the two that set everything up."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONFIGS, TINY, fitting

README = (CONFIGS.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
SETUP = [line for line in COMMANDS if "venv" in line]


def test_every_block_is_known() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml"}
    programs = ("hlbgpt ", "tensorboard ", "python scripts/")
    assert all(line.startswith(programs) or line in SETUP for line in COMMANDS)
    assert "<!-- quickstart -->\n```bash\n" + SETUP[0] in README
    assert "<!-- tests -->\n```bash\n" + SETUP[1] in README


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links
    assert all((CONFIGS.parent / link).is_file() for link in links)


@pytest.mark.parametrize("block", [text for language, text in BLOCKS if language == "python"])
def test_examples_are_short(block: str) -> None:
    name, *lines = block.splitlines()
    assert re.fullmatch(r"# \w+\.py", name)
    assert len(lines) <= 20


def small(arguments: list[str], sources: list[str]) -> list[str]:
    """The arguments with everything made small that they do not set themselves."""
    if "--ckpt_path" in arguments:
        return [*arguments, "--trainer.max_steps=6"] if arguments[0] == "fit" else arguments
    own = "--data.source" in arguments or "own_text.yaml" in arguments
    extra = sources[-1:] if own else sources
    given = " ".join(arguments)
    dropped = "model.net." if "--model.net " in given else "nothing"
    config = Path(arguments[arguments.index("--config") + 1])
    suited = fitting(config, TINY)
    return [*arguments, *extra, *[argument for argument in suited if dropped not in argument]]


# What makes the work of a script small.
FEWER = {
    "scripts/crash_test.py": ["--kills", "1", "--steps", "8"],
    "scripts/benchmark.py": ["--seeds", "1"],
    "scripts/generate_speed.py": ["--tokens", "4", "--repeats", "1"],
}


def tiny_for(arguments: list[str], tiny: list[str]) -> list[str]:
    return ["--", *tiny] if arguments[0] == "scripts/benchmark.py" else []


def script(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("race", [line for line in COMMANDS if "proxy" in line])
def test_the_races_of_the_recipes(
    race: str, tmp_path: Path, folder: Path, gpt2: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "scripts"):
        Path(name).symlink_to(CONFIGS.parent / name)
    _, *arguments = shlex.split(re.sub(r"seeds \d", "seeds 1", race.replace("FOLDER", str(folder))))
    script(*arguments, "--trainer.max_steps=2", "--trainer.limit_val_batches=1")
    results = Path(arguments[arguments.index("--out") + 1]) / "results.csv"
    runs = arguments.count("--config") * (1 + arguments.count("--variant"))
    assert len(results.read_text().splitlines()) == 1 + runs


def test_commands_in_the_order_of_the_readme(
    hlbgpt, tiny: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("configs", "scripts"):
        Path(name).symlink_to(CONFIGS.parent / name)
    for name, split in {"train": "train", "validation": "valid", "test": "test"}.items():
        Path(f"{name}.txt").write_bytes((folder / f"wiki.{split}.raw").read_bytes())
    Path("my_texts").mkdir()
    shutil.copy("train.txt", "my_texts")
    texts = Path("train.txt").read_text().split("\n \n")
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for language, block in BLOCKS:
        if language != "bash":
            name = block.splitlines()[0].removeprefix("# ")
            Path(name).write_text(block)
    hlbgpt("fit", "--config", "configs/quickstart.yaml", *tiny)
    for name in ("use.py", "train.py"):
        runpy.run_path(name)
    out = capfd.readouterr().out
    assert out.startswith("Return the ")
    assert Path("quickstart.safetensors").is_file()
    assert "runs/quickstart/version_1" in out
    shutil.rmtree("runs/quickstart/version_1")
    for line in COMMANDS:
        if line in SETUP:
            continue
        program, *arguments = shlex.split(line.replace("FOLDER", str(folder)))
        if program == "python":
            if "proxy" not in line:
                script(*arguments, *FEWER.get(arguments[0], []), *tiny_for(arguments, tiny))
            continue
        if program == "tensorboard":
            command = [sys.executable, "-m", "tensorboard.main", "--inspect", *arguments]
            shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            assert "val_loss" in shown
            continue
        out = hlbgpt(*small(arguments, tiny[:3]))
        if "SayHello" in line or "more.yaml" in line:
            assert "hello, reader" in out
        if arguments[0] == "fit":
            assert "target NOT met" in out, line
        if arguments[0] == "predict":
            assert out.startswith(("Return the ", "If ")), line
