from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from support.demucs_checkpoints import (
    FOUR,
    SIX,
    SMALL_HTDEMUCS,
    SMALL_HTDEMUCS_6S,
    network,
    snr_db,
    write_th,
)
from support.models import identity_spec

from stemserve.errors import CheckpointError, ExportError
from stemserve_export.catalog import SINGLE_FILE, find_model
from stemserve_export.families import htdemucs
from stemserve_export.families.demucs_spectrum import SpectrogramFraming, inverse_of_ones
from stemserve_export.onnx_graph import export_graph

CHUNK = 22050
# Two levels: 2816 tokens, more than one block of queries.
TINY = {
    **SMALL_HTDEMUCS,
    "depth": 2,
    "dconv_depth": 1,
    "t_layers": 2,
}


def entry(stems=FOUR, seconds="1/2"):
    return replace(find_model("htdemucs"), stems=stems, options={"segment_seconds": seconds})


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
    noise = torch.randn(batch, 2, samples, generator=generator)
    return tone + 0.05 * noise


def peer(module, mixture):
    with torch.no_grad():
        return module(mixture)


def ours(module, mixture):
    with torch.no_grad():
        return torch.stack(module(mixture), dim=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    module = network("HTDemucs", TINY)
    return module, write_th(module, tmp_path_factory.mktemp("htdemucs") / "tiny.th")


@pytest.fixture(scope="module")
def graph(tiny, tmp_path_factory):
    """ONNX Runtime session of the tiny network, and the graph's nodes."""
    separator = htdemucs.build(entry(), {SINGLE_FILE: tiny[1]})
    spec = identity_spec(name="tiny", chunk_samples=CHUNK, stems=FOUR)
    path = tmp_path_factory.mktemp("graph") / "tiny.onnx"
    model = export_graph(separator, spec, path)
    return onnxruntime.InferenceSession(path), model


def run(graph, mixture):
    return torch.from_numpy(np.stack(graph[0].run(None, {"mixture": mixture.numpy()}), axis=1))


@pytest.mark.parametrize(
    ("arguments", "stems"),
    [
        (SMALL_HTDEMUCS, FOUR),
        (SMALL_HTDEMUCS_6S, SIX),
        (
            {**SMALL_HTDEMUCS, "t_cross_first": True, "t_weight_pos_embed": 0.5, "dconv_mode": 1},
            FOUR,
        ),
        ({**SMALL_HTDEMUCS, "dconv_comp": 4, "dconv_depth": -2, "norm_starts": 2}, FOUR),
    ],
)
def test_it_equals_the_published_network(arguments, stems, tmp_path):
    module = network("HTDemucs", arguments)
    path = write_th(module, tmp_path / "net.th")
    mixture = music(2)
    expected = peer(module, mixture)
    found = ours(htdemucs.build(entry(stems), {SINGLE_FILE: path}), mixture)
    # Different orders of summation in float32, 115 to 128 dB.
    assert all(snr_db(found[:, i], expected[:, i]) > 100 for i in range(len(stems)))


def test_a_specialist_computes_its_stem_alone(tiny):
    module, path = tiny
    expected = peer(module, music())
    separator = htdemucs.build(entry(("vocals", "bass")), {SINGLE_FILE: path})
    found = ours(separator, music())
    assert snr_db(found[:, 0], expected[:, 3]) > 100
    assert snr_db(found[:, 1], expected[:, 1]) > 100
    assert separator.network.up[-1].conv.out_channels == 4 * 2 * 4


def test_the_test_network_is_not_degenerate(tiny):
    """Both branches, the transformer and every stem make a difference that is worth testing."""
    module, path = tiny
    stems = peer(module, music())
    level = stems.std(dim=(0, 2, 3))
    assert (level > 0.003).all() and (level < 1).all()
    assert all(snr_db(stems[:, i], stems[:, j]) < 10 for i in range(4) for j in range(i))
    separator = htdemucs.build(entry(), {SINGLE_FILE: path})
    with torch.no_grad():
        spectrogram, _, _ = separator.standardize(separator.spectrogram(music()))
        waveform, _, _ = separator.standardize(music())
        parts = separator.network(spectrogram, waveform)
        separator.network.bottleneck = None
        without = separator.network(spectrogram, waveform)
    assert all(part.std() > 0.05 for part in parts)
    assert all(snr_db(a, b) < 20 for a, b in zip(without, parts, strict=True))


def test_the_onnx_graph_equals_the_published_network(graph, tiny):
    expected, found = peer(tiny[0], music()), run(graph, music())
    # ONNX Runtime's own InstanceNormalization alone would leave 70 to 80 dB.
    assert all(snr_db(found[:, i], expected[:, i]) > 90 for i in range(4))


def test_the_onnx_graph_computes_each_entry_of_a_batch_by_itself(graph):
    mixtures = torch.cat([music(seed=1), 0.01 * music(seed=2), torch.zeros(1, 2, CHUNK)])
    together = run(graph, mixtures)
    for index in range(2):
        assert snr_db(together[index], run(graph, mixtures[index : index + 1])[0]) > 100


@pytest.mark.parametrize("level", [0.0, 1e-20, 1e-6, 0.25, 1.0])
def test_constants_and_silence_are_finite_and_as_published(graph, tiny, level):
    mixture = torch.full((1, 2, CHUNK), level)
    expected, found = peer(tiny[0], mixture), run(graph, mixture)
    assert torch.isfinite(found).all()
    # Rounding errors, divided by the 1e-5 that stands for a missing deviation, are all the
    # network has to go by.
    assert (found - expected).abs().max() < 2e-3


def test_full_scale_is_finite_and_as_published(graph, tiny):
    mixture = torch.sign(music())
    found = run(graph, mixture)
    assert snr_db(found, peer(tiny[0], mixture)) > 90


def test_fp16_keeps_the_stated_precision(tiny, tmp_path):
    module, path = tiny
    separator = htdemucs.build(entry(), {SINGLE_FILE: path}, "fp16")
    spec = identity_spec(name="tiny", chunk_samples=CHUNK, stems=FOUR, precision="fp16")
    model = export_graph(separator, spec, tmp_path / "tiny.onnx")
    types: dict[str, set[str]] = {}
    for node in model.graph.node:
        types.setdefault(node.op_type, set()).update(types_of(model, node))
    assert types["Gemm"] == {"FLOAT16"}
    assert types["Softmax"] == types["LayerNormalization"] == {"FLOAT"}
    session = (onnxruntime.InferenceSession(tmp_path / "tiny.onnx"), model)
    expected = peer(module, music())
    found = run(session, music())
    # 11 bits of mantissa through some 60 layers.
    assert snr_db(found, expected) > 50
    quiet = run(session, torch.zeros(1, 2, CHUNK))
    assert torch.isfinite(quiet).all()


def types_of(model, node):
    import onnx

    names = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    return {onnx.TensorProto.DataType.Name(names[name]) for name in node.output if name in names}


def test_the_graph_holds_what_tensorrt_takes_and_little_of_it(graph):
    operators = {node.op_type for node in graph[1].graph.node}
    assert operators.isdisjoint({"ConvTranspose", "InstanceNormalization", "Einsum", "Shape"})


def test_the_mean_of_the_spectrogram_is_undone_on_the_waveform(tiny):
    """What 1 + i in every bin adds to the waveform, against the published inverse STFT."""
    spectrum = torch.full((1, 2048, -(-CHUNK // 1024)), 1 + 1j, dtype=torch.complex64)
    expected = tiny[0]._ispec(spectrum, CHUNK)[0]
    found = inverse_of_ones(SpectrogramFraming(CHUNK, 4096))
    assert snr_db(torch.from_numpy(found), expected) > 100


def test_framing_is_the_published_segment():
    framing = htdemucs.framing({})
    assert (framing.chunk_samples, framing.tail) == (343980, "centred")
    assert htdemucs.framing({"segment_seconds": "10"}).chunk_samples == 441000


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "1/0", "61", "1/3", "1e9", "9" * 40, "nan"])
def test_an_absurd_segment_is_refused(text):
    with pytest.raises(ExportError, match="segment_seconds must be a number of seconds"):
        htdemucs.framing({"segment_seconds": text})


def test_another_segment_than_the_checkpoint_was_trained_on_is_refused(tiny):
    with pytest.raises(CheckpointError, match="--option segment_seconds=1/2"):
        htdemucs.build(entry(seconds="1"), {SINGLE_FILE: tiny[1]})


def test_a_tensor_that_is_left_over_is_refused(tmp_path):
    module = network("HTDemucs", TINY)
    module._init_args_kwargs[1]["t_layers"] = 1
    path = write_th(module, tmp_path / "net.th")
    with pytest.raises(CheckpointError, match=r"tensors that the network does not use"):
        htdemucs.build(entry(), {SINGLE_FILE: path})


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    module = network("HTDemucs", TINY)
    module._init_args_kwargs[1]["t_heads"] = 5
    path = write_th(module, tmp_path / "net.th")
    with pytest.raises(CheckpointError, match="width 32 and 5 heads"):
        htdemucs.build(entry(), {SINGLE_FILE: path})
