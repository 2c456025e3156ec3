"""Shared fixtures: a small real text, the command line in this process, and the optional data."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import tiktoken
import torch
import torch.distributed as dist
from hypothesis import settings
from torch import nn

from hlbgpt.__main__ import main

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: a thread for each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# Machines are shared: a slow example is no bug.
settings.register_profile("hlbgpt", deadline=None)
settings.load_profile("hlbgpt")

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = ["--config", str(CONFIGS / "quickstart.yaml")]
RUN = Path("runs/quickstart/version_0")
LAST = RUN / "checkpoints" / "last.ckpt"

# A network and a text small enough to train a few steps in a blink; laid over any config.
TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=4",
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
    "--model.compile=false",
    "--model.net.init_args.vocab_size=256",
    "--model.net.init_args.max_sequence_length=32",
    "--model.net.init_args.width=16",
    "--model.net.init_args.num_heads=2",
    "--model.net.init_args.num_blocks=2",
    "--model.sampling.max_new_tokens=8",
    "--data.tokenizer=bytes",
    "--data.sequence_length=32",
    "--data.micro_batch_size=4",
    "--data.eval_sequence_length=32",
    "--data.eval_batch_size=80",
]


TABLE = (
    "--schedule.table=[{tokens: 0, sequence_length: 16, step_tokens: 128, validate_every: 256}, "
    "{tokens: 256, sequence_length: 32}, {tokens: 512, lr: 0.1}]"
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")


def fitting(config: Path, arguments: list[str]) -> list[str]:
    """Of the arguments in `tiny` those that suit `config`, and what else makes it small."""
    text = config.read_text()
    if "HLB041" in text:
        return [argument for argument in arguments if "num_heads" not in argument]
    if "FastGPT" in text:
        clusters = [
            f"--model.net.init_args.{key}" for key in ("cutoffs=[64,128]", "capacity=[1,1]")
        ]
        if "ngram_rows" in text:
            clusters.append("--model.net.init_args.ngram_rows=5000")
        # Knowing how often each byte comes is worth more than the target of words.
        return [*arguments, *clusters, TABLE, "--time_to_target.target=0.5"]
    return arguments


@pytest.fixture(scope="session")
def text() -> str:
    """Some 200 kB of English: Python's language reference, which every installation carries."""
    return "\n \n".join(topics[name] for name in sorted(topics))[:200_000]


@pytest.fixture(scope="session")
def folder(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in WikiText's layout."""
    folder = tmp_path_factory.mktemp("text")
    for split, part in {
        "train": text[:150_000],
        "valid": text[150_000:155_000],
        "test": text[155_000:160_000],
    }.items():
        (folder / f"wiki.{split}.raw").write_bytes(part.encode())
    return folder


@pytest.fixture
def tiny(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that make any config small, on the small text, with a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    source = [
        "--data.source=hlbgpt.data.TextFiles",
        f"--data.source.folder={folder}",
        f"--data.cache_dir={cache}",
    ]
    return [*source, *TINY]


@pytest.fixture
def hlbgpt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Run a command line in this process, in an empty folder; returns what it printed.

    A non-zero exit raises SystemExit, and `capfd` holds what was printed.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hlbgpt"])
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments: str | Path) -> str:
        for name in ("HLBGPT_DECISIONS", "PL_GLOBAL_SEED"):
            monkeypatch.delenv(name, raising=False)
        capfd.readouterr()
        main([str(argument) for argument in arguments])
        return capfd.readouterr().out

    yield run
    if dist.is_initialized():  # of a run with DDP: forks of this process would wait for its threads
        dist.destroy_process_group()
    for name, module in list(sys.modules.items()):  # so that the next test's `mine.py` is read
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="session")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a finished run of the tiny network, for tests that only read it."""
    place = tmp_path_factory.mktemp("trained")
    source = ["--data.source=hlbgpt.data.TextFiles", f"--data.source.folder={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("HLBGPT_DECISIONS", raising=False)
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        main(["fit", *QUICKSTART, *source, f"--data.cache_dir={place}/cache", *TINY])
    return place / LAST


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and differentiate as torch.compile does, without generating code."""
    compile_ = nn.Module.compile
    quick = {"backend": "aot_eager"}
    monkeypatch.setattr(nn.Module, "compile", lambda net, **how: compile_(net, **(how | quick)))
    torch.compiler.reset()


# Instead of the two devices of `device`: where a CPU cannot do it, or takes long.
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
on_gpu = pytest.mark.parametrize("device", [ON_GPU], indirect=True)
slow_on_cpu = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), ON_GPU], indirect=True
)


@pytest.fixture(params=["cpu", ON_GPU])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU, where compilation generates no code, and with `-m gpu` a GPU.

    Nothing is compiled yet, and settings of other tests do not reach this one, nor the other way.
    """
    if request.param == "cpu":
        request.getfixturevalue("quick_compile")
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    yield torch.device(request.param)
    torch.use_deterministic_algorithms(deterministic)
    if request.param == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `datasets` keep what it prepares in a folder of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")


@pytest.fixture(scope="session")
def gpt2() -> tiktoken.Encoding:
    """The GPT-2 tokenizer, where its files are at hand."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: the GPT-2 files would have to be downloaded")
    return tiktoken.get_encoding("gpt2")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real WikiText and Wikipedia text, where it is at hand."""
    if not (where := os.environ.get("HLBGPT_TEST_DATA")):
        pytest.skip("HLBGPT_TEST_DATA is not set: no WikiText files to test with")
    return Path(where)
