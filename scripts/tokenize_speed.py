"""Tokenize a text file and print MB/s on one core and the peak memory of the process.

python scripts/tokenize_speed.py wiki.train.raw
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

from hlbgpt.data import TextFiles
from hlbgpt.data.tokenfile import prepare_token_file
from hlbgpt.data.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", help="UTF-8 text file")
    parser.add_argument("--tokenizer", choices=["gpt2", "bytes"], default="gpt2")
    arguments = parser.parse_args()
    encoding = load_tokenizer(arguments.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        source = TextFiles(train=arguments.text)
        header = prepare_token_file(
            Path(folder) / "tokens", source, "train", lambda: encoding
        ).header
        seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(
        f"{header.text_bytes / 1e6:.1f} MB, {header.tokens:,} tokens in {seconds:.1f} s: "
        f"{header.text_bytes / 1e6 / seconds:.1f} MB/s, peak memory {peak / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
