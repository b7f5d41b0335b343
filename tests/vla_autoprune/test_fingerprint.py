from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vla_autoprune.fingerprint import source_hash


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    package = tmp_path / "here" / "package"
    (package / "inner").mkdir(parents=True)
    (package / "a.py").write_text("a = 1\n")
    (package / "inner" / "b.py").write_text("b = 2\n")
    (tmp_path / "here" / "c.py").write_text("c = 3\n")
    return [package, tmp_path / "here" / "c.py"]


def test_order_and_place_and_other_files_do_not_matter(sources: list[Path], tmp_path: Path) -> None:
    found = source_hash(sources)
    assert source_hash(sources[::-1]) == found
    (sources[0] / "notes.txt").write_text("mine")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert source_hash([tmp_path / "there" / path.name for path in sources]) == found


def test_content_name_and_what_is_called_matter(sources: list[Path]) -> None:
    found = {source_hash(sources), source_hash(sources, also="other")}
    (sources[0] / "inner" / "b.py").write_text("b = 3\n")
    found.add(source_hash(sources))
    (sources[0] / "inner" / "b.py").rename(sources[0] / "b.py")
    found.add(source_hash(sources))
    assert len(found) == 4
