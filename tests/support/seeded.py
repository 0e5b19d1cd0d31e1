"""The catalogue with seeded weights in the published formats, for what cannot be downloaded.

``python -m support.seeded FOLDER [NAME…]`` writes checkpoints, and a repository with the artefacts
in both precisions that are built from them; ``make verify-models`` and ``make check-tensorrt`` run
on that.
"""

from __future__ import annotations

import sys
from pathlib import Path

from stemserve_export.catalog import SINGLE_FILE, CatalogEntry, find_model, load_catalog
from stemserve_export.choices import with_checkpoint, with_precision
from stemserve_export.exporter import export_model
from stemserve_export.families.spleeter_unet import Activation
from support import demucs_checkpoints, openunmix_checkpoints, spleeter_checkpoints

PUBLISHED = "spleeter_2stems"  # whose weights a package of the registry carries


def seeded_files(entry: CatalogEntry, folder: Path) -> dict[str, Path]:
    """Write a model's checkpoint, full size, and return its files by the catalogue's keys."""
    folder.mkdir(parents=True, exist_ok=True)
    if entry.family == "spleeter":
        archive = folder / f"{len(entry.stems)}stems.tar.gz"
        activation: Activation = "elu" if entry.options["activation"] == "elu" else "leaky_relu"
        spleeter_checkpoints.write_spleeter_archive(archive, len(entry.stems), activation)
        return {SINGLE_FILE: archive}
    if entry.family == "openunmix":
        hidden = {
            "umxhq": openunmix_checkpoints.UMXHQ_HIDDEN,
            "umxl": openunmix_checkpoints.UMXL_HIDDEN,
        }[entry.name]
        return openunmix_checkpoints.write_checkpoints(folder, hidden)
    arguments = {
        "htdemucs": demucs_checkpoints.HTDEMUCS,
        "htdemucs_ft": demucs_checkpoints.HTDEMUCS,
        "htdemucs_6s": demucs_checkpoints.HTDEMUCS_6S,
        "hdemucs_mmi": demucs_checkpoints.HDEMUCS_MMI,
    }[entry.name]
    klass = {"htdemucs": "HTDemucs", "hdemucs": "HDemucs"}[entry.family]
    files = {}
    for seed, key in enumerate(entry.files):
        network = demucs_checkpoints.network(klass, arguments, seed)
        files[key] = demucs_checkpoints.write_th(network, folder / f"{entry.name}-{key}.th")
    return files


def seeded_entry(name: str, folder: Path) -> CatalogEntry:
    """A model of the catalogue with seeded weights; the published ones where they can be had."""
    entry = find_model(name)
    if name == PUBLISHED:
        return entry
    files = seeded_files(entry, folder / name)
    if set(files) == {SINGLE_FILE}:
        return with_checkpoint(entry, [files[SINGLE_FILE].as_uri()])
    return with_checkpoint(entry, [f"{key}={path.as_uri()}" for key, path in files.items()])


def main() -> None:
    """Write checkpoints and artefacts of the models that are named, of all if none is."""
    folder = Path(sys.argv[1]).resolve()
    for name in sys.argv[2:] or load_catalog():
        entry = seeded_entry(name, folder / "checkpoints")
        for precision in ("fp32", "fp16"):
            export_model(with_precision(entry, precision), folder / "model_repository")


if __name__ == "__main__":
    main()
