"""The published weights as plain PyTorch networks."""

from pathlib import Path
from typing import get_args

from stemserve_export.catalog import SINGLE_FILE, CatalogEntry
from stemserve_export.download import fetch
from stemserve_export.families.spleeter_unet import Activation, UNet
from stemserve_export.families.spleeter_weights import load_unets


def published_unets(entry: CatalogEntry, path: Path | None = None) -> list[UNet]:
    """One U-Net per stem, in the order of the entry's stems; fetched if no path is given."""
    activation = entry.options["activation"]
    assert activation in get_args(Activation)
    file = path or fetch(entry.files[SINGLE_FILE])
    return load_unets(file, entry.stems, activation, entry.members)
