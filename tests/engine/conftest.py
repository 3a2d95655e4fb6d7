"""The promises that are tested here hold with the kernels; without them, for the reference, which is slower."""

from __future__ import annotations

import pytest

from moestro.ops import library


@pytest.fixture(autouse=True, scope="session")
def fixed_order() -> None:
    """Where the kernels cannot run, let the reference serve."""
    if not library.is_available():
        library.WISH = "reference"
