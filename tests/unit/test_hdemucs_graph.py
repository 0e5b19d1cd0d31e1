from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from support.demucs_checkpoints import FOUR, SMALL_HDEMUCS, network, snr_db, write_th
from support.models import identity_spec

from stemserve.errors import ExportError
from stemserve_export.catalog import SINGLE_FILE, find_model
from stemserve_export.families import hdemucs
from stemserve_export.onnx_graph import export_graph

# 216 frames: more than one span of the LSTMs at one level, less than one at the next.
SECONDS = "5"
CHUNK = 220500


def entry(stems=FOUR, seconds=SECONDS):
    return replace(find_model("hdemucs_mmi"), stems=stems, options={"segment_seconds": seconds})


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads cost more than they bring for networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def music(batch=1, samples=CHUNK, seed=0):
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(samples) / 44100
    tone = 0.3 * torch.sin(2 * torch.pi * 220 * time) * (torch.sin(20 * time) > 0)
    return tone + 0.05 * torch.randn(batch, 2, samples, generator=generator)


def peer(module, mixture):
    with torch.no_grad():
        return module(mixture)


def ours(module, mixture):
    with torch.no_grad():
        return torch.stack(module(mixture), dim=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    module = network("HDemucs", {**SMALL_HDEMUCS, "dconv_depth": 1})
    return module, write_th(module, tmp_path_factory.mktemp("hdemucs") / "small.th")


@pytest.fixture(scope="module")
def graph(small, tmp_path_factory):
    separator = hdemucs.build(entry(), {SINGLE_FILE: small[1]})
    spec = identity_spec(name="small", chunk_samples=CHUNK, stems=FOUR)
    path = tmp_path_factory.mktemp("graph") / "small.onnx"
    model = export_graph(separator, spec, path)
    return onnxruntime.InferenceSession(path), model


def run(graph, mixture):
    return torch.from_numpy(np.stack(graph[0].run(None, {"mixture": mixture.numpy()}), axis=1))


@pytest.mark.parametrize(("seconds", "dconv_mode"), [("1", 3), ("5", 1), ("6", 3)])
def test_it_equals_the_published_network(seconds, dconv_mode, tmp_path):
    module = network("HDemucs", {**SMALL_HDEMUCS, "dconv_mode": dconv_mode})
    path = write_th(module, tmp_path / "net.th")
    mixture = music(1, 44100 * int(seconds))
    expected = peer(module, mixture)
    found = ours(hdemucs.build(entry(seconds=seconds), {SINGLE_FILE: path}), mixture)
    assert all(snr_db(found[:, i], expected[:, i]) > 100 for i in range(4))


def test_the_test_network_is_not_degenerate(small):
    module, path = small
    stems = peer(module, music())
    level = stems.std(dim=(0, 2, 3))
    assert (level > 0.003).all() and (level < 1).all()
    assert all(snr_db(stems[:, i], stems[:, j]) < 10 for i in range(4) for j in range(i))
    separator = hdemucs.build(entry(), {SINGLE_FILE: path})
    with torch.no_grad():
        spectrogram, _, _ = separator.standardize(separator.spectrogram(music()))
        waveform, _, _ = separator.standardize(music())
        parts = separator.network(spectrogram, waveform)
        # Without LSTM and attention, by which the inner levels differ from the outer ones.
        separator.network.encoder[4].dconv = torch.nn.Identity()
        separator.network.encoder[5].dconv = torch.nn.Identity()
        without = separator.network(spectrogram, waveform)
    assert all(part.std() > 0.03 for part in parts)
    assert all(snr_db(a, b) < 50 for a, b in zip(without, parts, strict=True))


def test_the_onnx_graph_equals_the_published_network(graph, small):
    expected, found = peer(small[0], music()), run(graph, music())
    assert all(snr_db(found[:, i], expected[:, i]) > 90 for i in range(4))


def test_the_onnx_graph_computes_each_entry_of_a_batch_by_itself(graph):
    mixtures = torch.cat([music(seed=1), 0.01 * music(seed=2)])
    together = run(graph, mixtures)
    for index in range(2):
        assert snr_db(together[index], run(graph, mixtures[index : index + 1])[0]) > 100


@pytest.mark.parametrize("level", [0.0, 1e-20, 0.25, 1.0])
def test_constants_and_silence_are_finite_and_as_published(graph, small, level):
    mixture = torch.full((1, 2, CHUNK), level)
    found = run(graph, mixture)
    assert torch.isfinite(found).all()
    assert (found - peer(small[0], mixture)).abs().max() < 2e-3


def test_full_scale_is_as_published(graph, small):
    mixture = torch.sign(music())
    assert snr_db(run(graph, mixture), peer(small[0], mixture)) > 90


def test_every_lstm_is_one_operator(graph):
    operators = [node.op_type for node in graph[1].graph.node]
    assert operators.count("LSTM") == 2 * 2  # two levels, two layers
    assert "Loop" not in operators and "Scan" not in operators


def test_fp16_keeps_the_stated_precision(small):
    module, path = small
    separator = hdemucs.build(entry(("bass",)), {SINGLE_FILE: path}, "fp16")
    assert separator.network.encoder[5].conv.conv.weight.dtype == torch.float16
    found = ours(separator, music())
    assert found.dtype == torch.float32
    assert snr_db(found[:, 0], peer(module, music())[:, 1]) > 50


def test_framing_is_a_quarter_of_the_published_segment():
    framing = hdemucs.framing({})
    assert (framing.chunk_samples, framing.tail) == (485100, "centred")
    assert hdemucs.framing({"segment_seconds": "44"}).chunk_samples == 1940400
    with pytest.raises(ExportError, match="segment_seconds must be"):
        hdemucs.framing({"segment_seconds": "100"})
