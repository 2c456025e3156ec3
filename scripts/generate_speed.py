"""Time generation with and without the cache of what was read, on the CPU.

    python scripts/generate_speed.py --config configs/speedrun.yaml --tokens 512

Takes the arguments of `hlbgpt fit`. Trains nothing and downloads nothing: the network has fresh
weights in fp32, which take as long as trained ones. One prompt of one token is continued.
"""

import argparse
import os
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hlbgpt.cli.checks import require_readable_configs
from hlbgpt.generation.sampling import Generation, generate
from hlbgpt.models import Network
from hlbgpt.planning.plan import Settings
from hlbgpt.utils.errors import InputError, require_positive


class OnCPU(Settings):
    """The network with weights."""

    device = "cpu"


def network(words: list[str]) -> Network:
    """The network of `hlbgpt fit` with these arguments."""
    require_readable_configs(words)
    sys.argv = ["hlbgpt", "fit", *words]
    torch.manual_seed(0)
    with ExitStack() as resources:
        return OnCPU(resources).config_init["fit"].model.net.eval()


def rate(net: Network, tokens: int, *, use_cache: bool) -> float:
    """Tokens a second, of `tokens` that continue one."""
    prompt, how = torch.tensor([0]), Generation(max_new_tokens=tokens)
    start = time.perf_counter()
    generate(net, [prompt], how, vocab_size=net.vocab_size, use_cache=use_cache)
    return tokens / (time.perf_counter() - start)


def report(net: Network, tokens: int, repeats: int) -> str:
    """Rates with and without the cache, by turns: median, lowest and highest."""
    for use_cache in (True, False):
        rate(net, 2, use_cache=use_cache)  # the first pass sets up more than later ones
    rates: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for use_cache, found in rates.items():
            found.append(rate(net, tokens, use_cache=use_cache))
    parameters = sum(parameter.numel() for parameter in net.parameters())
    lines = [
        f"{type(net).__name__}: {parameters:,} parameters; {tokens} tokens; n={repeats}; torch "
        f"{torch.__version__}, threads: {torch.get_num_threads()} of {os.cpu_count()}",
        f"{'tokens/s':<16}{'median':>9}{'lowest':>9}{'highest':>9}",
    ]
    for use_cache, name in ((True, "with cache"), (False, "without cache")):
        found = rates[use_cache]
        values = (statistics.median(found), min(found), max(found))
        lines.append(f"{name:<16}" + "".join(f"{value:>9.2f}" for value in values))
    ratio = statistics.median(rates[True]) / statistics.median(rates[False])
    return "\n".join([*lines, f"ratio of the medians: {ratio:.1f}"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="All other arguments are those of `hlbgpt fit`, such as --config.",
        allow_abbrev=False,
    )
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a text")
    parser.add_argument("--repeats", type=int, default=3, help="texts of each kind")
    options, words = parser.parse_known_args()
    sys.path.insert(0, str(Path.cwd()))  # classes of the current folder, as `hlbgpt` finds them
    try:
        require_positive("--", tokens=options.tokens, repeats=options.repeats)
        net = network(words)
        if not net.reads_cache:
            raise InputError(f"model.net: {type(net).__name__} has no reads_cache; choose another")
        print(report(net, options.tokens, options.repeats))
    except (InputError, MisconfigurationException, OSError) as error:
        sys.stderr.write(f"generate_speed.py: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
