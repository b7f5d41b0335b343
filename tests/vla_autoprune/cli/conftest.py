from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def model(tiny_vla, tmp_path_factory):
    """The directory of `tiny_vla`, as `train` would leave it."""
    from vla_autoprune.models.driving_vla import save_model

    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(tiny_vla, folder)
    return folder
