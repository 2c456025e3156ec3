"""Runs with another encoding of tiktoken and with special tokens, from the text to predictions."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
from conftest import LAST, QUICKSTART, RUN
from helpers import small_ranks

from hlbgpt import PretrainedModel, fit
from hlbgpt.data.token_file import TokenFile
from hlbgpt.data.tokenizer import load_tokenizer

SPECIAL = ["<|user|>", "<|assistant|>"]
LARGE = ["--data.tokenizer=cl100k_base", "--model.net.init_args.vocab_size=100352"]
LARGE.append("--data.eval_batch_size=1")
CHAT = [*LARGE, f"--data.special_tokens={json.dumps(SPECIAL)}"]


@pytest.fixture(autouse=True)
def small_encodings(monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken's newer encodings with a small vocabulary, which need not be downloaded."""
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", small_ranks)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})


@pytest.fixture
def chats(text: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a text of questions and answers, with a cache of its own."""
    folder = tmp_path_factory.mktemp("chats")
    lines = text[:100_000].replace("\n", f"\n{SPECIAL[0]}").replace(". ", f"{SPECIAL[1]} ")
    for split, size in {"train": len(lines), "valid": 300}.items():  # 100,000 logits a token
        (folder / f"wiki.{split}.raw").write_text(lines[:size])
    return [f"--data.source.folder={folder}", f"--data.cache_dir={folder / 'cache'}"]


def token_files(chats: list[str]) -> list[TokenFile]:
    cache = Path(chats[1].partition("=")[2])
    return [TokenFile(path) for path in sorted(cache.glob("train-*"))]


def test_special_tokens_from_the_text_to_a_continuation(
    hlbgpt: Callable[..., str], tiny: list[str], chats: list[str]
) -> None:
    hlbgpt("fit", *QUICKSTART, *tiny, *chats, *CHAT)
    (file,) = token_files(chats)
    assert file.tokens.dtype == np.uint32
    assert (file.header.tokenizer, file.header.vocab_size) == (
        "cl100k_base + 2 special tokens",
        100_279,
    )
    written = Path(chats[0].partition("=")[2], "wiki.train.raw").read_text()
    for number, special in enumerate(SPECIAL):
        assert np.count_nonzero(file.tokens == 100_277 + number) == written.count(special) > 100
    tokenizer = load_tokenizer("cl100k_base", SPECIAL)
    assert file.tokens.tolist() == tokenizer.encode(written)

    out = hlbgpt("predict", "--ckpt_path", LAST, "--data.prompts", "<|user|>If ")
    model = PretrainedModel.from_checkpoint(LAST)
    assert (model.tokenizer, model.special_tokens) == ("cl100k_base", SPECIAL)
    text = model.generate("<|user|>If ", max_new_tokens=8)
    assert out == f"{text}\n\n"
    assert text.startswith("<|user|>If ")
    model.save("chat")
    again = PretrainedModel.from_safetensors("chat")
    assert again.generate("<|user|>If ", max_new_tokens=8) == text


def test_from_python(hlbgpt: Callable[..., str], tiny: list[str]) -> None:
    words = [*tiny, "--model.net.init_args.vocab_size=258"]
    settings = dict(word.removeprefix("--").split("=", 1) for word in words)
    run = fit(QUICKSTART[1], settings | {"data.special_tokens": SPECIAL})
    assert run.model.special_tokens == SPECIAL
    assert PretrainedModel.from_checkpoint(LAST).special_tokens == SPECIAL


def test_a_token_file_is_enough_to_train(
    hlbgpt: Callable[..., str],
    tiny: list[str],
    chats: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The tokenizer is not loaded, and the vocabulary is known nevertheless."""
    words = [*QUICKSTART, *tiny, *chats, *CHAT, "--trainer.callbacks=null"]  # no samples
    hlbgpt("fit", *words)

    def unavailable(name: str) -> tiktoken.Encoding:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unavailable)
    hlbgpt("fit", *words)
    with pytest.raises(SystemExit):
        hlbgpt("fit", *words, "--model.net.init_args.vocab_size=100278")
    assert "vocab_size: 100278 is less than the 100279 tokens of" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        hlbgpt("predict", "--ckpt_path", RUN / "checkpoints" / "last.ckpt", "--data.prompts", "a")
    assert "data.tokenizer: cannot download cl100k_base.tiktoken" in capfd.readouterr().err


def test_other_special_tokens_are_another_file(
    hlbgpt: Callable[..., str], tiny: list[str], chats: list[str]
) -> None:
    small = ["--model.net.init_args.vocab_size=258", "--trainer.max_steps=1"]
    for special in ([], SPECIAL[:1], SPECIAL, SPECIAL[::-1]):
        words = [*small, f"--data.special_tokens={json.dumps(special)}"]
        hlbgpt("fit", *QUICKSTART, *tiny, *chats, *words)
    files = token_files(chats)
    assert len(files) == 4
    assert sorted(file.header.vocab_size for file in files) == [256, 257, 258, 258]
    # Where they are not special tokens, their text takes several.
    assert len({file.header.tokens for file in files}) == 3
