"""One number for the size: `--scale.depth` makes a config larger or smaller by formulas.

What the config files say is the reference, with its number of blocks as depth. So no number of a
recipe stands here, any config of a FastGPT with a schedule table can be scaled, and its own depth
gives it back. All that is left in the settings are the explicit values; what is typed beats them.

| setting | scales with |
|---|---|
| width | depth, to the nearest multiple of 64 |
| heads | width: the fewest, of at most the reference's size, a multiple of 8 |
| tokens of the schedule and between validations | parameters of block matrices and LM head |
| tokens of a step | tokens of the schedule, to the power 0.383; to the nearest power of two |
| rates of lookup tables and the LM head | width, to the power -0.5 |

The powers are those of nanochat (github.com/karpathy/nanochat, scripts/base_train.py): the batch's
is from arXiv 2505.13738, that of rates is AdamW's habit with a wider network. The rates of Muon and
of vectors stay. Unlike in nanochat, no rate rises with the batch: in short runs of small networks,
the best rates fell as depth and batch rose. As in nanochat, parameters are those that products
compute with. The rest of the recipe (context, value embeddings, buckets, clusters, momentum) stays
as it is.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from pydoc import locate
from typing import Any

from hlbgpt.cli.words import split_configs
from hlbgpt.models import FastGPT
from hlbgpt.optim import MuonAdamW
from hlbgpt.utils.errors import InputError

_NET, _OPTIMIZER = "model.net.init_args", "model.optimizer.init_args"
_WIDTH_MULTIPLE, _HEAD_MULTIPLE = 64, 8
_SET_BY_FORMULAS = re.compile(
    r"--(model\.net\.(init_args\.)?(width|num_heads|num_blocks|value_embed_blocks)\b"
    r"|model\.optimizer\.(init_args\.)?groups\b|schedule\.(init_args\.)?table\b|print_config)"
)
_MOST_BLOCKS = 200
_BATCH_POWER, _RATE_POWER = 0.383, -0.5
_LENGTHS = ("tokens", "validate_every")
_RATES_BY_WIDTH = ("embeddings", "bigram_embedding", "lm_head", "subword_head")


def with_formulas(words: Sequence[str], parse: Callable[[list[str]], Any]) -> list[str]:
    """Words of a command, with the values of the formulas between config files and what is typed.

    Args:
        words: The command, and its words, which set `scale.depth`.
        parse: Parses such words.
    """
    configs, typed = split_configs(words[1:])
    reference = _without(typed, _SET_BY_FORMULAS)
    settings = parse([words[0], *configs, *reference])[words[0]].as_dict()
    formulas = scaled(settings, settings["scale"]["depth"])
    explicit = [f"--{key}={json.dumps(value)}" for key, value in formulas.items()]
    return [words[0], *configs, *explicit, *_without(typed, re.compile("--scale"))]


def _without(words: Sequence[str], names: re.Pattern[str]) -> list[str]:
    """The words but for the options whose names match, with their values."""
    kept, skip = [], False
    for word in words:
        if word.startswith("--"):
            skip = names.match(word) is not None
        if not skip:
            kept.append(word)
    return kept


def scaled(settings: dict[str, Any], depth: int) -> dict[str, Any]:
    """The settings that give a config `depth` blocks, by their dotted names.

    Args:
        settings: Those of the reference, all of them.
        depth: Number of blocks.

    Raises:
        InputError: the depth is out of range, or the settings are not of a kind that can be scaled.
    """
    if not 1 <= depth <= _MOST_BLOCKS:
        raise InputError(
            f"scale.depth: {depth} is not between 1 and {_MOST_BLOCKS}; give the number of blocks"
        )
    _require_scalable(settings)
    net, optimizer = (settings["model"][key]["init_args"] for key in ("net", "optimizer"))
    for name in ("width", "num_heads", "num_blocks", "vocab_size"):
        if net[name] < 1:
            raise InputError(f"model.net.{name}: {net[name]} is less than 1; set it to at least 1")
    table = settings["schedule"]["init_args"]["table"]
    width = _WIDTH_MULTIPLE * max(
        1, round(depth * net["width"] / net["num_blocks"] / _WIDTH_MULTIPLE)
    )
    growth = _parameters(width, depth, net["vocab_size"]) / _parameters(
        net["width"], net["num_blocks"], net["vocab_size"]
    )
    batch = 2.0 ** round(_BATCH_POWER * math.log2(growth))
    return {
        f"{_NET}.width": width,
        f"{_NET}.num_heads": _num_heads(width, max(2, net["width"] // net["num_heads"])),
        f"{_NET}.num_blocks": depth,
        f"{_NET}.value_embed_blocks": min(net["value_embed_blocks"], depth),
        f"{_OPTIMIZER}.groups": _groups(optimizer, width / net["width"]),
        "schedule.init_args.table": [_row(row, growth, batch) for row in table],
    }


def _require_scalable(settings: dict[str, Any]) -> None:
    """Raise InputError unless the settings are of a FastGPT, MuonAdamW and a schedule table."""
    for key, kind in (("net", FastGPT), ("optimizer", MuonAdamW)):
        name = (settings["model"][key] or {}).get("class_path")
        found = locate(str(name))
        if not (isinstance(found, type) and issubclass(found, kind)):
            raise InputError(
                f"scale.depth: model.{key} is {name}, and the formulas are those of "
                f"{kind.__name__}; leave out scale.depth, and set the sizes themselves"
            )
    if not ((settings["schedule"] or {}).get("init_args") or {}).get("table"):
        raise InputError(
            "scale.depth: the config has no schedule.table, whose tokens it would scale; leave it "
            "out, or start from configs/speedrun.yaml"
        )


def _parameters(width: int, depth: int, vocab_size: int) -> int:
    """Weights of the blocks' matrices and of the LM head."""
    return 12 * width**2 * depth + vocab_size * width


def _num_heads(width: int, most: int) -> int:
    """The fewest heads of at most `most` channels, if possible a multiple of 8."""
    heads = [n for n in range(1, width // 2 + 1) if width % (2 * n) == 0 and width // n <= most]
    return next((n for n in heads if width // n % _HEAD_MULTIPLE == 0), heads[0])


def _groups(optimizer: dict[str, Any], wider: float) -> dict[str, Any]:
    """Settings of parameter groups, with their rates."""
    groups = {name: dict(group) for name, group in optimizer["groups"].items()}
    if optimizer["lr"] is None and not any("lr" in group for group in groups.values()):
        raise InputError("scale.depth: no lr to scale; set model.optimizer.lr, or that of groups")
    for name in _RATES_BY_WIDTH:
        if (rate := groups.get(name, {}).get("lr", optimizer["lr"])) is not None:
            groups.setdefault(name, {})["lr"] = _times(rate, wider**_RATE_POWER)
    return groups


def _row(row: dict[str, Any], growth: float, batch: float) -> dict[str, Any]:
    """A row of the schedule table, without the columns that it does not set."""
    row = {name: value for name, value in row.items() if value is not None}
    longer = {name: round(_times(row[name], growth)) for name in _LENGTHS if name in row}
    steps = {name: max(1, round(row[name] * batch)) for name in ("step_tokens",) if name in row}
    return row | longer | steps


def _times(value: float, factor: float) -> float:
    """The product, in a few digits that can be read; the value itself if nothing changes."""
    return value if factor == 1 else float(f"{value * factor:.3g}")
