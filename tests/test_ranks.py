"""Several processes train as one, whoever has launched them; with gloo, on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CONFIGS, QUICKSTART, fitting
from helpers import in_ranks, launcher_variables, read_record, start_ranks, wait_for
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
)
from test_resume import assert_same

from hlbgpt.__main__ import main
from hlbgpt.callbacks.vote import Vote
from hlbgpt.data.datamodule import share_out
from hlbgpt.runs import load_checkpoint
from hlbgpt.runs.folder import exclusive
from hlbgpt.runs.ranks import decide, is_first_process, require_all_processes, restarts
from hlbgpt.training.checks import require_supported_strategy
from hlbgpt.training.step import mean_over_ranks
from hlbgpt.utils.errors import InputError

DDP = ["--config", str(CONFIGS / "machines" / "ddp.yaml")]
RECIPES = ["quickstart", "speedrun", "baseline", "hlb041"]
LAUNCHED = [("lightning", 2), ("torchrun", 2), ("torchrun", 3), ("slurm", 2), ("slurm", 3)]
# A run whose steps 1, 2 and 3 devices can share out, and long enough for batches to grow.
LONGER = [
    *("--data.micro_batch_size=6", "--data.micro_batches=2", "--trainer.precision=32-true"),
    *("--trainer.max_steps=12", "--trainer.val_check_interval=4", "--trainer.log_every_n_steps=2"),
]
TABLE = (
    "--schedule.table=[{tokens: 0, sequence_length: 16, step_tokens: 384, validate_every: 1536}, "
    "{tokens: 1536, sequence_length: 32}, {tokens: 4608, lr: 0.1}]"
)

# Writes down, on every rank, what all of them should agree on; and can send a signal to one.
WITNESS = """
import hashlib
import os
import signal
from pathlib import Path

import lightning as L
import torch


class Witness(L.Callback):
    '''Notes the rank's state at the end.

    Args:
        name: Of a signal.
        rank: Which rank gets it.
        step: After which step it does; never if 0.
    '''

    def __init__(self, name: str = "SIGTERM", rank: int = 0, step: int = 0) -> None:
        self.name, self.rank, self.step = name, rank, step

    def on_train_batch_start(self, trainer, *_):
        sent = Path(f"sent.{self.step}")
        if trainer.global_step == self.step > 0 and trainer.global_rank == self.rank:
            if not sent.exists():
                sent.touch()
                os.kill(os.getpid(), getattr(signal, self.name))

    def on_train_end(self, trainer, module):
        digest = hashlib.sha256()
        for tensor in module.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        estimates = [getattr(c, "estimate", None) for c in trainer.callbacks]
        seen = module.tokens_seen, trainer.global_step, trainer.should_stop
        found = digest.hexdigest(), estimates, seen, os.environ.get("PL_GLOBAL_SEED")
        Path(f"state.{trainer.global_rank}").write_text(repr(found))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which processes write down their state."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    Path("mine.py").write_text(WITNESS)
    return tmp_path


def words(recipe: str, tiny: list[str], *extra: str, **witness: Any) -> list[str]:
    """The words of a small run of a recipe that can be shared out over 1, 2 and 3 devices."""
    config = CONFIGS / f"{recipe}.yaml"
    small = [word for word in fitting(config, tiny) if not word.startswith("--schedule")]
    if recipe == "speedrun":
        small += [TABLE, "--schedule.micro_batch_tokens=64"]
    callback = [f"--trainer.callbacks.{key}={value}" for key, value in witness.items()]
    longer = [word for word in LONGER if recipe != "speedrun" or "max_steps" not in word]
    if recipe == "speedrun":
        longer.append("--trainer.max_steps=-1")
    if recipe == "hlb041":
        longer.append("--data.micro_batches=1")
    return [
        *("fit", "--config", str(config), *small, *longer, *extra),
        *("--trainer.callbacks+=mine.Witness", *callback),
    ]


def launch(launcher: str, number: int, command: list[str], timeout: float = 200) -> list[int]:
    """Run a command line in `number` processes; returns their exit codes."""
    if launcher != "lightning":
        ranks = start_ranks(main, command, number=number, launcher=launcher, log=Path("log.txt"))
        return wait_for(ranks, timeout)
    program = [sys.executable, "-m", "hlbgpt", *command, f"--trainer.devices={number}"]
    with Path("log.0").open("a") as log:
        return [subprocess.run(program, timeout=timeout, stdout=log, stderr=log).returncode]


def printed() -> str:
    return "".join(path.read_text() for path in sorted(Path().glob("log.*")))


def states(number: int) -> list[str]:
    """What each rank has noted, which is then forgotten."""
    files = [Path(f"state.{rank}") for rank in range(number)]
    found = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    return found


# --- the same run -----------------------------------------------------------------------------


def trains_as_one(launcher: str, number: int, command: list[str], name: str) -> dict[str, Any]:
    """Run a command line and check that its ranks are one run; returns its record."""
    before = set(Path("runs").glob("*/*"))
    assert not any(launch(launcher, number, command)), printed()
    found = states(number)
    assert found == found[:1] * number
    (folder,) = set(Path("runs").glob("*/*")) - before
    assert folder.parent.name == name
    log = printed()
    assert "sync_dist" not in log
    assert log.count("run folder: ") == log.count("target NOT met") == 1
    for path in Path().glob("log.*"):
        path.unlink()
    record = read_record(folder)
    assert record["devices"] == number
    return record


def assert_same_training(record: dict[str, Any], of_one: dict[str, Any]) -> None:
    for key in ("step", "tokens", "step_tokens", "caveats", "texts", "value_step"):
        assert record[key] == of_one[key], key
    # hlb-gpt 0.4.1 divides gradients of embeddings by the token's count in a device's windows.
    tolerance = 0.05 if "hlb041" in record["config"] else 2e-4
    assert record["value"] == pytest.approx(of_one["value"], abs=tolerance)


def test_two_processes_train_as_one(place: Path, tiny: list[str]) -> None:
    command = words("baseline", tiny, *DDP)  # its batch grows, and its decay follows the loss
    one = trains_as_one("torchrun", 1, command, "baseline")
    two = trains_as_one("torchrun", 2, command, "baseline")
    assert_same_training(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_ranks_train_as_one(place: Path, tiny: list[str], name: str) -> None:
    """Whoever launches them: bit-equal weights, one record, and the loss of one process."""
    command = words(name, tiny)
    one = trains_as_one("torchrun", 1, command, name)
    assert one["step"] > 10
    values = {}
    for launcher, number in LAUNCHED:
        record = trains_as_one(launcher, number, command, name)
        assert_same_training(record, one)
        values[launcher, number] = record["value"]
    assert values["torchrun", 2] == values["slurm", 2] == values["lightning", 2]
    with_overlay = trains_as_one("torchrun", 2, words(name, tiny, *DDP), name)
    assert_same_training(with_overlay, one)


@pytest.mark.slow
def test_a_drawn_seed_is_that_of_the_first_process(place: Path, tiny: list[str]) -> None:
    for launcher in ("torchrun", "lightning"):
        command = words("quickstart", tiny, "--seed_everything=true")
        assert trains_as_one(launcher, 2, command, "quickstart")["seed"] > 0


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_a_step_is_shared_out_evenly_or_not_at_all(parts: int, size: int, devices: int) -> None:
    if parts * size % devices:
        with pytest.raises(InputError, match=f"over {devices} devices; set them to a multiple of"):
            share_out(parts, size, devices)
        return
    own_parts, own_size = share_out(parts, size, devices)
    assert own_parts * own_size * devices == parts * size
    assert own_size <= size
    if devices == 1:
        assert (own_parts, own_size) == (parts, size)


@pytest.mark.slow
def test_a_table_that_the_devices_cannot_keep_is_said(place: Path, tiny: list[str]) -> None:
    table = TABLE.replace("384", "64")  # four windows of 16, then two of 32: too few for three
    command = [*words("speedrun", tiny), table]
    record = trains_as_one("torchrun", 3, command, "speedrun")
    line = "steps of 96 tokens on 3 devices instead of 64"
    assert line in record["caveats"]
    assert record["step_tokens"] == 96


# --- the ranks among themselves ---------------------------------------------------------------


def test_votes_are_made_after_the_same_steps_by_all() -> None:
    """Whatever the pace of each; the largest values count."""

    def vote(rank: int) -> tuple[list[int], list[list[int]], list[float]]:
        ballot, steps, found = Vote(), [], []
        ballot.begin(0)
        for step in range(1, 200):
            time.sleep(2e-3 * (1 + rank))
            if ballot.is_due(step):
                steps.append(step)
                found.append(ballot.largest(step, rank if step < 100 else 9 * (rank == 1), step))
        return steps, found, mean_over_ranks(torch.tensor([rank, 3.0 * rank])).tolist()

    voted = in_ranks(3, vote)
    assert voted == voted[:1] * 3
    steps, found, mean = voted[0]
    assert found == [[2 if step < 100 else 9, step] for step in steps]
    assert len(steps) < 20
    intervals = [after - before for before, after in pairwise([0, *steps])]
    assert all(after <= 2 * before for before, after in pairwise(intervals))
    assert mean == [1.0, 3.0]


def test_without_other_ranks_each_step_is_voted_on() -> None:
    ballot = Vote()
    ballot.begin(0)
    assert all(ballot.is_due(step) for step in range(1, 9))
    assert ballot.largest(8, 15, 0) == [15, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_exchanges_gradients_and_little_else(
    place: Path, tiny: list[str], name: str
) -> None:
    """No barrier, and nothing that the host would wait for; a mean loss where the recipe asks."""
    Path("counter.py").write_text(COUNTER)
    extra = ["--trainer.log_every_n_steps=1000", "--trainer.val_check_interval=1000"]
    if name == "speedrun":
        extra.append(TABLE.replace("validate_every: 1536", "validate_every: 1000000"))
    command = [*words(name, tiny, *DDP, *extra), "--trainer.callbacks+=counter.Counter"]
    assert launch("torchrun", 2, command) == [0, 0], printed()
    counts = json.loads(Path("counts.json").read_text())
    means = 1 if name in ("baseline", "hlb041") else 0
    gathers = sum(number for _, number in counts.pop("gloo:all_gather", []))
    assert gathers == (6 if name == "speedrun" else 0)  # Muon's, one in a step
    assert set(counts) == {"gloo:all_reduce"}
    sizes = counts["gloo:all_reduce"]
    votes = [number for size, number in sizes if size == 3]
    scalars = [number for size, number in sizes if size == 1]
    assert sum(votes) <= 4
    assert sum(scalars) == 6 * means
    parameters = read_record(Path("runs") / name / "version_0")["parameters"]
    assert sum(size * number for size, number in sizes if size > 3) == 6 * parameters


COUNTER = """
import json
import math

import lightning as L
import torch


class Counter(L.Callback):
    '''Counts what rank 0 exchanges in six steps, by kind and number of elements.'''

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 4:
            self.profile = torch.profiler.profile(record_shapes=True)
            self.profile.__enter__()
        if trainer.global_step == 10:
            self.profile.__exit__(None, None, None)
            found = {}
            for event in self.profile.key_averages(group_by_input_shape=True):
                if event.key.startswith(("gloo:", "nccl:")):
                    shape = (event.input_shapes or [[]])[0]
                    found.setdefault(event.key, []).append((math.prod(shape), event.count))
            if trainer.is_global_zero:
                open("counts.json", "w").write(json.dumps(found))
"""


# --- stopping and resuming --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_and_any_number_resumes(
    place: Path, tiny: list[str], rank: int
) -> None:
    """To the same end: bit for bit with as many ranks, and nearly so with others."""
    command = words("quickstart", tiny)
    assert launch("torchrun", 2, command) == [0, 0], printed()
    whole = read_record(Path("runs/quickstart/version_0"))
    weights = load_checkpoint("runs/quickstart/version_0/checkpoints/last.ckpt")["state_dict"]
    for launcher, number in (("slurm", 2), ("torchrun", 1), ("torchrun", 3), ("lightning", 2)):
        root = f"--trainer.default_root_dir=job_{launcher}_{number}"
        for sent in Path().glob("sent.*"):
            sent.unlink()
        stopped = words("quickstart", tiny, root, rank=rank, step=5)
        codes = launch("slurm" if rank else launcher, 2, stopped)
        assert set(codes) == {128 + signal.SIGTERM}, printed()
        found = re.findall(r"stopped by SIGTERM after step (\d+); resume with", printed())
        assert len(found) == 1
        assert 6 <= int(found[0]) < 12
        for path in Path().glob("log.*"):
            path.unlink()
        assert not any(launch(launcher, number, stopped)), printed()
        folder = Path(root.partition("=")[2])
        assert_same_training(read_record(folder), whole)
        assert read_record(folder)["devices"] == number
        if number == 2:
            last = load_checkpoint(folder / "checkpoints/last.ckpt")
            assert_same(weights, last["state_dict"])
    assert len(list(Path("runs/quickstart").iterdir())) == 1


@pytest.mark.slow
def test_slurms_signal_to_one_rank_requeues_the_job_once(
    place: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = place / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {place}/scontrol.log\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    root = "--trainer.default_root_dir=job_77"
    command = words("quickstart", tiny, root, name="SIGUSR1", rank=1, step=5)
    assert launch("slurm", 2, command) == [128 + signal.SIGUSR1] * 2, printed()
    assert Path("scontrol.log").read_text() == "requeue 77\n"
    assert not list(Path("job_77").glob("hpc_ckpt*"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert launch("slurm", 2, command) == [0, 0], printed()
    assert read_record(Path("job_77"))["step"] == 12


@pytest.mark.slow
def test_torchrun_starts_again_after_a_rank_was_killed(
    place: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The killed rank ends all; the same command then resumes the run in its folder."""
    root = "--trainer.default_root_dir=mine_run"
    command = words("quickstart", tiny, root, name="SIGKILL", rank=1, step=8)
    often = "--checkpoint.every_minutes=1e-9"
    # Else torch connects to processes of the first start (pytorch/pytorch#135712).
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program += ["--nproc-per-node=2", "--max-restarts=1", "-m", "hlbgpt", *command, often]
    program.append("--trainer.devices=2")
    done = subprocess.run(program, timeout=250, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    record = read_record(Path("mine_run"))
    assert (record["step"], record["devices"]) == (12, 2)
    assert Path("sent.8").exists()
    found = states(2)
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other(place: Path, tiny: list[str], rank: int) -> None:
    """Also where the launcher does not see to that."""
    command = words("quickstart", tiny, name="SIGKILL", rank=rank, step=5)
    codes = launch("slurm", 2, command, timeout=60)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] not in (0, -signal.SIGKILL)
    assert not list(Path("runs").rglob("record.json"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_last_is_the_same_checkpoint_for_all(place: Path, tiny: list[str], launcher: str) -> None:
    command = words("quickstart", tiny)
    trains_as_one(launcher, 2, command, "quickstart")
    more = ["fit", "--ckpt_path=last", "--trust", "--trainer.max_steps=14"]
    record = trains_as_one(launcher, 2, more, "quickstart")
    assert record["step"] == 14
    log = printed()
    assert not log


@pytest.mark.slow
def test_what_the_first_process_refuses_ends_all(place: Path, tiny: list[str]) -> None:
    root = Path("mine_run")
    root.mkdir()
    command = words("quickstart", tiny, f"--trainer.default_root_dir={root}")
    with exclusive(root):
        assert launch("slurm", 2, command, timeout=60) == [2, 2]
    assert printed().count("is still going on in another process") == 2


@pytest.mark.slow
def test_ranks_diverge_together(place: Path, tiny: list[str]) -> None:
    """A loss that is not finite on one rank stops all, with the same words."""
    Path("bad.py").write_text(
        "import lightning as L\nimport torch\n\nclass Bad(L.Callback):\n"
        "    def on_after_backward(self, trainer, module):\n"
        "        if trainer.global_rank == 1 and trainer.global_step == 6:\n"
        "            module.step_losses[-1] = torch.tensor(torch.nan)\n"
    )
    command = [*words("quickstart", tiny), "--trainer.callbacks+=bad.Bad"]
    assert launch("torchrun", 2, command) == [1, 1], printed()
    lines = [line for line in printed().splitlines() if "diverged: " in line]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert "train loss is nan at step 7; the last finite loss was" in lines[0]


# --- what launchers say -----------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variables of launchers."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "HLBGPT_")) or name.endswith("RANK"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),  # the first process of a second node
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        (launcher_variables("torchrun", 1, 2, 1), False),
        (launcher_variables("slurm", 0, 2, 1), True),
        (launcher_variables("slurm", 1, 2, 1) | {"SLURM_LOCALID": "0"}, False),
        # torchrun, which srun has started on the second node
        (launcher_variables("slurm", 1, 2, 1) | launcher_variables("torchrun", 0, 8, 1), True),
    ],
)
def test_which_process_is_first(
    alone: pytest.MonkeyPatch, variables: dict[str, str], first: bool
) -> None:
    for name, value in variables.items():
        alone.setenv(name, value)
    assert is_first_process() == first


def test_a_process_that_cannot_ask_the_first_one_says_so(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("NODE_RANK", "1")
    with pytest.raises(InputError, match="seed_everything: this process is not the first one"):
        decide("seed_everything", lambda: 1)
    assert decide("lock", lambda: 2, required=False) == 2


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_as_many_processes_as_devices(alone: pytest.MonkeyPatch, launcher: str) -> None:
    for name, value in launcher_variables(launcher, 0, 2, 1).items():
        alone.setenv(name, value)
    require_all_processes(SimpleNamespace(num_devices=2, num_nodes=1))
    with pytest.raises(InputError, match=r"need 1 process\(es\), but .* started 2; set --trainer"):
        require_all_processes(SimpleNamespace(num_devices=1, num_nodes=1))


def test_a_restart_that_does_not_know_its_folder_says_so(
    alone: pytest.MonkeyPatch, place: Path, tiny: list[str], capfd: Any
) -> None:
    alone.setenv("SLURM_RESTART_COUNT", "2")
    assert restarts() == 2
    main(["fit", *QUICKSTART, *tiny])
    assert "restarted: the folder of the run is not known, so a new run" in capfd.readouterr().err
    assert Path("runs/quickstart/version_0/record.json").exists()


@pytest.mark.parametrize(
    ("strategy", "works"),
    [
        (SingleDeviceStrategy(), True),
        (DDPStrategy(), True),
        (type("Mine", (DDPStrategy,), {})(), True),
        (FSDPStrategy(), False),
        (DeepSpeedStrategy.__new__(DeepSpeedStrategy), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_strategies_that_would_train_wrong_are_refused(strategy: Any, works: bool) -> None:
    trainer: Any = SimpleNamespace(strategy=strategy)
    if works:
        require_supported_strategy(trainer)
        return
    with pytest.raises(InputError, match=f"trainer.strategy: {type(strategy).__name__} is not"):
        require_supported_strategy(trainer)
