"""The release gate on a toy family: what is right passes, and each check finds what is wrong."""

import hashlib
import json
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from support.musdb import write_dataset

from stemserve.errors import DigestMismatchError, EvaluationDataError, ExportError
from stemserve.spec import Checkpoint, CheckpointFile
from stemserve.verification import verification_warning
from stemserve_export.gate.gate import GateOptions, verify_model
from stemserve_export.triton_config import config_text

GAINS = {"vocals": 0.3, "accompaniment": 0.7}
CHUNK = 4096
FAMILY = "gatetoy"


class Toy(torch.nn.Module):
    """Each stem is the mixture by a gain, under an envelope."""

    def __init__(self, stems, envelope):
        super().__init__()
        self.stems, self.envelope = stems, torch.from_numpy(envelope)

    def forward(self, mixture):
        return tuple(mixture * self.envelope * GAINS[stem] for stem in self.stems)


@pytest.fixture
def toy(make_spec, monkeypatch, tmp_path):
    """Write a toy artefact; keywords change its spec, ``spoil`` its graph's last nodes."""
    weights = tmp_path / "weights.ckpt"
    weights.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    family = ModuleType(f"stemserve_export.families.{FAMILY}")
    family.envelope = np.ones(CHUNK, np.float32)
    family.built = []

    def build(entry, files, precision="fp32"):
        family.built.append((entry, files, precision))
        return Toy(entry.stems, family.envelope)

    family.build = build
    monkeypatch.setitem(sys.modules, family.__name__, family)

    class Artefacts:
        repository = tmp_path / "model_repository"
        source = weights

        def write(self, spoil=None, gains=GAINS, envelope=None, core_half=False, **changes):
            if envelope is not None:
                family.envelope = envelope
            spec = make_spec(
                **{
                    "name": "toy", "family": FAMILY, "chunk_samples": CHUNK, "sample_rate": 8000,
                    "version": 1, "options": {},
                    "checkpoint": Checkpoint(
                        (CheckpointFile(weights.as_uri(), digest),), "MIT", "allowed", "none"
                    ),
                    **changes,
                }
            )  # fmt: skip
            folder = self.repository / spec.name / str(spec.version)
            folder.mkdir(parents=True, exist_ok=True)
            onnx.save(graph(spec, gains, family.envelope, spoil, core_half), folder / "model.onnx")
            (folder.parent / "config.pbtxt").write_text(config_text(spec))
            record = {
                "graph_sha256": hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest(),
                "files": {"model": {"source": weights.as_uri(), "sha256": digest}},
                "members": {"vocals": "v"},
                "spec": spec.to_parameters(),
            }
            (folder / "export.json").write_text(json.dumps(record))
            return spec

        def verify(self, name="toy", **options):
            return verify_model(
                self.repository, name, GateOptions(quick=True, report=self.said.append, **options)
            )

        family_module = family

    artefacts = Artefacts()
    artefacts.said = []
    return artefacts


def graph(spec, gains, envelope, spoil=None, core_half=False):
    """The toy as an ONNX model; ``spoil`` maps the names before the outputs to more nodes."""
    wire = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}[spec.wire_dtype]
    shape = ["batch", *spec.tensor_dims]
    kind = TensorProto.FLOAT16 if core_half else TensorProto.FLOAT
    nodes = [helper.make_node("Cast", ["mixture"], ["x"], to=kind)]
    constants = [
        numpy_helper.from_array(envelope.astype(np.float16 if core_half else np.float32), "env")
    ]
    nodes.append(helper.make_node("Mul", ["x", "env"], ["enveloped"]))
    for stem in spec.stems:
        gain = np.array(gains[stem], np.float16 if core_half else np.float32)
        constants.append(numpy_helper.from_array(gain, f"gain_{stem}"))
        nodes.append(helper.make_node("Mul", ["enveloped", f"gain_{stem}"], [f"plain_{stem}"]))
    last = {stem: f"plain_{stem}" for stem in spec.stems}
    if spoil is not None:
        more, extra, changed = spoil
        nodes += more
        constants += extra
        last |= changed
    nodes += [helper.make_node("Cast", [last[stem]], [stem], to=wire) for stem in spec.stems]
    return helper.make_model(
        helper.make_graph(
            nodes, "toy",
            [helper.make_tensor_value_info("mixture", wire, shape)],
            [helper.make_tensor_value_info(stem, wire, shape) for stem in spec.stems],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=10,
    )  # fmt: skip


def constant(name, value):
    return numpy_helper.from_array(np.asarray(value, np.float32), name)


def on_silence(value):
    nodes = [
        helper.make_node("Equal", ["x", "zero"], ["silent"]),
        helper.make_node("Where", ["silent", "value", "plain_vocals"], ["spoilt"]),
    ]
    return nodes, [constant("zero", 0), constant("value", value)], {"vocals": "spoilt"}


def random_noise(level):
    nodes = [
        helper.make_node("RandomNormalLike", ["plain_vocals"], ["noise"], scale=level),
        helper.make_node("Add", ["plain_vocals", "noise"], ["spoilt"]),
    ]
    return nodes, [], {"vocals": "spoilt"}


def leaking_batch():
    """A little of the batch's mean, less the item's own: nothing where an item is alone."""
    nodes = [
        helper.make_node("ReduceMean", ["plain_vocals", "axis"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["mean", "plain_vocals"], ["others"]),
        helper.make_node("Mul", ["others", "little"], ["leak"]),
        helper.make_node("Add", ["plain_vocals", "leak"], ["spoilt"]),
    ]
    axis = numpy_helper.from_array(np.array([0], np.int64), "axis")
    return nodes, [axis, constant("little", 1e-3)], {"vocals": "spoilt"}


def swapped():
    return [], [], {"vocals": "plain_accompaniment", "accompaniment": "plain_vocals"}


def exploding():
    """Right for music, far too loud where samples are tiny: a missing epsilon."""
    nodes = [
        helper.make_node("Abs", ["x"], ["size"]),
        helper.make_node("ReduceMax", ["size", "axes"], ["loudest"], keepdims=1),
        helper.make_node("Less", ["loudest", "tiny"], ["quiet"]),
        helper.make_node("Mul", ["plain_vocals", "much"], ["loud"]),
        helper.make_node("Where", ["quiet", "loud", "plain_vocals"], ["spoilt"]),
    ]
    axes = numpy_helper.from_array(np.array([1, 2], np.int64), "axes")
    return nodes, [axes, constant("tiny", 1e-5), constant("much", 1e4)], {"vocals": "spoilt"}


def spike():
    """One sample of a chunk is off by a little, which a mean does not show."""
    envelope = np.zeros(CHUNK, np.float32)
    envelope[1000] = 2e-2
    nodes = [helper.make_node("Add", ["plain_vocals", "spike"], ["spoilt"])]
    return nodes, [constant("spike", envelope)], {"vocals": "spoilt"}


def failed(verification):
    """Names of the checks that failed."""
    return {figure.check for figure in verification.figures if figure.passed is False}


def figure(verification, check, subject):
    return next(
        figure for figure in verification.figures
        if (figure.check, figure.subject, figure.step) == (check, subject, "onnx")
    )  # fmt: skip


# --- what is right ----------------------------------------------------------------------------


def test_an_artefact_that_is_right(toy):
    spec = toy.write()
    verification = toy.verify()
    assert verification.passed, verification.failures
    assert verification.steps == ["torch", "onnx"]
    assert figure(verification, "SNR against torch", "vocals").value >= 130
    assert figure(verification, "SNR against torch", "vocals").limit == 90
    entry, files, precision = toy.family_module.built[0]
    assert precision == "fp32"
    assert files == {"model": toy.source}
    assert entry.stems == spec.stems
    assert entry.members == {"vocals": "v"}
    path = toy.repository / "toy" / "1" / "verification.json"
    assert json.loads(path.read_text()) == verification.as_dict()
    assert verification_warning(toy.repository, "toy") is None
    assert any("chunk 3 of 3: torch" in text for text in toy.said)


def test_a_second_run_finds_the_same(toy):
    toy.write()
    first, second = toy.verify(), toy.verify()
    assert first.figures == second.figures


def test_a_track_that_is_normalized_and_centred(toy):
    toy.write(normalization="track", tail="centred")
    verification = toy.verify()
    assert verification.passed, verification.failures


def test_half_precision_is_held_to_less(toy):
    toy.write(core_half=True, precision="fp16", name="toy_fp16")
    verification = toy.verify("toy_fp16")
    assert verification.passed, verification.failures
    snr = figure(verification, "SNR against torch", "vocals")
    assert 55 < snr.value < 80
    assert snr.limit == 50
    assert toy.family_module.built[0][2] == "fp32"


def test_half_precision_that_claims_to_be_single(toy):
    toy.write(core_half=True)
    assert "SNR against torch" in failed(toy.verify())


def test_half_precision_on_the_wire(toy):
    toy.write(wire_dtype="fp16")
    verification = toy.verify()
    assert verification.passed, verification.failures
    assert 60 < figure(verification, "SNR against torch", "vocals").value < 80


def test_a_graph_of_one_stem_and_no_batches(toy):
    toy.write(stems=("vocals",), max_batch_size=1)
    verification = toy.verify()
    assert verification.passed, verification.failures
    checks = {figure.check for figure in verification.figures}
    assert "batch against single" not in checks
    assert "sum against mixture" not in checks


def test_songs_of_the_users_own(toy, tmp_path):
    write_dataset(tmp_path / "songs", ("one", "two"), seconds=1.0)
    toy.write(sample_rate=44100)
    verification = toy.verify(audio=tmp_path / "songs")
    assert verification.passed, verification.failures
    subjects = {figure.subject for figure in verification.figures if figure.check == "SDR change"}
    assert subjects == {
        "vocals", "accompaniment", "vocals (one)", "accompaniment (one)", "vocals (two)",
        "accompaniment (two)",
    }  # fmt: skip


def test_songs_of_another_rate(toy, tmp_path):
    write_dataset(tmp_path / "songs", ("one",), seconds=1.0)
    toy.write()
    with pytest.raises(EvaluationDataError, match=r"44100 Hz; model 'toy' is measured on .* 8000"):
        toy.verify(audio=tmp_path / "songs")


# --- what is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "checks"),
    [
        (swapped(), {"SNR against torch", "max abs error", "SDR change"}),
        (on_silence(np.nan), {"finite output"}),
        (on_silence(np.inf), {"finite output"}),
        (on_silence(1e-4), {"peak"}),
        (random_noise(1e-7), {"deterministic"}),
        (leaking_batch(), {"batch against single"}),
        (exploding(), {"peak over input's"}),
        (spike(), {"max abs error"}),
    ],
    ids=[
        "swapped stems", "NaN on silence", "Inf on silence", "sound on silence", "random",
        "batch leaks", "missing epsilon", "spike",
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(toy, spoil, checks):
    toy.write(spoil)
    verification = toy.verify()
    assert not verification.passed
    assert checks <= failed(verification)
    assert verification.failures
    assert "failed its verification" in verification_warning(toy.repository, "toy")


def test_a_leak_between_items_is_found_by_that_check_alone(toy):
    toy.write(leaking_batch())
    assert failed(toy.verify()) <= {"batch against single", "batch max abs difference"}


def test_a_wrong_gain(toy):
    toy.write(gains={"vocals": 0.3001, "accompaniment": 0.7})
    verification = toy.verify()
    assert "SNR against torch" in failed(verification)
    # 20 log10(0.3 / 0.0001)
    assert figure(verification, "SNR against torch", "vocals").value == pytest.approx(69.5, abs=0.1)
    assert any(
        sentence.startswith("onnx SNR against torch vocals: 69.5")
        and sentence.endswith("dB; expected at least 90 dB")
        for sentence in verification.failures
    )


def test_a_jump_at_seams_that_torch_has_too(toy):
    """Chunks whose ends don't meet: graph and torch agree, and the track clicks."""
    envelope = np.linspace(1, -1, CHUNK, dtype=np.float32)
    toy.write(envelope=envelope, overlap=0.0, sample_rate=44100)
    assert "seam step" in failed(toy.verify())


def test_a_dip_at_seams_that_torch_has_too(toy):
    """Edges that don't complete each other: no jump, and the music fades there."""
    ramp = (np.arange(256, dtype=np.float32) + 0.5) / 256
    envelope = np.concatenate([ramp, np.ones(CHUNK - 512, np.float32), ramp[::-1]])
    toy.write(envelope=envelope, overlap=0.0)
    assert failed(toy.verify()) == {"seam energy"}


def test_edges_that_add_up_leave_no_seam(toy):
    ramp = (np.arange(256, dtype=np.float32) + 0.5) / 256
    envelope = np.concatenate([ramp, np.ones(CHUNK - 512, np.float32), ramp[::-1]])
    toy.write(envelope=envelope, overlap=0.0, edge_samples=256, lead_samples=256)
    verification = toy.verify()
    assert verification.passed, verification.failures


def test_stems_that_lose_something_of_the_mixture(toy, monkeypatch):
    """What Spleeter promises by mask_extension=average, and other families don't."""
    gains = {"vocals": 0.3, "accompaniment": 0.69}
    monkeypatch.setitem(GAINS, "accompaniment", 0.69)
    toy.write(gains=gains)
    assert toy.verify().passed
    monkeypatch.setitem(
        sys.modules, "stemserve_export.families.spleeter", sys.modules[toy.family_module.__name__]
    )
    toy.write(gains=gains, family="spleeter", options={"mask_extension": "zeros"})
    assert toy.verify().passed
    toy.write(gains=gains, family="spleeter", options={"mask_extension": "average"})
    assert failed(toy.verify()) == {"sum against mixture"}


def test_a_graph_that_was_changed_after_the_export(toy):
    toy.write()
    path = toy.repository / "toy" / "1" / "model.onnx"
    model = onnx.load(path)
    model.doc_string = "changed"
    onnx.save(model, path)
    assert failed(toy.verify()) == {"graph is the exported one"}


def test_a_graph_that_cannot_be_loaded(toy):
    toy.write()
    (toy.repository / "toy" / "1" / "model.onnx").write_bytes(b"no graph")
    verification = toy.verify()
    assert failed(verification) == {"graph is the exported one", "runs"}
    assert any("ONNX Runtime does not take" in sentence for sentence in verification.failures)


def test_a_graph_that_takes_no_batches(toy):
    spec = toy.write()
    path = toy.repository / "toy" / "1" / "model.onnx"
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, path)
    verification = toy.verify(spec.name)
    assert "runs" in failed(verification)


# --- what cannot be measured ------------------------------------------------------------------


def test_weights_that_changed(toy):
    toy.write()
    toy.source.write_bytes(b"others")
    with pytest.raises(DigestMismatchError):
        toy.verify()


def test_a_record_of_another_model(toy, make_spec):
    spec = toy.write()
    (toy.repository / "toy" / "config.pbtxt").write_text(config_text(replace(spec, overlap=0.5)))
    with pytest.raises(ExportError, match="describe different models"):
        toy.verify()


def test_no_record(toy):
    toy.write()
    (toy.repository / "toy" / "1" / "export.json").unlink()
    with pytest.raises(ExportError, match="Export it again with `stemserve export toy`"):
        toy.verify()


def test_a_damaged_record(toy):
    toy.write()
    (toy.repository / "toy" / "1" / "export.json").write_text("[1")
    with pytest.raises(ExportError, match="cannot be read"):
        toy.verify()


# --- specialists ------------------------------------------------------------------------------


def ensemble(toy, **changes):
    """Two specialists and what joins them."""
    parts = [
        toy.write(name=f"pair_{stem}", stems=(stem,), **changes.get(stem, {})) for stem in GAINS
    ]
    spec = toy.write(name="pair")
    (toy.repository / "pair" / "1" / "model.onnx").unlink()
    (toy.repository / "pair" / "config.pbtxt").write_text(config_text(spec, parts))
    return spec


def test_what_joins_specialists(toy):
    ensemble(toy)
    verification = toy.verify("pair")
    assert verification.passed, verification.failures
    assert verification.graph_sha256 is None
    assert set(verification.parts) == {"pair_vocals", "pair_accompaniment"}
    assert verification_warning(toy.repository, "pair") is None
    toy.write(None, {"vocals": 0.31, "accompaniment": 0.7}, name="pair_vocals",
              stems=("vocals",))  # fmt: skip
    assert "with another graph" in verification_warning(toy.repository, "pair")


def test_a_specialist_of_another_contract(toy):
    ensemble(toy, vocals={"wire_dtype": "fp16"})
    assert failed(toy.verify("pair")) == {"specialist fits"}
