"""The release gate through a real Triton: Spleeter passes, what is corrupt does not."""

import hashlib
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.models import identity_spec, write_identity

from stemserve.server import LocalServer
from stemserve.verification import verification_warning
from stemserve_export.gate.artefact import Artefact
from stemserve_export.gate.checks import check_same
from stemserve_export.gate.figures import Figures
from stemserve_export.gate.gate import GateOptions, verify_model
from stemserve_export.gate.runners import GraphRunner, ServedRunner
from stemserve_export.gate.served_checks import check_ensemble
from stemserve_export.gate.thresholds import thresholds_for
from stemserve_export.triton_config import config_text

MODEL = "spleeter_2stems"


def figures_of(verification, step, check):
    return [
        figure for figure in verification.figures if (figure.step, figure.check) == (step, check)
    ]


@pytest.fixture
def copy(repository, tmp_path):
    """Spleeter in a repository of its own, which tests may spoil."""
    shutil.copytree(repository / MODEL, tmp_path / MODEL)
    return tmp_path


def test_spleeter_from_its_checkpoint_to_what_is_served(copy):
    assert "has not been verified" in verification_warning(copy, MODEL)
    verification = verify_model(copy, MODEL, GateOptions())
    assert verification.passed, verification.failures
    assert verification.steps == ["torch", "onnx", "served"]
    for step in ("onnx", "served"):
        snr = figures_of(verification, step, "SNR against torch")
        assert [figure.subject for figure in snr] == ["vocals", "accompaniment"]
        assert all(figure.value >= 110 for figure in snr)
        assert figures_of(verification, step, "sum against mixture")[0].value >= 110
    assert all(
        figure.value for figure in figures_of(verification, "served", "refused by the server")
    )
    assert len(figures_of(verification, "served", "same bits as the graph")) == 2
    # The rendered song is music to a network that knows music.
    assert all(figure.value > 5 for figure in figures_of(verification, "torch", "SDR"))
    assert "triton 2." in verification.versions["server"]
    assert verification_warning(copy, MODEL) is None
    record = json.loads((copy / MODEL / "1" / "verification.json").read_text())
    digest = hashlib.sha256((copy / MODEL / "1" / "model.onnx").read_bytes()).hexdigest()
    assert record["graph_sha256"] == digest


def test_a_corrupt_spleeter(copy):
    path = copy / MODEL / "1" / "model.onnx"
    model = onnx.load(path)
    # One weight of the largest convolution.
    tensor = max(model.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] += 0.5
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    verification = verify_model(copy, MODEL, GateOptions(quick=True))
    failed = {figure.check for figure in verification.figures if figure.passed is False}
    assert {"graph is the exported one", "SNR against torch"} <= failed
    assert "failed its verification" in verification_warning(copy, MODEL)


# --- a server that does something else than the graph -----------------------------------------


@pytest.fixture(scope="module")
def identities(tmp_path_factory):
    """An ensemble of two specialists."""
    folder = tmp_path_factory.mktemp("identities")
    specs = [identity_spec(f"pair_{stem}", 8192, stems=(stem,)) for stem in ("same", "half")]
    for spec in specs:
        write_identity(folder, spec)
    whole = identity_spec("pair", 8192)
    (folder / "pair" / "1").mkdir(parents=True)
    (folder / "pair" / "config.pbtxt").write_text(config_text(whole, specs))
    return folder, whole, specs


def test_an_ensemble_is_asked_for_all_stems_and_for_one(identities):
    folder, whole, specs = identities
    chunk = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 2, 8192)).astype(np.float32)
    expected = {
        spec.stems[0]: GraphRunner(spec, folder / spec.name / "1" / "model.onnx")(chunk)[0]
        for spec in specs
    }
    artefact = Artefact(folder, whole, {}, {"same": "pair_same", "half": "pair_half"})
    figures = Figures()
    check_ensemble(figures, artefact, None, chunk, expected, thresholds_for(whole))
    assert all(figure.passed for figure in figures.found), figures.found
    assert "one stem costs one model" in {figure.check for figure in figures.found}
    expected["half"] = expected["half"] + np.float32(1e-6)
    figures = Figures()
    check_ensemble(figures, artefact, None, chunk, expected, thresholds_for(whole))
    failed = [figure for figure in figures.found if figure.passed is False]
    assert [(figure.check, figure.subject) for figure in failed] == [
        ("same bits as the graph", "half")
    ]


def test_a_server_of_another_runtime_is_held_to_a_level(identities):
    """As with --url: a GPU's bits are its own, its decibels are not."""
    folder, _, (same, _) = identities
    chunk = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 2, 8192)).astype(np.float32)
    with LocalServer(folder, ["pair_same"]) as server, ServedRunner(server.url, same) as run:
        served = run(chunk)[0]
        assert np.array_equal(served, chunk)
        limits = thresholds_for(same)
        for gain, passed in ((1.0, True), (1.0001, True), (1.1, False)):
            figures = Figures()
            expected = {"same": served * np.float32(gain)}
            check_same(figures, expected, {"same": served}, limits, same_runtime=False)
            assert figures.found[0].passed is passed


# --- serve ------------------------------------------------------------------------------------


def test_serve_warns_of_a_model_that_was_not_verified(identities):
    folder, _, _ = identities
    process = subprocess.Popen(
        [sys.executable, "-m", "stemserve.cli", "serve", "--repository", str(folder),
         "--model", "pair_same", "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline().startswith("Serving pair_same")
        while not process.stdout.readline().startswith("Try:"):
            pass
        time.sleep(0.5)  # until it waits for a signal
    finally:
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert err.splitlines()[0] == (
        "Warning: Model 'pair_same' has not been verified; run `stemserve verify pair_same`."
    )
