"""The network that priors are tested on."""

from __future__ import annotations

import pytest

from sgdgp.tangent import Tangent
from tests.networks.priors.family import tangent_of_a_network


@pytest.fixture
def tangent() -> Tangent:
    return tangent_of_a_network()
