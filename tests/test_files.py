"""Whole files, hashes, JSON, lists of lines, plain arrays: each refusal names the file."""
import hashlib
import json
import os

import pytest

from plumbing import files


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    files.save_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.save_json(path, {"a": object()})
    with pytest.raises(RuntimeError), files.atomic(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("content,word", [
    (b"{", "Expecting"), (b"[1]", "not an object"), (b"\xff", "decode")])
def test_json_of_others_is_refused(tmp_path, content, word):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.json is not JSON of this project .*{word}.*run its stage again"):
        files.read_json(tmp_path / "x.json")


def test_lines_with_a_byte_order_mark_and_carriage_returns(tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes("\ufeffa_1\r\nb\r\n\r\ncafé".encode())
    assert files.read_lines(path) == ["a_1", "b", "", "café"]
    path.write_bytes("a_1\n".encode("utf-16"))
    with pytest.raises(ValueError, match="train.txt is not UTF-8"):
        files.read_lines(path)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.json"
    files.save_json(path, {"a": 1})
    with open(path) as before:
        files.save_json(path, {"a": 2})
        assert json.load(before) == {"a": 1}
    assert files.read_json(path) == {"a": 2}


def test_what_is_not_a_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match=f"{path} is not a file"):
            files.regular(path)
    (tmp_path / "long").write_bytes(b"12345")
    assert files.regular(tmp_path / "long", 5) == tmp_path / "long"
    with pytest.raises(ValueError, match="long has 5 bytes, at most 4 are read"):
        files.regular(tmp_path / "long", 4)


def test_fingerprints_of_files_folders_and_names(tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_bytes(b"weights" * 200_000)                    # more than one block
    digest = hashlib.sha256(b"weights" * 200_000).hexdigest()
    assert files.sha256(tmp_path / "a.pt") == digest and files.fingerprint(tmp_path / "a.pt") == digest[:16]
    assert files.fingerprint("imagenet") is None
    folder = tmp_path / "masks"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"1")
    before = files.fingerprint(folder)
    (folder / ".hidden").write_bytes(b"1")
    assert files.fingerprint(folder) == before
    (folder / "a.png").write_bytes(b"12")
    assert files.fingerprint(folder) != before
    files.save_json(folder / "recipe.json", {"fingerprint": "ours"})
    assert files.fingerprint(folder) == "ours"
