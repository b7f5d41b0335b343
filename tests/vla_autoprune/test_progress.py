from __future__ import annotations

import pytest

from vla_autoprune.progress import progress_bar


def test_a_bar_counts_on_standard_error_and_leaves_standard_output_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_bar() as progress:
        for item in progress.track(range(3), description="planning"):
            print(f"item {item}")
    output, error = capsys.readouterr()
    assert output == "item 0\nitem 1\nitem 2\n"
    assert "planning" in error and "3/3" in error
