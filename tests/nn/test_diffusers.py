"""diffusers' quantiser: converted and converted back."""

import pytest

import tilewise as tw
from tests.common.taming_cases import assert_converts


@pytest.mark.parametrize("settings", [dict(), dict(legacy=True), dict(legacy=False)], ids=str)
def test_from_and_to_diffusers(settings):
    assert_converts("diffusers", tw.nn.from_diffusers, tw.nn.to_diffusers, **settings)
