"""Figures in words: the right unit, and no exponent or wrong unit where rounding reaches the next one."""

import pytest

from vspdf.draw import words


@pytest.mark.parametrize(
    "say, value, said",
    [
        (words.count, 999, "999"), (words.count, 12_876_543, "12.88M"), (words.count, 133.2e9, "133.2B"),
        (words.count, 999_960, "1000k"),
        (words.flops, 1.254e12, "1.25 TFLOP"), (words.flops, 999.7e9, "1,000 GFLOP"), (words.flops, 12, "12 FLOP"),
        (words.cycles, 999.7e3, "1,000k"), (words.cycles, 1.2e12, "1.2T"), (words.cycles, 500, "500"),
        (words.size, 106.5e9, "106.5 GB"), (words.size, 2.5e5, "0.25 MB"), (words.size, 7.68e16, "76,800,000 GB"),
        (words.amount, 1234567, "1,234,567"), (words.amount, 1234.56, "1,234.6"), (words.amount, 0.12345, "0.1235"),
        (words.duration, 0.123456, "0.123 s"), (words.duration, 89, "89 s"), (words.duration, 90, "1.5 min"),
        (words.duration, 5400, "1.5 h"), (words.duration, 3e12, "95,064 years"),
        (words.clock, 184.4, "3:04"), (words.clock, 3723, "1:02:03"), (words.clock, 59.6, "1:00"),
        (words.eta, None, "ETA not known yet"), (words.eta, 5, "ETA 0:05"),
        (words.number, None, "–"), (words.number, 2.34567, "2.3457"),
        (words.power, -3.0, "10⁻³"), (words.power, 0.5, ""),
        (words.listed, [1, 2], "1, 2"), (words.listed, "avx2", "avx2"),
    ],
    ids=lambda found: getattr(found, "__name__", str(found)),
)  # fmt: skip
def test_words(say, value, said):
    assert say(value) == said


@pytest.mark.parametrize("last, said", [(0.9, "0 to 0.9"), (0.0, "0")], ids=str)
def test_a_figure_that_stays_is_said_once(last, said):
    assert words.from_to(0.0, last) == said


@pytest.mark.parametrize(
    "value, unit, expected",
    [(5400, "s", (3600, "h")), (60, "s", (1, "s")), (3e12, "FLOP", (1e12, "TFLOP")), (2e6, "tokens", (1e6, "millions")),
     (2e13, "tokens", (1e9, "billions")), (0, "tokens", (1, "count"))],
    ids=str,
)  # fmt: skip
def test_axes(value, unit, expected):
    assert words.scale(value, unit) == expected


def test_a_speedup_above_the_ideal_is_marked():
    assert (words.speedup(2.0, 2.49), words.speedup(2.5, 2.49)) == ("2.00x", "2.50x*")
