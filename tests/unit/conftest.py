"""No test of this folder needs a server, a network or the user's settings."""

import pytest


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch):
    for name in ("STEMSERVE_URL", "STEMSERVE_REPOSITORY"):
        monkeypatch.delenv(name, raising=False)
