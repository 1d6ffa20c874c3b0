"""The flags that all scripts share: types, help, and which of them decide the numbers."""
import argparse
from pathlib import Path

import pytest

from plumbing import flags


def parse(*more):
    return flags.parser("What it does.", batch_size=64).parse_args(["--data", "a", "--out", "b", *more])


def test_types_and_defaults():
    args = parse("--no-resume")
    assert args.batch_size == 64 and args.out == Path("b") and args.resume is False
    assert args.split == "train_aug" and args.amp == "auto"


@pytest.mark.parametrize("wrong", [
    "--batch-size=0", "--workers=-1", "--amp=half", "--seed=1.5", "--limit=x", "--save-every=0"])
def test_what_is_refused(wrong, capsys):
    p = flags.parser("")
    flags.training(p)
    with pytest.raises(SystemExit):
        p.parse_args(["--data", "a", "--out", "b", wrong])
    assert f"argument {wrong.partition('=')[0]}" in capsys.readouterr().err


def test_help_is_the_docstring_with_defaults():
    text = " ".join(flags.parser("What it does:\n    python x.py", batch_size=64).format_help().split())
    assert "What it does: python x.py" in text and "(default: 64)" in text
    assert "None" not in text and "(default: False)" not in text


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


def test_plain_values():
    args = argparse.Namespace(out=Path("a/b"), scales=(1.0, 1.2), lr=0.1, init=None)
    assert flags.plain(args) == {"out": "a/b", "scales": [1.0, 1.2], "lr": 0.1, "init": None}
