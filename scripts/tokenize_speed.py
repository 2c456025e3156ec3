"""Tokenize a text file and print MB/s on one core and the peak memory of the process.

python scripts/tokenize_speed.py wiki.train.raw
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from hlbgpt.data import TextFiles
from hlbgpt.data.token_file import prepare_token_file
from hlbgpt.data.tokenizer import load_tokenizer
from hlbgpt.utils.machine import peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", help="UTF-8 text file")
    parser.add_argument("--tokenizer", choices=["gpt2", "bytes"], default="gpt2")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    encoding = load_tokenizer(arguments.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        source = TextFiles(train=arguments.text)
        header = prepare_token_file(
            Path(folder) / "tokens", source, "train", lambda: encoding
        ).header
        seconds = time.perf_counter() - start
    figures = {
        "text_bytes": header.text_bytes,
        "tokens": header.tokens,
        "seconds": seconds,
        "megabytes_per_second": header.text_bytes / 1e6 / seconds,
        "peak_memory_bytes": peak_memory(torch.device("cpu")) or 0,
    }
    if arguments.json:
        print(json.dumps(figures))
        return
    print(
        "{text_bytes:,} bytes, {tokens:,} tokens in {seconds:.1f} s: {megabytes_per_second:.1f} "
        "MB/s, peak memory {peak_memory_bytes:,} bytes".format(**figures)
    )


if __name__ == "__main__":
    main()
