from __future__ import annotations

import sys

import pytest

onnxruntime = pytest.importorskip("onnxruntime")

from engines.backends import open_backend
from vla_autoprune.errors import BackendError


def test_names_open_what_they_say(stored_bundle):
    backend = open_backend("onnxruntime", stored_bundle, threads=1)
    assert backend.name == "onnxruntime" and backend.device.startswith("CPU, onnxruntime")
    pytest.importorskip("torch")
    assert open_backend("torch", stored_bundle, threads=1).name == "torch"


def test_an_unknown_name_lists_those_there_are(stored_bundle):
    with pytest.raises(BackendError, match="backend is 'best'; allowed: onnxruntime, onnxruntime-cuda"):
        open_backend("best", stored_bundle)


def test_tensorrt_that_is_absent_says_how_to_get_it(stored_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match="TensorRT cannot be imported"):
        open_backend("tensorrt", stored_bundle)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_an_absent_provider_says_how_to_get_it(stored_bundle, provider):
    if len(onnxruntime.get_available_providers()) > 2:
        pytest.skip("this onnxruntime has GPU providers")
    with pytest.raises(BackendError, match=rf"-{provider}: .* has no .*pip install onnxruntime-gpu"):
        open_backend(f"onnxruntime-{provider}", stored_bundle)


def test_an_absent_package_says_how_to_get_it(stored_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for module in ("engines.torch_graphs", "engines.torch_operators"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(BackendError, match=r"torch is not installed; pip install 'vla_autoprune\[export\]'"):
        open_backend("torch", stored_bundle)
