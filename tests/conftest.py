"""Fixtures shared by the tests."""

import os
import shutil
import tempfile
from pathlib import Path

# Read when torch is imported. Several processes share the cores: threads that spin would be in each other's way.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

from tests.checkpoints import load_reference, write_checkpoint


def pytest_configure(config: pytest.Config) -> None:
    """Of several processes that share the tests, each has a folder for temporary files: some tests count them."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = tempfile.mkdtemp(prefix="nanovllm-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ["TMPDIR"] = os.environ["TEMP"] = folder
        tempfile.tempdir = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` skip where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small float32 checkpoint without a tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_reference(tiny_checkpoint: Path):
    """transformers' model of ``tiny_checkpoint``."""
    return load_reference(tiny_checkpoint)
