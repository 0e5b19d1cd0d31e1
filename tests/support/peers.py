"""The packages that users run today, in eager PyTorch, one chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from torch import Tensor

from stemserve_export.catalog import SINGLE_FILE, find_model
from stemserve_export.exporter import model_spec
from stemserve_export.weights.torch_file import load_plain
from support.weights import published_unets

Peer = Callable[[Tensor], object]


def eager_peer(name: str, files: Mapping[str, str]) -> tuple[Peer, int]:
    """Return what separates a chunk [2, n] with these checkpoints (URIs by key), and n."""
    entry = find_model(name)
    chunk_samples = model_spec(entry).chunk_samples
    paths = {
        key: Path(unquote(urlsplit(uri).path)) if uri.startswith("file:") else None
        for key, uri in files.items()
    }
    if entry.family == "spleeter":
        from reference.spleeter import separate_track

        unets = published_unets(entry, paths[SINGLE_FILE])
        output = entry.options["output"]
        # The published framing puts 4096 zeros in front: a segment of 512 frames with these.
        return (
            lambda chunk: separate_track(chunk, unets, "average", output=output),  # type: ignore[arg-type]
            512 * 1024 - 4096,
        )
    if entry.family == "openunmix":
        from reference.openunmix import published_separator, separate

        states = {stem: load_plain(path, stem) for stem, path in paths.items() if path}
        separator = published_separator(states, int(entry.options["wiener_iterations"]))
        return lambda chunk: separate(separator, chunk[None]), chunk_samples
    from reference.demucs import load_network

    path = paths[SINGLE_FILE]
    assert path is not None
    network = load_network(path)

    def run(chunk: Tensor) -> object:
        with torch.inference_mode():
            return network(chunk[None])

    return run, chunk_samples
