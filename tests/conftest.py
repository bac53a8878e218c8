"""What every test has at hand. One thread: on tiny models, more threads only wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny SD1 pipeline, epsilon prediction. Shared: only read it."""
    import tiny

    return tiny.save_sd1(tmp_path_factory.mktemp("tiny") / "sd1")


@pytest.fixture(scope="session")
def tiny_sd1_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny SD1 pipeline, v-prediction. Shared: only read it."""
    import tiny

    return tiny.save_sd1(tmp_path_factory.mktemp("tiny") / "sd1-v", "v_prediction")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny SDXL pipeline, epsilon prediction. Shared: only read it."""
    import tiny

    return tiny.save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")
