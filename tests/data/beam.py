"""Apache Beam, where it is installed."""

from types import ModuleType

import pytest

# In this process: without a location Beam fetches a runner of its own from the network first.
BEAM = ("--runner=DirectRunner", "--prism_location=none")


def import_beam() -> ModuleType:
    """Returns our pipelines; skips the test where Beam is not installed."""
    pytest.importorskip("apache_beam", reason="Apache Beam (apache-beam) is not installed here")
    from openpi_like.data import beam

    return beam
