"""A model of specialists: one stem costs one of them."""

import time

import grpc
import numpy as np
import pytest
import soundfile
from support.models import identity_spec, write_identity
from tritonclient.grpc import service_pb2, service_pb2_grpc

from stemserve import AsyncSeparator, Separator
from stemserve.repository import exported_models
from stemserve.server import LocalServer
from stemserve_export.triton_config import config_text

STEMS = ("same", "half")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("specialists")
    parts = [identity_spec(f"pair_{stem}", 16384, stems=(stem,)) for stem in STEMS]
    for part in parts:
        write_identity(folder, part)
    spec = identity_spec("pair", 16384, overlap=0.25, tail="centred")
    (folder / "pair" / "1").mkdir(parents=True)
    (folder / "pair" / "config.pbtxt").write_text(config_text(spec, parts))
    return folder


@pytest.fixture(scope="module")
def server(repository):
    with LocalServer(repository, ["pair"]) as server:
        yield server


@pytest.fixture(scope="module")
def track(tmp_path_factory):
    path = tmp_path_factory.mktemp("track") / "track.wav"
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (60_000, 2)).astype(np.float32)
    soundfile.write(path, samples, 44100, subtype="FLOAT")
    return path


def executions(server):
    """Inferences so far, by model; waits for statistics that trail the last answer."""
    counts = None
    while counts != (counts := _counts(server)):
        time.sleep(0.2)
    return counts


def _counts(server):
    with grpc.insecure_channel(server.url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        statistics = stub.ModelStatistics(service_pb2.ModelStatisticsRequest(), timeout=10)
    return {model.name: model.inference_count for model in statistics.model_stats}


def test_an_ensemble_is_exported_once_its_specialists_are(repository, tmp_path):
    assert exported_models(repository) == ["pair", "pair_half", "pair_same"]
    for name in ("pair", "pair_same"):
        (tmp_path / name / "1").mkdir(parents=True)
        config = (repository / name / "config.pbtxt").read_text()
        (tmp_path / name / "config.pbtxt").write_text(config)
    (tmp_path / "pair_half").mkdir()
    (tmp_path / "pair_half" / "config.pbtxt").write_text(
        (repository / "pair_half" / "config.pbtxt").read_text()
    )
    assert exported_models(tmp_path) == []


def test_a_request_for_one_stem_costs_one_specialist(server, track, tmp_path):
    before = executions(server)
    with Separator(server.url, "pair") as separator:
        result = separator.separate(track, tmp_path, stems=["half"])
    chunks = result.metadata["chunks"]["count"]
    after = executions(server)
    assert after["pair_half"] - before["pair_half"] == chunks > 1
    assert after["pair_same"] == before["pair_same"]
    mixture = soundfile.read(track, dtype="float32")[0]
    stem = soundfile.read(result.stems["half"], dtype="float32")[0]
    assert np.abs(stem - mixture / 2).max() < 1e-6


async def test_all_stems_cost_all_specialists_whichever_client_asks(server, track, tmp_path):
    async with AsyncSeparator(server.url, "pair") as separator:
        assert separator.spec.stems == STEMS
        before = executions(server)
        result = await separator.separate(track, tmp_path)
    after = executions(server)
    chunks = result.metadata["chunks"]["count"]
    for stem in STEMS:
        assert after[f"pair_{stem}"] - before[f"pair_{stem}"] == chunks


def test_specialists_do_not_make_the_choice_of_a_model_ambiguous(server):
    with Separator(server.url) as separator:
        assert separator.spec.name == "pair"
