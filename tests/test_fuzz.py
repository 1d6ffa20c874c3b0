"""Broken and hostile foreign files: the short form of tests/rigs/fuzz.py, and that it can find something."""
import json
import os

import pytest

from plumbing import files
from tests.rigs import fuzz


@pytest.mark.parametrize("name", fuzz.READERS)
def test_foreign_files_are_read_or_refused_in_one_line(name):
    if name == "SBD":
        pytest.importorskip("scipy")
    found = [fuzz.verdict(name, content) for _, content in fuzz.cases(name, 20, seed=1)]
    assert not [said for kind, said in found if kind == "wrong"]
    valid = len(fuzz.READERS[name][2]())
    assert [kind for kind, _ in found[:valid]] == ["accepted"] * valid
    assert "refused" in [kind for kind, _ in found]


@pytest.mark.parametrize("read,kind", [
    (lambda path: True, "accepted"), (lambda path: False, "wrong"), (lambda path: {}["x"], "wrong"),
    (lambda path: files.regular(path, 1), "refused"), (lambda path: json.loads(path.name), "wrong"),
    (lambda path: os.mkdir("bombed") or True, "wrong")])
def test_the_verdict_is_what_it_should_be(read, kind):
    assert fuzz.verdict("mask", b"12", read)[0] == kind
