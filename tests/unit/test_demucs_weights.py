import os
import pickle
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from support.demucs_checkpoints import (
    FOUR,
    HDEMUCS_MMI,
    HTDEMUCS,
    SMALL_HDEMUCS,
    SMALL_HTDEMUCS,
    network,
    package,
    write_safetensors,
    write_th,
)

from stemserve.errors import CheckpointError
from stemserve_export.families.demucs_architecture import architecture
from stemserve_export.weights.demucs import DemucsCheckpoint, Weights, read_checkpoint


@pytest.fixture(scope="module")
def module():
    return network("HTDemucs", {**SMALL_HTDEMUCS, "bottom_channels": 8})


@pytest.fixture
def th(module, tmp_path):
    return write_th(module, tmp_path / "955717e8-8726e21a.th")


def rewritten(module, path, **changes):
    torch.save({**package(module), **changes}, path)
    return path


def test_a_package_is_read_with_its_arguments_and_as_float32(module, th):
    checkpoint = read_checkpoint(th)
    assert checkpoint.klass == "HTDemucs"
    assert checkpoint.kwargs["segment"] == Fraction(1, 2)
    assert checkpoint.kwargs["sources"] == list(FOUR)
    assert checkpoint.kwargs["multi_freqs"] == []
    state = module.state_dict()
    assert checkpoint.tensors.keys() == state.keys()
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint.tensors.values())
    assert all(torch.equal(checkpoint.tensors[name], state[name]) for name in state)


def test_safetensors_hold_the_same(module, th, tmp_path):
    one, other = read_checkpoint(th), read_checkpoint(write_safetensors(module, tmp_path / "a.x"))
    assert (one.klass, one.kwargs) == (other.klass, other.kwargs)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize("pickled", [Fraction(39, 5), "39/5"])
def test_a_segment_is_read_as_every_python_pickled_it(module, tmp_path, pickled, monkeypatch):
    if isinstance(pickled, str):  # before Python 3.11
        monkeypatch.setattr(Fraction, "__reduce__", lambda self: (Fraction, (str(self),)))
    kwargs = {**SMALL_HTDEMUCS, "segment": Fraction(39, 5)}
    path = rewritten(module, tmp_path / "a.th", kwargs=kwargs)
    monkeypatch.undo()
    assert read_checkpoint(path).kwargs["segment"] == Fraction(39, 5)


class _Fraction:
    def __init__(self, *args):
        self.args = args

    def __reduce__(self):
        return Fraction, self.args


@pytest.mark.parametrize(
    "args", [("1e400000",), ("9" * 4000,), (1, 0), ("39/5/2",), ("x",), (1, 2, 3)]
)
def test_an_absurd_fraction_is_refused_before_it_is_computed(module, tmp_path, args):
    path = tmp_path / "a.th"
    kwargs = {**SMALL_HTDEMUCS, "segment": _Fraction(*args)}
    rewritten(module, path, kwargs=kwargs)
    with pytest.raises(CheckpointError, match=r"expected one like 39/5"):
        read_checkpoint(path)


class _Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("place", ["klass", "kwargs", "training_args", "state"])
def test_code_in_a_package_is_refused_and_not_run(module, tmp_path, place):
    target = tmp_path / "pwned"
    path = rewritten(module, tmp_path / "a.th", **{place: {"x": _Malicious(target)}})
    with pytest.raises(CheckpointError, match=r"mkdir.*Nothing in it was run"):
        read_checkpoint(path)
    assert not target.exists()
    with path.open("rb") as file:  # the attack is a real one
        assert file.read(2) == b"PK"
    torch.load(path, weights_only=False)
    assert target.exists()


def test_code_in_a_bare_pickle_is_refused_and_not_run(tmp_path):
    path = tmp_path / "a.th"
    path.write_bytes(pickle.dumps(_Malicious(tmp_path / "pwned"), protocol=2))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not (tmp_path / "pwned").exists()


def test_a_class_named_in_safetensors_is_not_imported(module, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"klass": "antigravity.Fly", "kwargs": "{}"})
    with pytest.raises(CheckpointError, match=r"'antigravity\.Fly'; expected one of HTDemucs"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"klass": Fraction}, "package of"),
        ({"state": {"__quantized": True}}, "quantized"),
        ({"state": {"x": torch.tensor([float("nan")])}}, "NaN or infinity in 'x'"),
        ({"state": {}}, "holds no state dict"),
        ({"state": {"x": [1.0]}}, "holds list under 'x'"),
        ({"args": (1, 2)}, "arguments of a form"),
        ({"kwargs": {"sources": {"a": 1}}}, "has a dict among its arguments"),
    ],
)
def test_a_package_of_another_content_is_refused(module, tmp_path, changes, message):
    path = rewritten(module, tmp_path / "a.th", **changes)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize("kept", [0, 1, 100, 5000])
@pytest.mark.parametrize("write", [write_th, write_safetensors])
def test_a_cut_file_is_refused(module, tmp_path, write, kept):
    path = write(module, tmp_path / "a.bin")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"a\.bin"):
        read_checkpoint(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.th' cannot be read"):
        read_checkpoint(tmp_path / "nothing.th")


def checkpoint(klass="HTDemucs", tensors=None, **kwargs):
    return DemucsCheckpoint("net.th", klass, kwargs, tensors or {})


def test_published_arguments_are_accepted():
    found = architecture(checkpoint(**HTDEMUCS), "HTDemucs", FOUR, 44100)
    assert (found.depth, found.channels(3), found.segment) == (4, 384, Fraction(39, 5))
    assert found.merging is None
    found = architecture(checkpoint("HDemucs", **HDEMUCS_MMI), "HDemucs", FOUR, 44100)
    assert (found.depth, found.channels(5), found.merging) == (6, 1536, 4)


@pytest.mark.parametrize(
    ("klass", "changes", "message"),
    [
        ("HTDemucs", {"cac": False}, "cac = False; only True"),
        ("HTDemucs", {"wiener_iters": 1}, "wiener_iters = 1"),
        ("HTDemucs", {"end_iters": 1}, "end_iters = 1"),
        ("HTDemucs", {"multi_freqs": [0.5]}, r"multi_freqs = \[0\.5\]"),
        ("HTDemucs", {"audio_channels": 1}, "audio_channels = 1"),
        ("HTDemucs", {"nfft": 2048}, "nfft = 2048"),
        ("HTDemucs", {"t_emb": "cape"}, "t_emb = 'cape'"),
        ("HTDemucs", {"t_sparse_self_attn": True}, "t_sparse_self_attn = True"),
        ("HTDemucs", {"t_norm_first": False}, "t_norm_first = False"),
        ("HTDemucs", {"use_train_segment": False}, "use_train_segment = False"),
        ("HTDemucs", {"dconv_lstm": 4}, "argument 'dconv_lstm', which HTDemucs does not have"),
        ("HTDemucs", {"depth": 5}, "a depth of 5"),
        ("HTDemucs", {"t_layers": 0}, "0 transformer layers"),
        ("HTDemucs", {"channels": 0}, "sizes that are not positive"),
        ("HTDemucs", {"channels": "48"}, "channels = '48'; expected a number"),
        ("HTDemucs", {"channels": 10**9}, "channels = 1000000000"),
        ("HTDemucs", {"samplerate": 16000}, "16000 Hz where 44100 Hz"),
        ("HTDemucs", {"sources": ["speech", "noise"]}, "the stems speech, noise, not drums"),
        ("HTDemucs", {"sources": "drums"}, "does not name its sources"),
        ("HDemucs", {"hybrid": False}, "hybrid = False"),
        ("HDemucs", {"hybrid_old": True}, "hybrid_old = True"),
        ("HDemucs", {"depth": 4}, "a depth of 4"),
        ("HDemucs", {"dconv_lstm": 2}, "recurrent layers before the branches merge"),
        ("HDemucs", {"dconv_attn": 5}, "without attention"),
    ],
)
def test_a_variant_that_the_graph_does_not_have_is_refused(klass, changes, message):
    published = {"HTDemucs": HTDEMUCS, "HDemucs": HDEMUCS_MMI}[klass]
    with pytest.raises(CheckpointError, match=message):
        architecture(checkpoint(klass, **{**published, **changes}), klass, FOUR, 44100)


def test_the_other_family_is_refused():
    with pytest.raises(CheckpointError, match="class HDemucs; expected HTDemucs"):
        architecture(checkpoint("HDemucs", **SMALL_HDEMUCS), "HTDemucs", FOUR, 44100)


def test_a_plain_state_dict_is_taken_for_the_published_network(module, tmp_path):
    torch.save(module.state_dict(), tmp_path / "a.th")
    found = read_checkpoint(tmp_path / "a.th")
    assert found.kwargs is None
    guessed = architecture(found, "HTDemucs", FOUR, 44100)
    assert guessed.values["bottom_channels"] == 8
    assert (guessed.sources, guessed.segment) == (FOUR, Fraction(39, 5))
    published = replace(found, klass="HDemucs", tensors={})
    assert architecture(published, "HDemucs", FOUR, 44100).values["dconv_mode"] == 1


def test_weights_are_taken_by_name_and_shape():
    weights = Weights({"a.b": torch.zeros(2, 3), "c": torch.zeros(1)}, "net.th")
    with pytest.raises(CheckpointError, match=r"no tensor 'a\.x'"):
        weights.at("a").take("x", (1,))
    with pytest.raises(CheckpointError, match=r"shape \(2, 3\) for 'a\.b'.*has \(3, 2\)"):
        weights.at("a").take("b", (3, 2))
    assert weights.at("a").take("b", (2, 3)).shape == (2, 3)
    with pytest.raises(CheckpointError, match="1 tensors that the network does not use, 'c'"):
        weights.check_all_taken()
    weights.take("c", (1,))
    weights.check_all_taken()
