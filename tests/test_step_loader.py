"""Training batches from a loader of one's own, and from LitData's shards."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAST, QUICKSTART, RUN
from helpers import in_ranks, read_record
from test_readme import FILES
from test_resume import assert_same

from hlbgpt.data.litdata_loader import LitDataLoader
from hlbgpt.runs.checkpoint_io import load_checkpoint
from hlbgpt.utils.errors import InputError


@pytest.fixture
def own(hlbgpt: Callable[..., str], tiny: list[str], folder: Path) -> list[str]:
    """Arguments for `BinaryFile`, with a text for validation alone."""
    Path("binary.py").write_text(FILES["# binary.py"])
    text = (folder / "wiki.train.raw").read_bytes()
    np.frombuffer(text, "u1").astype("<u2").tofile("train.bin")
    validation = f"--data.source.validation={folder / 'wiki.valid.raw'}"
    source = ["--data.source=hlbgpt.data.TextFiles", validation]
    return [*source, *tiny[2:], "--data.train_loader=binary.BinaryFile"]


def assert_resumed_exactly() -> None:
    """The resumed run ended as `whole`; it has a folder of its own, for that before had ended."""
    resumed = RUN.with_name("version_1") / "checkpoints" / "last.ckpt"
    ours, theirs = load_checkpoint(resumed), load_checkpoint(Path("whole", *LAST.parts[2:]))
    assert ours["global_step"] == theirs["global_step"]
    for part in ("state_dict", "optimizer_states"):
        assert_same(ours[part], theirs[part], part)


def test_a_loader_of_ones_own_trains_and_resumes_exactly(
    hlbgpt: Callable[..., str], own: list[str]
) -> None:
    words = [*QUICKSTART, *own, "--data.train_loader.file=train.bin", "--data.micro_batches=2"]
    hlbgpt("fit", *words, "--trainer.max_steps=6")
    assert read_record(RUN)["texts"]["train"] == ["train.bin"]
    RUN.parent.rename("whole")
    hlbgpt("fit", *words, "--trainer.max_steps=2")
    hlbgpt("fit", "--ckpt_path", LAST, "--trainer.max_steps=6", "--trust")
    assert_resumed_exactly()
    assert not list(Path(own[2].partition("=")[2]).glob("train-*"))


def test_a_schedule_sets_its_shapes(hlbgpt: Callable[..., str], own: list[str]) -> None:
    rows = "[{tokens: 0, sequence_length: 16, step_tokens: 128, validate_every: 256}, "
    rows += "{tokens: 256, sequence_length: 32, step_tokens: 256}, {tokens: 512}]"
    table = [f"--schedule.table={rows}", "--trainer.max_steps=-1", "--model.lr_scheduler=null"]
    hlbgpt("fit", *QUICKSTART, *own, *table)
    assert read_record(RUN)["tokens"] == 512


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.train_loader=hlbgpt.data.TrainLoader"], "data.source: no text for the train"),
        (["--data.train_loader=hlbgpt.data.TextFiles"], "to be a subclass of <class 'StepLoader'>"),
        (["--data.train_loader.fille=a"], "Option 'fille' is not accepted"),
        (
            ["--data.train_loader=hlbgpt.data.litdata_loader.LitDataLoader"],
            "arguments are required: folder",
        ),
        (
            [
                "--model.net=hlbgpt.models.FastGPT",
                "--model.net.cutoffs=[64,128]",
                "--model.net.capacity=[1,1]",
            ],
            "data.train_loader: BinaryFile has no token_counts, which the network starts from",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    hlbgpt: Callable[..., str],
    own: list[str],
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        hlbgpt("fit", *QUICKSTART, *own, *words)
    err = capfd.readouterr().err
    assert message in err
    assert "Traceback" not in err


# --- LitData --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 20 times 1000 tokens, each another number."""
    litdata = pytest.importorskip(
        "litdata", reason="needs litdata, of which `dev` has none: pip install 'hlbgpt[litdata]'"
    )
    work = tmp_path_factory.mktemp("litdata")
    with pytest.MonkeyPatch.context() as patch:
        # It empties these folders, which are /tmp/chunks and /tmp/data by default.
        patch.setenv("DATA_OPTIMIZER_CACHE_FOLDER", str(work / "chunks"))
        patch.setenv("DATA_OPTIMIZER_DATA_CACHE_FOLDER", str(work / "data"))
        litdata.optimize(
            numbers,
            [(start, start + 1000) for start in range(0, 20_000, 1000)],
            str(work / "shards"),
            chunk_size=4000,
            item_loader=litdata.TokensLoader(),
            num_workers=1,
            verbose=False,
        )
    return work / "shards"


def numbers(ends: tuple[int, int]) -> Iterator[torch.Tensor]:
    yield torch.arange(*ends, dtype=torch.int32)


def lit(shards: Path, **shape: int) -> LitDataLoader:
    loader = LitDataLoader(None, 3, folder=str(shards))
    loader.set_step(micro_batches=2, batch_size=4, sequence_length=49)
    return loader


def test_litdata_hands_out_each_window_once_an_epoch(shards: Path) -> None:
    steps = list(islice(lit(shards), 100))
    assert steps[0].shape == (2, 4, 50)
    assert steps[0].dtype == torch.int64
    rows = torch.cat([step.flatten(0, 1) for step in steps])
    assert torch.equal(rows, rows[:, :1] + torch.arange(50))
    first, second = rows[:400, 0], rows[400:, 0]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(0, 20_000, 50))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("stop", [0, 7, 50, 58])
def test_litdata_continues_where_it_stopped(shards: Path, stop: int) -> None:
    whole = list(islice(lit(shards), 70))
    stopped, resumed = lit(shards), lit(shards)
    list(islice(stopped, stop))
    state = stopped.state_dict()
    assert all(type(value) is int for value in state.values())
    resumed.load_state_dict(state)
    resumed.set_step(micro_batches=2, batch_size=4, sequence_length=49)
    for ours, theirs in zip(islice(resumed, 70 - stop), whole[stop:], strict=True):
        assert torch.equal(ours, theirs)
    resumed.set_step(sequence_length=24)
    assert next(iter(resumed)).shape == (2, 4, 25)
    assert resumed.epoch == 2


def test_mistakes_with_litdata_are_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.train_loader\.folder: no shards of LitData in"):
        LitDataLoader(None, 0, folder=str(tmp_path))
    loader = lit(shards)
    loader.set_step(sequence_length=5_000)
    with pytest.raises(InputError, match="hold no window of 5001 tokens"):
        next(iter(loader))
    with pytest.raises(InputError, match="is no place in a text"):
        loader.load_state_dict({"epoch": 1})


def test_a_run_on_litdata_resumes_exactly(
    hlbgpt: Callable[..., str], own: list[str], shards: Path
) -> None:
    words = [*QUICKSTART, *own, "--data.train_loader=hlbgpt.data.litdata_loader.LitDataLoader"]
    words += [f"--data.train_loader.folder={shards}", "--model.net.init_args.vocab_size=20000"]
    hlbgpt("fit", *words, "--trainer.max_steps=4", "--data.seed=3")
    RUN.parent.rename("whole")
    hlbgpt("fit", *words, "--trainer.max_steps=2", "--data.seed=3")
    hlbgpt("fit", "--ckpt_path", LAST, "--trainer.max_steps=4")
    assert_resumed_exactly()


@pytest.mark.slow
def test_two_processes_share_litdata_windows(shards: Path) -> None:
    def first_tokens(rank: int) -> torch.Tensor:
        loader = LitDataLoader(None, 3, rank, 2, folder=str(shards))
        loader.set_step(batch_size=4, sequence_length=49)
        return torch.cat([step[0] for step in islice(loader, 50)])[:, 0]

    starts = torch.cat(in_ranks(2, first_tokens))
    assert sorted(starts.tolist()) == list(range(0, 20_000, 50))
