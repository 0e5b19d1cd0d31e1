"""The exported Open-Unmix against the package openunmix, chunk by chunk; the ONNX graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from reference.openunmix import published_separator, separate
from support.openunmix_checkpoints import SMALL_HIDDEN, STEMS, write_checkpoints
from torch import Tensor

from stemserve.errors import CheckpointError, ExportError
from stemserve.spec import ModelSpec, Precision
from stemserve_export.catalog import CatalogEntry, find_model
from stemserve_export.families.openunmix import OpenUnmixSeparator, build, framing
from stemserve_export.onnx_graph import export_graph
from stemserve_export.weights.openunmix import TargetWeights, read_target

N_FRAMES = 40
CHUNK = (N_FRAMES - 1) * 1024
# fp32 in another order of summation leaves 119 dB and more; a misplaced bin, gate or frame less
# than 40.
LEAST_SNR_DB = 110.0
# Half precision rounds to 66 dB; the seeded LSTMs amplify that by up to 20 dB, more or less by
# their seed and input, in eager PyTorch as in ONNX Runtime.
LEAST_HALF_SNR_DB = 40.0
ITERATIONS = ["0", "1"]

MakeSpec = Callable[..., ModelSpec]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of small products wait for each other for most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_checkpoints(tmp_path_factory.mktemp("openunmix"), SMALL_HIDDEN)


@pytest.fixture(scope="module")
def targets(files: Mapping[str, Path]) -> dict[str, TargetWeights]:
    return {stem: read_target(path, stem) for stem, path in files.items()}


def umxhq(stems: Sequence[str] = STEMS, iterations: str = "1") -> CatalogEntry:
    entry = find_model("umxhq")
    return replace(entry, stems=tuple(stems), options={"wiener_iterations": iterations})


def small_separator(
    targets: Mapping[str, TargetWeights],
    iterations: str,
    stems: Sequence[str] = STEMS,
    precision: Precision = "fp32",
) -> OpenUnmixSeparator:
    return OpenUnmixSeparator(
        targets, stems, wiener=iterations == "1", precision=precision, n_frames=N_FRAMES
    ).eval()


def published(
    targets: Mapping[str, TargetWeights], mixture: Tensor, iterations: str
) -> dict[str, Tensor]:
    """What openunmix gives, computed in float64: its own rounding is not ours to repeat."""
    states = {stem: dict(target.tensors) for stem, target in targets.items()}
    return separate(published_separator(states, int(iterations), torch.float64), mixture)


def music(n_samples: int = CHUNK, seed: int = 5) -> Tensor:
    """``[2, n_samples]`` float32: decaying notes, some in both channels, over noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(n_samples) / 44100

    def notes(level: float) -> np.ndarray:
        frequencies, rates = rng.uniform(60, 15000, 12), rng.uniform(1, 4, 12)
        decays = np.exp(-((time[:, None] * rates) % 1.0))
        waves = np.sin(2 * np.pi * frequencies * time[:, None])
        return np.asarray(level * (waves * decays).sum(axis=1))

    common = notes(0.05)
    channels = [
        gain * common + notes(0.05) + 0.01 * rng.standard_normal(n_samples) for gain in (1.0, 0.6)
    ]
    return torch.from_numpy(np.stack(channels)).float()


def snr_db(truth: Tensor, measured: Tensor) -> float:
    error = (truth.double() - measured.double()).square().sum()
    return float(10 * torch.log10(truth.double().square().sum() / error))


@pytest.mark.parametrize("iterations", ITERATIONS)
@pytest.mark.parametrize("gain", [1.0, 1e-3], ids=["loud", "quiet"])
def test_chunk_equals_openunmix(
    targets: dict[str, TargetWeights], iterations: str, gain: float
) -> None:
    """Loud chunks are scaled down before the Wiener step, quiet ones are not."""
    mixture = gain * torch.stack([music(seed=1), music(seed=2)])
    truth = published(targets, mixture, iterations)
    with torch.inference_mode():
        stems = small_separator(targets, iterations)(mixture)
    assert snr_db(truth["vocals"], truth["bass"]) < 20, "the test is blind if the stems are alike"
    for name, stem in zip(STEMS, stems, strict=True):
        assert stem.shape == (2, 2, CHUNK)
        assert snr_db(truth[name], stem) > LEAST_SNR_DB


@pytest.mark.parametrize("iterations", ITERATIONS)
def test_published_chunk_equals_openunmix(
    files: dict[str, Path], targets: dict[str, TargetWeights], iterations: str
) -> None:
    chunk = framing({"wiener_iterations": iterations}).chunk_samples
    mixture = music(chunk)[None]
    truth = published(targets, mixture, iterations)
    with torch.inference_mode():
        stems = build(umxhq(iterations=iterations), files)(mixture)
    for name, stem in zip(STEMS, stems, strict=True):
        assert snr_db(truth[name], stem) > LEAST_SNR_DB


def test_other_depth_and_bandwidth(tmp_path: Path) -> None:
    files = write_checkpoints(tmp_path, 32, max_bin=700, layers=2)
    targets = {stem: read_target(path, stem) for stem, path in files.items()}
    mixture = music()[None]
    truth = published(targets, mixture, "1")
    with torch.inference_mode():
        stems = small_separator(targets, "1")(mixture)
    for name, stem in zip(STEMS, stems, strict=True):
        assert snr_db(truth[name], stem) > LEAST_SNR_DB


def test_mono_is_no_worse_than_openunmix(targets: dict[str, TargetWeights]) -> None:
    """Equal channels make every matrix of the Wiener step nearly singular: float32 loses there."""
    mixture = music()[:1].expand(2, -1)[None].contiguous()
    truth = published(targets, mixture, "1")
    states = {stem: dict(target.tensors) for stem, target in targets.items()}
    peer = separate(published_separator(states, 1), mixture)
    with torch.inference_mode():
        stems = small_separator(targets, "1")(mixture)
    for name, stem in zip(STEMS, stems, strict=True):
        assert snr_db(truth[name], stem) > snr_db(truth[name], peer[name]) - 3


@pytest.mark.parametrize("iterations", ITERATIONS)
def test_some_stems_in_another_order(files: dict[str, Path], iterations: str) -> None:
    mixture = music(framing({}).chunk_samples)[None]
    with torch.inference_mode():
        all_stems = dict(
            zip(STEMS, build(umxhq(iterations=iterations), files)(mixture), strict=True)
        )
        some = build(umxhq(["bass", "vocals"], iterations), files)(mixture)
    assert len(some) == 2
    assert snr_db(all_stems["bass"], some[0]) > LEAST_SNR_DB
    assert snr_db(all_stems["vocals"], some[1]) > LEAST_SNR_DB


def test_one_stem_costs_one_network_without_the_wiener_step(files: dict[str, Path]) -> None:
    only_drums = {"drums": files["drums"]}
    one = build(umxhq(["drums"], "0"), only_drums)
    every = build(umxhq(["drums"], "1"), files)
    assert len(one.networks) == 1
    assert len(every.networks) == 4


@pytest.fixture(scope="module")
def export(
    targets: dict[str, TargetWeights], make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Export a small separator by the project's rules, each kind once."""

    @cache
    def run(iterations: str, stems: tuple[str, ...] = STEMS, precision: Precision = "fp32") -> Path:
        separator = small_separator(targets, iterations, stems, precision)
        spec = make_spec(stems=stems, chunk_samples=CHUNK, precision=precision)
        path = tmp_path_factory.mktemp("graph") / "model.onnx"
        export_graph(separator, spec, path)
        return path

    return run


def run_graph(path: Path, mixture: Tensor) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(stem) for stem in session.run(None, {"mixture": mixture.numpy()})]


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("iterations", ITERATIONS)
def test_onnx_graph(
    targets: dict[str, TargetWeights], export: Callable[..., Path], iterations: str
) -> None:
    path = export(iterations)
    assert operators(path)["LSTM"] == 3 * len(STEMS)
    # A dynamic batch must not bring operators that compute shapes.
    assert not {"Shape", "Expand", "Range", "If", "Loop"} & set(operators(path))
    mixture = torch.stack([music(seed=seed) for seed in range(3)])
    truth = published(targets, mixture, iterations)
    batch = run_graph(path, mixture)
    alone = run_graph(path, mixture[2:])
    for index, name in enumerate(STEMS):
        assert snr_db(truth[name], batch[index]) > LEAST_SNR_DB
        assert snr_db(batch[index][2:], alone[index]) > LEAST_SNR_DB


@pytest.mark.parametrize("iterations", ITERATIONS)
def test_onnx_graph_on_extreme_chunks(
    targets: dict[str, TargetWeights], export: Callable[..., Path], iterations: str
) -> None:
    square = torch.sign(torch.sin(torch.arange(CHUNK) * 0.05))
    falls_silent = music()
    falls_silent[:, CHUNK // 2 :] = 0
    impulse = torch.zeros(2, CHUNK)
    impulse[:, 20_000] = 1
    mixture = torch.stack(
        [torch.zeros(2, CHUNK), torch.ones(2, CHUNK), square.expand(2, -1), falls_silent, impulse]
    )
    mixture = torch.cat([mixture, 1e-20 * music()[None]])
    stems = run_graph(export(iterations), mixture)
    truth = published(targets, mixture, iterations)
    for name, stem in zip(STEMS, stems, strict=True):
        assert bool(torch.isfinite(stem).all())
        assert bool((stem[0] == 0).all()), "silence must stay silence"
        assert float(stem.abs().max()) < 50
        assert snr_db(truth[name][3], stem[3]) > LEAST_SNR_DB


def test_graph_of_one_stem(targets: dict[str, TargetWeights], export: Callable[..., Path]) -> None:
    mixture = music()[None]
    for iterations, networks in (("0", 1), ("1", 4)):
        path = export(iterations, ("bass",))
        assert operators(path)["LSTM"] == 3 * networks
        (bass,) = run_graph(path, mixture)
        assert snr_db(published(targets, mixture, iterations)["bass"], bass) > LEAST_SNR_DB


@pytest.mark.parametrize("iterations", ITERATIONS)
def test_half_precision(
    targets: dict[str, TargetWeights], export: Callable[..., Path], iterations: str
) -> None:
    path = export(iterations, precision="fp16")
    types = Counter[int]()
    for tensor in onnx.load(path).graph.initializer:
        types[tensor.data_type] += int(np.prod(tensor.dims))
    weights = sum(q.numel() for q in small_separator(targets, iterations).parameters())
    assert types[onnx.TensorProto.FLOAT16] >= weights, "the networks' weights are half precision"
    mixture = torch.stack([music(), torch.ones(2, CHUNK), torch.zeros(2, CHUNK)])
    truth = published(targets, mixture, iterations)
    for name, stem in zip(STEMS, run_graph(path, mixture), strict=True):
        assert snr_db(truth[name][0], stem[0]) > LEAST_HALF_SNR_DB
        assert bool(torch.isfinite(stem).all())
        assert bool((stem[2] == 0).all())


def test_framing_is_one_excerpt_of_the_wiener_step() -> None:
    for iterations in ITERATIONS:
        frame = framing({"wiener_iterations": iterations})
        assert 1 + frame.chunk_samples // 1024 == 300
        assert frame.chunk_samples % 1024 == 0
        assert (frame.edge_samples, frame.lead_samples, frame.tail) == (0, 0, "centred")


def test_unknown_option_is_refused(files: dict[str, Path]) -> None:
    with pytest.raises(ExportError, match='must be "0" or "1" and is "2"'):
        framing({"wiener_iterations": "2"})
    with pytest.raises(ExportError, match='must be "0" or "1" and is "yes"'):
        build(umxhq(iterations="yes"), files)


def test_chunks_that_do_not_fit_are_refused(targets: dict[str, TargetWeights]) -> None:
    for n_frames in (3, 301):
        with pytest.raises(ExportError, match=f"4 to 300 frames; got {n_frames}"):
            OpenUnmixSeparator(targets, STEMS, wiener=True, n_frames=n_frames)


def test_missing_files_are_refused(files: dict[str, Path]) -> None:
    without = {stem: path for stem, path in files.items() if stem != "bass"}
    with pytest.raises(CheckpointError, match="no checkpoint for 'bass' of 'umxhq', only for voc"):
        build(umxhq(), without)
    with pytest.raises(CheckpointError, match="needs the networks of all targets, not only of bas"):
        build(umxhq(["bass"], "1"), {"bass": files["bass"]})


def test_files_of_two_models_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    mixed = {**files, **write_checkpoints(tmp_path, 32, ["other"])}
    with pytest.raises(CheckpointError, match=r"'vocals' is 16 wide .* 'other' is 32 wide"):
        build(umxhq(), mixed)
