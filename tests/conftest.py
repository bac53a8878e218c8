"""Fixtures and settings for all tests. Torch uses one thread: with tiny models, more threads only wait."""

import contextlib
import gc
import importlib
import itertools
import os
import pkgutil
import re
import sys

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # a waiting thread of a test with two threads must not use a core
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import lorakit
from lorakit.cli.imports import import_bitsandbytes

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter

# The plan has another line on a busy machine; tests/runs/test_plan.py reads it.
os.getloadavg = lambda: (0.0, 0.0, 0.0)
# Tests do not need files to survive a power cut. Waiting for the disk took a third of a short run's time.
os.fsync = lambda _: None
# The import of the tests creates no garbage, and garbage collection took a quarter of its time.
gc.disable()
# Processes that tests start import lorakit from this tree, not an installed one.
ROOT = str(Path(__file__).resolve().parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])

# These files take longest. They start first, so that at the end no worker waits for one of them.
LONGEST = (
    "test_browser.py",
    "test_card.py",
    "test_quality.py",
    "test_slow_drawings.py",
    "test_run.py",
    "test_requests.py",
    "test_golden.py",
    "test_compile.py",
    "test_adapter.py",
    "test_formats_page.py",
    "test_silent_failures.py",
    "test_parallel.py",
    "test_quantized_weight.py",
    "test_formats.py",
    "test_stop.py",
    "test_house.py",
    "test_flat_parameters.py",
    "test_plain.py",
    "test_merge.py",
    "test_bases_page.py",
    "test_single_file.py",
    "test_behind_a_proxy.py",
    "test_adapter_weights.py",
    "test_docs.py",
    "test_methods.py",
    "test_single_file_forms.py",
    "test_preflight.py",
    "test_vae_source.py",
    "test_main.py",
    "test_pages.py",
    "test_one_file.py",
    "test_clip_tokenizer.py",
    "test_cuda_graphs.py",
    "test_benchmarks.py",
    "test_sampling.py",
    "test_demo.py",
    "test_comfyui.py",
    "test_notebook.py",
)
# Its audit hook stays in the process. While the hook runs for a thread that coverage begins to trace, Python lets no
# other thread begin, and that one's test fails. So no tests with threads follow.
LAST = "test_crashes.py"

COUNTED = pytest.StashKey[bool]()
IMPORTED = pytest.StashKey[int]()  # number of imported modules that garbage collection skips
NUMBERS = itertools.count()
FOREIGN = (
    "peft",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "gradio",
    "hypothesis",
    "IPython.core.interactiveshell",
    "jupytext",
    "lycoris",
)


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return  # this process only starts the workers, and they wait for it
    import torch

    torch.set_num_threads(1)
    import_bitsandbytes()  # the commands also do this before they import models
    # Workers measure coverage from the start of the session. An import before it takes half the time.
    if config.pluginmanager.hasplugin("_cov") and hasattr(config, "workerinput"):
        for name in FOREIGN:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)} | {LAST: len(LONGEST) + 1}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))
    # Python 3.11 takes up to twice as long with coverage, so it is measured for the first case of each fast test only.
    cases = Counter[str]()
    for item in items:
        function = item.nodeid.partition("[")[0]
        cases[function] += 1
        item.stash[COUNTED] = not item.get_closest_marker("slow") and cases[function] == 1


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Switch coverage on or off before the setup of a test. pytest-cov's own marker would exclude only the call."""
    plugin = item.config.pluginmanager.getplugin("_cov")
    controller = plugin.cov_controller if plugin else None
    if controller and controller.started != item.stash[COUNTED]:
        (controller.resume if item.stash[COUNTED] else controller.pause)()


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.pluginmanager.hasplugin("_cov"):
        # Cover definitions at module level, even if a test without coverage is the first to import a module.
        for module in pkgutil.walk_packages(lorakit.__path__, "lorakit."):
            if not module.name.endswith("__main__"):
                with contextlib.suppress(ImportError):
                    importlib.import_module(module.name)
    gc.freeze()  # without a collection before, which takes a second and frees little
    session.stash[IMPORTED] = len(sys.modules)
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path != item.path:
        set_imports_aside(item.session)


def set_imports_aside(session: pytest.Session) -> None:
    """Exclude imported modules from garbage collection: each collection in a run took 0.3 to 0.7 s.

    Most files import none of their own, and then the full collection is left out.
    """
    if len(sys.modules) >= session.stash.get(IMPORTED, 0) + 20:
        gc.collect()
        gc.freeze()
        session.stash[IMPORTED] = len(sys.modules)


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the test. Unlike pytest's own, it has no symbolic link from its name without the number."""
    name = re.sub(r"\W", "_", request.node.name)[:30]
    folder = tmp_path_factory.getbasetemp() / f"{name}{next(NUMBERS)}"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny SD1 pipeline with epsilon prediction. Tests share it and must not change it."""
    import tiny

    return tiny.save_sd1(tmp_path_factory.mktemp("tiny") / "sd1")


@pytest.fixture(scope="session")
def tiny_sd1_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny SD1 pipeline with v-prediction. Tests share it and must not change it."""
    import tiny

    return tiny.save_sd1(tmp_path_factory.mktemp("tiny") / "sd1-v", "v_prediction")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny, shallow SDXL pipeline with epsilon prediction. Tests share it and must not change it."""
    import tiny

    return tiny.save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl", shallow=True)


@pytest.fixture(scope="session")
def sd1(tiny_sd1: Path) -> Any:
    import torch

    from lorakit import families

    return families.load(families.describe(tiny_sd1), "cpu", torch.float32)


@pytest.fixture(scope="session")
def sdxl(tiny_sdxl: Path) -> Any:
    import torch

    from lorakit import families

    return families.load(families.describe(tiny_sdxl), "cpu", torch.float32)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the self-check of runs, by `short_run.unchecked`."""
    import short_run

    short_run.unchecked(monkeypatch)


@pytest.fixture(scope="module")
def short_validation() -> Iterator[None]:
    """Shorten validations to a few forward passes, by `short_run.short_validation`."""
    import short_run

    with pytest.MonkeyPatch.context() as patch:
        short_run.short_validation(patch)
        yield


@pytest.fixture(scope="module")
def copied_modules() -> Iterator[None]:
    """Read each component of a base once, by `short_run.copy_modules`."""
    import short_run

    with pytest.MonkeyPatch.context() as patch:
        short_run.copy_modules(patch)
        yield


@pytest.fixture
def attach() -> "Iterator[Callable[..., Adapter]]":
    """`adapters.attach` whose adapters are detached after the test, because tests share the bases."""
    from lorakit import adapters

    adapters_in_use: list[Adapter] = []

    def call(*args: Any, **options: Any) -> "Adapter":
        adapters_in_use.append(adapters.attach(*args, **options))
        return adapters_in_use[-1]

    yield call
    for adapter in adapters_in_use:
        adapter.detach()
