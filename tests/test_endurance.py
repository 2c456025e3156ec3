"""What takes minutes: kills by the dozen, several processes, texts of gigabytes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, LAST, QUICKSTART, RUN, fitting
from crash_test import curves
from test_interrupt import LONGER, SIGNAL
from test_resume import assert_same

from hlbgpt.runs.checkpoint_io import load_checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_a_run_killed_again_and_again_ends_the_same() -> None:
    script = Path(__file__).with_name("crash_test.py")
    command = [sys.executable, str(script), "--kills", "20", "--seed", "3"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert out.startswith("20 stops; ")
    assert "runs got to their end, all of them equal" in out


def test_two_processes_stop_together_and_go_on(tiny: list[str], tmp_path: Path) -> None:
    """One of them gets the signal; both end as if they had never been stopped."""
    (tmp_path / "mine.py").write_text(SIGNAL)
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", *LONGER]

    def hlbgpt(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hlbgpt", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    whole = hlbgpt("fit", *QUICKSTART, *tiny, *two)
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "runs").rename(tmp_path / "whole")
    values = {"name": "SIGTERM", "hook": "on_train_batch_start", "count": 5}
    sends = [f"--trainer.callbacks.{key}={value}" for key, value in values.items()]
    stopped = hlbgpt("fit", *QUICKSTART, *tiny, *two, "--trainer.callbacks+=mine.Signal", *sends)
    assert stopped.returncode == 143, stopped.stderr
    assert re.search(r"stopped by SIGTERM after step [5-9]; resume with: ", stopped.stdout)
    resumed = hlbgpt("fit", "--ckpt_path", "last", "--trust")
    assert resumed.returncode == 0, resumed.stderr
    assert [path.name for path in (tmp_path / RUN).parent.iterdir()] == ["version_0"]
    ours, theirs = (
        load_checkpoint(tmp_path / name / LAST.relative_to("runs")) for name in ("whole", "runs")
    )
    assert len(theirs["hlbgpt"]["random"]) == 2
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(ours[part], theirs[part], part)
    runs = (tmp_path / name / RUN.relative_to("runs") for name in ("whole", "runs"))
    assert_same(*map(curves, runs))


def test_two_processes_count_the_tokens_of_one(tiny: list[str], tmp_path: Path) -> None:
    """Each counts a half; the network starts from the counts of the whole text."""
    config = CONFIGS / "speedrun.yaml"
    words = [*fitting(config, tiny), "--trainer.callbacks=null", "--trainer.max_steps=1"]
    priors = []
    for devices, strategy in ((1, "auto"), (2, "ddp")):
        run = [f"--trainer.devices={devices}", f"--trainer.strategy={strategy}"]
        run.append(f"--run_name={devices}")
        command = [sys.executable, "-m", "hlbgpt", "fit", "--config", str(config), *words, *run]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        last = tmp_path / "runs" / str(devices) / "version_0" / "checkpoints" / "last.ckpt"
        priors.append(load_checkpoint(last)["state_dict"]["net.lm_head.log_prior"])
    assert torch.equal(*priors)
    assert len(priors[0].unique()) > 50


TOKENIZE = """
import sys, time
from pathlib import Path
import torch
from hlbgpt.data import TextFiles
from hlbgpt.data.prepare import Part, prepare_token_files
from hlbgpt.data.tokenizer import load_tokenizer
from hlbgpt.utils.hardware import peak_memory

encoding, text = load_tokenizer("gpt2"), Path(sys.argv[1])
start = time.perf_counter()
source = TextFiles(train=str(text))
prepare_token_files([Part(text.with_suffix(".tokens"), source)], "train", lambda: encoding)
print(time.perf_counter() - start, peak_memory(torch.device("cpu")))
"""


@pytest.mark.usefixtures("gpt2")
@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_text_of_two_gigabytes_takes_no_more_memory(tmp_path: Path, text: str) -> None:
    """Each is tokenized in a process of its own; `pytest -m slow -s` shows the speed."""

    def peak(megabytes: int) -> float:
        path = tmp_path / f"{megabytes}.txt"
        with path.open("wb") as file:
            block = text.encode()
            for number in range(megabytes * 1_000_000 // len(block)):
                # Words of its own in each block, as a long text goes on to have.
                file.write(block + f" word{number} of block{number}\n".encode() * 20)
        # Linux counts the peak of the parent as the child's own; a small shell between hides ours.
        command = ["sh", "-c", '"$@" || exit 1', "sh", sys.executable, "-c", TOKENIZE, str(path)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        path.unlink()
        seconds, memory = map(float, out.splitlines()[-1].split())
        print(f"{megabytes} MB: {megabytes / seconds:.1f} MB/s, {memory:,.0f} bytes at most")
        return memory

    assert peak(2_000) < 1.1 * peak(100)
