"""What several files of tests of the lab share."""

import pytest
from claim_rows import content

from effnb.lab.claims import claims_from


@pytest.fixture
def register(monkeypatch):
    """Judge by a ledger of these parts."""

    def use(*parts):
        found = claims_from(content(*parts))
        monkeypatch.setattr("effnb.lab.claims.verdicts.ledger", lambda: found)
        return found["S-I3"].parts

    return use


@pytest.fixture
def displayed(monkeypatch):
    bundles = []
    monkeypatch.setattr(
        "effnb.lab.claims.table.display", lambda bundle, raw: bundles.append(bundle)
    )
    return bundles
