"""What has been published of hlb-gpt on WikiText-103, to be drawn beside runs of one's own.

GPT-2's tokens, 50257 of them. The losses are means over 150 random windows of 1024 tokens, not over
the whole validation split, so that a single reading is off by about 0.03.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """When a version of hlb-gpt meets a validation loss of 3.8 on one A100.

    Attributes:
        version: Of hlb-gpt.
        seconds: Of training, as its README says.
    """

    version: str
    seconds: float


TARGET = 3.8
DEVICE = "A100"
README = "github.com/tysam-code/hlb-gpt"
# The newest last. "Just over" six and three minutes, "about" 100 seconds.
TIMES = (Published("0.0.0", 360.0), Published("0.1.0", 180.0), Published("0.4.1", 100.0))

CURVE_VERSION, CURVE_SEEDS = "0.4.0", 25
CURVE_SOURCE = "github.com/snimu/hlb-gpt-value-activation"
# Tokens seen and validation loss: the mean over the seeds, each interpolated between its readings;
# standard deviations are 0.02 to 0.04. All seeds have their first reading at the first of these.
# Source: results/results_25_tries_1000_steps_40Mparams.csv, its rows with linear_value False,
# which is hlb-gpt as it was released.
CURVE = (
    (2_860_800, 5.48),
    (4_000_000, 5.31),
    (6_000_000, 5.01),
    (8_000_000, 4.78),
    (10_000_000, 4.62),
    (15_000_000, 4.38),
    (20_000_000, 4.23),
    (25_000_000, 4.13),
    (30_000_000, 4.03),
    (35_000_000, 3.94),
    (40_000_000, 3.87),
    (45_000_000, 3.81),
    (50_000_000, 3.77),
    (60_000_000, 3.72),
    (70_000_000, 3.67),
)
