"""Without the peers these modules are skipped, visibly; with REQUIRE_PEERS=1 they fail instead."""

import contextlib
import importlib
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

INSTALL = "pip install -r tests/peers/requirements.txt"

with contextlib.suppress(ImportError), pytest.MonkeyPatch.context() as environment:
    environment.setenv(
        "TRITON_INTERPRET", "1"
    )  # read when Triton is first imported: its own functions obey it too
    importlib.import_module("triton.language")


def missing_peers() -> list[str]:
    """Names in requirements.txt that are not installed."""
    missing = []
    for line in Path(__file__).with_name("requirements.txt").read_text().splitlines():
        name = line.split("#")[0].split("==")[0].strip()
        try:
            if name:
                importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing


class MissingPeers(pytest.Module):
    """Stands for a test module that is not imported, because its peers are not there."""

    def collect(self) -> Iterator[pytest.Item]:
        message = f"not installed: {', '.join(missing_peers())}; {INSTALL}"
        if os.environ.get("REQUIRE_PEERS") == "1":
            pytest.fail(message, pytrace=False)
        pytest.skip(message, allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    """Put the stand-in where the module would be; None lets pytest import the module as usual."""
    return MissingPeers.from_parent(parent, path=module_path) if missing_peers() else None
