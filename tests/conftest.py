"""What pytest needs to know before it collects: fixtures are in `fixtures`, with all that they import."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest

# Before anything imports Triton, whose kernels then run on the CPU. torch would say so too, but takes seconds to load.
if version("torch").endswith("+cpu") or not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


class _RootIsNoTest:
    """The repository's root is the package itself: pytest would import its __init__.py once more, by another name."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        if path == Path(__file__).parents[1]:
            return pytest.Dir.from_parent(parent, path=path)
        return None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_RootIsNoTest())
    hands_out = bool(config.getoption("tx", None)) and not hasattr(config, "workerinput")
    if not hands_out:  # a process that only hands tests out to others would import torch for seconds before they start
        config.pluginmanager.import_plugin("rotoboa.tests.fixtures")
