"""``verify_model``: one artefact from its checkpoint to what is served, step by step."""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import numpy as np
import numpy.typing as npt

from stemserve.errors import GateError
from stemserve_export.download import Report
from stemserve_export.families import Family
from stemserve_export.gate.artefact import Artefact, read_artefact, unreadable
from stemserve_export.gate.checks import (
    check_batch,
    check_odd_inputs,
    check_repeated,
    check_song,
    quiet_floor,
    sdr_db,
)
from stemserve_export.gate.figures import Figures, Verification
from stemserve_export.gate.material import Material, real_songs, rendered
from stemserve_export.gate.measures import snr_db
from stemserve_export.gate.runners import GraphRunner, run_torch
from stemserve_export.gate.served_checks import check_ensemble, check_served
from stemserve_export.gate.thresholds import thresholds_for

if TYPE_CHECKING:
    from torch import nn

Samples = npt.NDArray[np.float32]

_FAMILIES: Final = "stemserve_export.families"


@dataclass(frozen=True)
class GateOptions:
    """How to verify.

    Attributes:
        quick: leave the server out.
        url: gRPC address of a running server to measure instead of one that is started.
        audio: folder in MUSDB's layout with songs to measure on besides the rendered one.
        cache: folder of fetched weights.
        report: told of progress.
    """

    quick: bool = False
    url: str | None = None
    audio: Path | None = None
    cache: Path | None = None
    report: Report = print


@dataclass(frozen=True)
class _Measured:
    """The rendered song as torch and the graph separate it."""

    material: Material
    reference: list[Samples]
    graph_outputs: list[list[Samples]]


def verify_model(repository: Path, name: str, options: GateOptions) -> Verification:
    """Measure a model and write the report into its folder.

    Raises:
        ModelFileMissingError, SpecError, ExportError: it is no artefact of ours.
        DownloadError, DigestMismatchError, CheckpointError: its weights are not to be had.
        ServerError, LocalServerError: the server does not start, or fails.
        EvaluationDataError, AudioInputError: the songs cannot be used.
    """
    started = time.monotonic()
    artefact = read_artefact(repository, name)
    figures = Figures(lambda text: options.report(f"{name}: {text}"))
    versions = {"stemserve": _version("stemserve")}
    graph_sha256, parts = None, {}
    if artefact.specialists:
        parts = _measure_ensemble(artefact, figures, versions, options)
    else:
        graph_sha256 = artefact.graph_sha256()
        _measure_model(artefact, graph_sha256, figures, versions, options)
    verification = Verification(
        model=name,
        version=artefact.spec.version,
        graph_sha256=graph_sha256,
        parts=parts,
        versions=versions,
        verified_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - started,
        figures=figures.found,
    )
    try:
        verification.write(artefact.folder)
    except OSError as error:
        raise GateError(
            f"The report cannot be written to '{artefact.folder}' ({error.strerror}); make the "
            "repository writable."
        ) from None
    return verification


def _measure_model(
    artefact: Artefact,
    graph_sha256: str,
    figures: Figures,
    versions: dict[str, str],
    options: GateOptions,
) -> None:
    versions.update({package: _version(package) for package in ("torch", "onnx", "onnxruntime")})
    figures.holds(
        "onnx", "graph is the exported one", "", graph_sha256 == artefact.record["graph_sha256"],
        "Its sha256 is the one in export.json.",
    )  # fmt: skip
    try:
        measured = _measure_graph(artefact, figures, options)
    except GateError as error:  # the graph itself cannot be run
        figures.holds("onnx", "runs", "", False, str(error))
        return
    if options.quick:
        return
    try:
        versions["server"] = check_served(
            figures, artefact, options.url, measured.material, measured.reference,
            measured.graph_outputs, thresholds_for(artefact.spec),
        )  # fmt: skip
    except GateError as error:
        figures.holds("served", "answers", "", False, str(error))


def _measure_graph(artefact: Artefact, figures: Figures, options: GateOptions) -> _Measured:
    """Compare the graph with torch; both are gone from memory when this returns."""
    spec, limits = artefact.spec, thresholds_for(artefact.spec)
    figures.report("reading the weights")
    module = _module(artefact, options)
    graph = GraphRunner(spec, artefact.graph)
    measured: _Measured | None = None
    for material in _songs(artefact, options):
        reference, outputs = _both(module, graph, material, figures)
        stems = material.joined(outputs)
        for stem, value in sdr_db(material, reference).items():
            subject = stem if measured is None else f"{stem} ({material.song.name})"
            figures.at_least("torch", "SDR", subject, value, None, "dB")
        check_song(figures, "onnx", material, reference, stems, limits)
        if measured is None:  # the rendered one comes first
            measured = _Measured(material, reference, outputs)
            _report_tf32(figures, module, material)
    assert measured is not None
    del module
    gc.collect()
    chunks = measured.material.chunks[:2]
    figures.report("onnx: repeated and batched chunks")
    check_repeated(figures, "onnx", graph, chunks[0], measured.graph_outputs[0])
    if spec.max_batch_size > 1:
        alone = measured.graph_outputs[:2]
        check_batch(figures, "onnx", graph, chunks, alone, spec.stems, limits)
    check_odd_inputs(figures, "onnx", graph, spec.tensor_dims, limits)
    return measured


def _both(
    module: nn.Module, graph: GraphRunner, material: Material, figures: Figures
) -> tuple[list[Samples], list[list[Samples]]]:
    """Stems of the song by torch, [channels, n] each, and of its chunks by the graph."""
    by_torch, by_graph = [], []
    count = len(material.chunks)
    for number, chunk in enumerate(material.chunks, 1):
        figures.report(f"{material.song.name}, chunk {number} of {count}: torch")
        by_torch.append(run_torch(module, chunk))
        figures.report(f"{material.song.name}, chunk {number} of {count}: ONNX Runtime")
        by_graph.append(graph(chunk))
    return material.joined(by_torch), by_graph


def _songs(artefact: Artefact, options: GateOptions) -> Iterator[Material]:
    yield rendered(artefact.spec)
    if options.audio is not None:
        yield from real_songs(artefact.spec, options.audio)


def _module(artefact: Artefact, options: GateOptions) -> nn.Module:
    """The published weights in torch, in fp32 whatever the artefact computes in."""
    family = cast(Family, importlib.import_module(f"{_FAMILIES}.{artefact.spec.family}"))
    files = artefact.fetch_files(options.cache, options.report)
    try:
        return family.build(artefact.entry(), files, "fp32")
    except OSError as error:
        raise unreadable(artefact, error) from None


def _report_tf32(figures: Figures, module: nn.Module, material: Material) -> None:
    """Report what a GPU's TF32 would leave of the first chunk, emulated in torch."""
    from stemserve_export.tf32 import emulated_tf32

    figures.report("torch: TF32 emulated")
    chunk = material.chunks[0]
    exact = run_torch(module, chunk)
    with emulated_tf32():
        rounded = run_torch(module, chunk)
    floor = quiet_floor(material) / len(material.chunks)
    for name, want, got in zip(material.spec.stems, exact, rounded, strict=True):
        figures.at_least("torch", "SNR in TF32", name, snr_db(want, got, floor), None, "dB")


def _measure_ensemble(
    artefact: Artefact, figures: Figures, versions: dict[str, str], options: GateOptions
) -> dict[str, str]:
    """Measure what joins specialists; each of these has a report of its own.

    Returns:
        Digests of the specialists' graphs, by name.
    """
    spec = artefact.spec
    parts = {
        stem: read_artefact(artefact.repository, name)
        for stem, name in artefact.specialists.items()
    }
    for stem in spec.stems:
        fits = stem in parts and (
            parts[stem].spec.stems == (stem,)
            and parts[stem].spec.tensor_dims == spec.tensor_dims
            and parts[stem].spec.wire_dtype == spec.wire_dtype
        )
        seen = "A specialist gives just this stem, in the tensors that the ensemble declares."
        figures.holds("onnx", "specialist fits", stem, fits, seen)
    digests = {part.spec.name: part.graph_sha256() for part in parts.values()}
    if options.quick or any(figure.passed is False for figure in figures.found):
        return digests
    versions["onnxruntime"] = _version("onnxruntime")
    chunk = rendered(spec).chunks[0]
    try:
        expected = {}
        for stem, part in parts.items():
            figures.report(f"onnx: {part.spec.name}")
            expected[stem] = GraphRunner(part.spec, part.graph)(chunk)[0]
        versions["server"] = check_ensemble(
            figures, artefact, options.url, chunk, expected, thresholds_for(spec)
        )
    except GateError as error:
        figures.holds("served", "answers", "", False, str(error))
    return digests


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
