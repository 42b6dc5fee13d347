"""Implementations of the operators, as a fixture."""

from __future__ import annotations

import pytest

from tests.ops.deformable_attention_cases import Implementation


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Implementation:
    """An implementation of deformable attention; skips where it is missing."""
    implementation: Implementation = request.param
    implementation.skip_if_missing()
    return implementation
