from __future__ import annotations

import errno
import os

import pytest

from vla_autoprune.files import write_whole


def test_a_file_replaces_the_older_one(tmp_path):
    path = tmp_path / "report.json"
    for content in (b"first", b"second"):
        write_whole(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_halfway_leaves_the_older_file(tmp_path):
    path = tmp_path / "curves.png"
    write_whole(path, lambda file: file.write(b"whole"))

    def fail(file):
        file.write(b"hal")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_whole(path, fail)
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_keeps_the_older_file_and_leaves_nothing(tmp_path):
    absent = tmp_path / "absent" / "report.json"
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(absent, b"new")
    assert caught.value.filename == str(absent)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "inside").touch()
    with pytest.raises(OSError):
        write_whole(occupied, b"new")
    assert list(tmp_path.iterdir()) == [occupied]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "report.json"

    def full(file):
        file.write(b"hal")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(path, full)
    assert caught.value.filename == str(path) and list(tmp_path.iterdir()) == []
