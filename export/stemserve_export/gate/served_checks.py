"""Questions that only a running server can answer."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import soundfile

from stemserve.errors import NonFiniteAudioError
from stemserve.separator import Separator
from stemserve.server import LocalServer
from stemserve_export.gate.artefact import Artefact
from stemserve_export.gate.checks import (
    check_batch,
    check_odd_inputs,
    check_repeated,
    check_same,
    check_song,
    quiet_floor,
)
from stemserve_export.gate.figures import Figures
from stemserve_export.gate.material import Material
from stemserve_export.gate.measures import snr_db
from stemserve_export.gate.runners import REQUEST_TIMEOUT_S, ServedRunner
from stemserve_export.gate.thresholds import Thresholds, with_other_runtime

Samples = npt.NDArray[np.float32]

# Four graphs of a model of specialists, each loaded and warmed up.
_STARTUP_DEADLINE_S: Final = 600.0


@contextmanager
def running_server(artefact: Artefact, url: str | None) -> Iterator[str]:
    """Yield the address of a server with the model: a given one, or one that is started."""
    if url is not None:
        yield url
        return
    with LocalServer(
        artefact.repository, [artefact.spec.name], startup_deadline_s=_STARTUP_DEADLINE_S
    ) as server:
        yield server.url


def runs_our_onnx_runtime(separator: Separator, url: str | None) -> bool:
    """Tell whether a server's outputs must be those of ONNX Runtime here, to the bit.

    So they are from a server that was started here with our stand-in backend, on the CPU.
    """
    return url is None and separator.device == "cpu" and shutil.which("tritonserver") is None


def check_served(
    figures: Figures,
    artefact: Artefact,
    url: str | None,
    material: Material,
    reference: Sequence[Samples],
    graph_outputs: Sequence[Sequence[Samples]],
    limits: Thresholds,
) -> str:
    """Ask a server for single chunks, batches, odd inputs and a whole track.

    Args:
        figures: what the answers are added to.
        artefact: the model.
        url: of the server, None for one that is started for it.
        material: the song.
        reference: its stems by torch in fp32, [channels, n] each.
        graph_outputs: stems per chunk of the graph in ONNX Runtime.
        limits: of the artefact.

    Returns:
        Name and version of the server.
    """
    spec = artefact.spec
    figures.report("served: starting a server" if url is None else f"served: asking {url}")
    with (
        running_server(artefact, url) as address,
        ServedRunner(address, spec) as run,
        Separator(address, spec.name, chunk_timeout_s=REQUEST_TIMEOUT_S) as separator,
    ):
        same_runtime = runs_our_onnx_runtime(separator, url)
        if not same_runtime:
            limits = with_other_runtime(limits)
        figures.report("served: single chunks and batches")
        chunks = material.chunks[:2]
        alone = [run(chunk) for chunk in chunks]
        check_same(
            figures,
            dict(zip(spec.stems, graph_outputs[0], strict=True)),
            dict(zip(spec.stems, alone[0], strict=True)),
            limits,
            same_runtime=same_runtime,
        )
        check_repeated(figures, "served", run, chunks[0], alone[0])
        if spec.max_batch_size > 1:
            check_batch(figures, "served", run, chunks, alone, spec.stems, limits)
        check_refusals(figures, run, separator, chunks[0])
        check_odd_inputs(figures, "served", run, spec.tensor_dims, limits)
        figures.report("served: a whole track")
        stems = _separated(separator, material)
        check_song(figures, "served", material, reference, stems, limits)
        floor = quiet_floor(material)
        for name, want, got in zip(spec.stems, material.joined(graph_outputs), stems, strict=True):
            snr = snr_db(want, got, floor)
            figures.at_least("served", "track against graph", name, snr, limits.snr_db, "dB")
        return run.server_version()


def check_refusals(
    figures: Figures, run: ServedRunner, separator: Separator, chunk: Samples
) -> None:
    """Send NaN and Inf; they must be refused, and not come back as a chunk of noise."""
    for name, value in (("NaN", np.nan), ("Inf", np.inf)):
        figures.report(f"served: {name}")
        spoilt = chunk.copy()
        spoilt[0, 0, spoilt.shape[2] // 2] = value
        refusal = run.refusal(spoilt)
        seen = refusal or "The request was answered with finite samples."
        figures.holds("served", "refused by the server", name, bool(refusal), seen)
        refused = _refuses_file(separator, spoilt[0])
        seen = "Separator raises NonFiniteAudioError for a file with such a sample."
        figures.holds("served", "refused by the client", name, refused, seen)


def check_ensemble(
    figures: Figures,
    artefact: Artefact,
    url: str | None,
    chunk: Samples,
    expected: Mapping[str, Samples],
    limits: Thresholds,
) -> str:
    """Ask for the stems of a model of specialists, all and one by one.

    Args:
        figures: what the answers are added to.
        artefact: the ensemble.
        url: of the server, None for one that is started for it.
        chunk: [1, channels, chunk_samples].
        expected: stem -> [1, channels, chunk_samples] of the specialist's graph here.
        limits: of the artefact.

    Returns:
        Name and version of the server.
    """
    spec = artefact.spec
    figures.report("served: starting a server" if url is None else f"served: asking {url}")
    with (
        running_server(artefact, url) as address,
        ServedRunner(address, spec) as run,
        Separator(address, spec.name, chunk_timeout_s=REQUEST_TIMEOUT_S) as separator,
    ):
        figures.report("served: all stems")
        found = dict(zip(spec.stems, run(chunk), strict=True))
        same_runtime = runs_our_onnx_runtime(separator, url)
        check_same(figures, expected, found, limits, same_runtime=same_runtime)
        check_refusals(figures, run, separator, chunk)
        stem = spec.stems[-1]
        figures.report(f"served: {stem} alone")
        before = _settled(run)
        single = run(chunk, [stem])[0]
        after = _settled(run)
        same = single.tobytes() == found[stem].tobytes()
        figures.holds(
            "served", "one stem is that of all", stem, same, "The same bytes as with the others."
        )
        busy = [
            name
            for name in artefact.specialists.values()
            if after.get(name, 0) > before.get(name, 0)
        ]
        figures.holds(
            "served",
            "one stem costs one model",
            stem,
            busy == [artefact.specialists[stem]],
            f"Inferences by {', '.join(busy) or 'none'}.",
        )
        return run.server_version()


def _settled(run: ServedRunner) -> dict[str, int]:
    """Inferences by model; statistics may trail the last answer."""
    counts = run.executions()
    for _ in range(20):
        time.sleep(0.2)
        if counts == (counts := run.executions()):
            break
    return counts


def _separated(separator: Separator, material: Material) -> list[Samples]:
    """Separate the song as a user does; one [channels, n] float32 per stem."""
    spec = material.spec
    with tempfile.TemporaryDirectory(prefix="stemserve-verify-") as scratch:
        path = Path(scratch) / "song.wav"
        soundfile.write(path, material.song.mixture.T, spec.sample_rate, subtype="FLOAT")
        result = separator.separate(path, Path(scratch) / "out")
        return [
            soundfile.read(result.stems[stem], dtype="float32", always_2d=True)[0].T
            for stem in spec.stems
        ]


def _refuses_file(separator: Separator, samples: Samples) -> bool:
    with tempfile.TemporaryDirectory(prefix="stemserve-verify-") as scratch:
        path = Path(scratch) / "spoilt.wav"
        soundfile.write(path, samples.T, separator.spec.sample_rate, subtype="FLOAT")
        try:
            separator.separate(path, Path(scratch) / "out", stems=separator.spec.stems[:1])
        except NonFiniteAudioError:
            return True
    return False
