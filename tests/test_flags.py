"""The flags that all scripts share: what is refused, and which of them decide the numbers."""
import argparse

import pytest

from plumbing import flags


def parse(*more):
    return flags.parser("What it does.", batch_size=64).parse_args(["--data", "a", "--out", "b", *more])


@pytest.mark.parametrize("kind,right,wrong", [
    (flags.natural, {"0": 0, "12": 12}, ["-1", "1.5", "", "x"]),
    (flags.positive, {"3": 3}, ["0", "-1"]),
    (flags.above_zero, {"1e-4": 1e-4}, ["0", "-1", "nan", "inf"]),
    (flags.number, {"0": 0.0, "2.4": 2.4}, ["-1", "nan", "inf", "1e39"]),
    (flags.share, {"0": 0.0, "0.9": 0.9}, ["1", "-0.1", "nan"]),
    (flags.name, {"cam_2": "cam_2"}, ["", "a/b", "..", ".hidden", "a\\b"])])
def test_types_of_flags(kind, right, wrong):
    assert {text: kind(text) for text in right} == right
    for text in wrong:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            kind(text)


def test_the_recipe_leaves_out_where_and_how_fast():
    """Two runs that differ in these give the same numbers; every other flag is part of the recipe."""
    one = flags.recipe(parse("--workers", "0", "--device", "cpu", "--no-resume", "--deterministic"))
    other = flags.recipe(parse("--data", "c", "--out", "d", "--workers", "3"))
    assert one == other == {"split": "train_aug", "batch_size": 64, "seed": 0, "amp": "auto", "limit": 0}
    assert flags.recipe(parse("--seed", "1")) != one
