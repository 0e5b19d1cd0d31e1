"""The catalogue as a table."""

from __future__ import annotations

from urllib.parse import urlsplit

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from stemserve_export.catalog import CatalogEntry, load_catalog


def print_catalog() -> None:
    """Print what can be exported, with licences and published scores."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("stems (published SDR, dB)", ratio=3)
    table.add_column("weights", ratio=2, overflow="fold")
    table.add_column("licence of the weights", ratio=2)
    for name, entry in load_catalog().items():
        table.add_row(
            name,
            _stems(entry),
            _weights(entry),
            f"{entry.licence}, commercial use {entry.commercial_use}",
        )
    console = Console()
    console.print(table)
    console.print(
        "Scores are quoted from the publications that catalog.toml names, with their metric. A "
        "licence that forbids commercial use is accepted with --accept-licence."
    )


def _stems(entry: CatalogEntry) -> str:
    scores = entry.scores.stems if entry.scores else {}
    return ", ".join(
        f"{stem} {scores[stem]:.2f}" if stem in scores else stem for stem in entry.stems
    )


def _weights(entry: CatalogEntry) -> str:
    files = list(entry.files.values())
    sizes = [file.size for file in files if file.size]
    scheme, _, rest = files[0].source.partition(":")
    origin = urlsplit(files[0].source).netloc if scheme.startswith("http") else rest
    parts = [origin]
    if len(files) > 1:
        parts.append(f"{len(files)} files")
    if len(sizes) == len(files):
        parts.append(f"{sum(sizes) / 1e6:.0f} MB")
    return ", ".join(parts)
