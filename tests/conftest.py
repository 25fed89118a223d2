"""Fixtures shared by the tests of the row engine."""

import jax
import pytest


@pytest.fixture
def x64():
    """Double precision, for this test only."""
    with jax.enable_x64(True):
        yield
