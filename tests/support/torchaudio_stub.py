"""openunmix and demucs import torchaudio when they are imported, and need nothing of it here."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType


def ensure_torchaudio() -> None:
    """Put an empty ``torchaudio`` into ``sys.modules``, unless the real one can be imported."""
    if "torchaudio" in sys.modules or importlib.util.find_spec("torchaudio") is not None:
        return
    sys.modules["torchaudio"] = ModuleType("torchaudio")
