"""Eight virtual CPU devices for every test, or a GPU for those marked gpu; and where the data lies.

`REFUSION_TEST_PLATFORM=gpu python -m pytest -m gpu` runs the tests that need an NVIDIA GPU; elsewhere they are skipped.
"""

import gc
import os
import pathlib
import sys

import pytest
from buckets import bucket, s3_bucket  # noqa: F401
from processes import QUICK_TO_COMPILE

# Before the first import of jax anywhere in the tests (pytest itself does not).
ON_GPU = os.environ.get("REFUSION_TEST_PLATFORM", "cpu") == "gpu"
if not ON_GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", QUICK_TO_COMPILE
    os.environ["XLA_FLAGS"] = " ".join(flags)
# Commands that tests call keep no programs in the home of whoever runs them; a folder named from outside is used.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def pytest_configure(config):
    config.addinivalue_line("markers", "torch: compares with PyTorch; needs torch and transformers")
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")
    config.addinivalue_line("markers", "tpu_compiler: compiles for TPUs; needs libtpu (pip install '.[tpu]')")


def pytest_collection_modifyitems(items):
    if not ON_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and REFUSION_TEST_PLATFORM=gpu"))


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go():
    """Every compiled program holds memory maps, of which a process may have 65,530; all tests have more."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def reference() -> pathlib.Path:
    """Reference models with logits, losses and decodings made by other code."""
    return REPOSITORY / "tests" / "reference"


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
    """Folder with data/ and tokenizers/ that are not part of the project."""
    folder = os.environ.get("REFUSION_TEST_DATA")
    if not folder or not pathlib.Path(folder).is_dir():
        pytest.skip("REFUSION_TEST_DATA does not name a folder with data/ and tokenizers/")
    return pathlib.Path(folder)


@pytest.fixture(scope="module")
def quick_compiles():
    """For modules that compile many decoding loops and run each for a moment."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
