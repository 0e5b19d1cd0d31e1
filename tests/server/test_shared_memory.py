"""Samples through shared memory: the same stems, and nothing of it is left whatever happens."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
import soundfile
from support.models import identity_spec
from tritonclient.grpc import service_pb2

from stemserve import AsyncSeparator, Separator
from stemserve.errors import DeadlineError, DiskFullError, InvalidResponseError, ServerError
from stemserve.server import LocalServer
from stemserve.tensors import SharedTensors
from stemserve.triton import Stub


def regions():
    """Regions of clients: stemserve_<32 hex digits>."""
    return {path for path in Path("/dev/shm").glob("stemserve_*") if len(path.name) == 42}


def registered(server):
    with grpc.insecure_channel(server.url) as channel:
        status = Stub(channel).SystemSharedMemoryStatus(
            service_pb2.SystemSharedMemoryStatusRequest()
        )
    return set(status.regions)


def read(path):
    return soundfile.read(path, dtype="float32", always_2d=True)[0]


def write_noise(path, seconds):
    samples = np.random.default_rng(0).normal(0, 0.1, (int(seconds * 44100), 2))
    soundfile.write(path, samples.astype(np.float32), 44100, subtype="FLOAT")
    return path


@pytest.mark.parametrize("model", ["spleeter_2stems", "identity", "identity_edges"])
@pytest.mark.parametrize("overlap", [None, 0.3])
def test_stems_are_the_same(server, tmp_path, model, overlap):
    track = write_noise(tmp_path / "track.wav", 15)
    results = []
    for shared in (False, True):
        with Separator(server.url, model, shared_memory=shared) as separator:
            results.append(separator.separate(track, tmp_path / str(shared), overlap=overlap))
    inline, through_memory = results
    assert inline.metadata["transport"] == "grpc"
    assert through_memory.metadata["transport"] == "shared memory"
    for stem, path in inline.stems.items():
        np.testing.assert_array_equal(read(through_memory.stems[stem]), read(path))
    assert regions() == registered(server) == set()


def test_half_precision(server, tmp_path):
    track = write_noise(tmp_path / "track.wav", 2)
    with Separator(server.url, "identity_half", shared_memory=True) as separator:
        shared = separator.separate(track, tmp_path / "shared", stems=["half"])
    with Separator(server.url, "identity_half") as separator:
        inline = separator.separate(track, tmp_path / "inline", stems=["half"])
    np.testing.assert_array_equal(read(shared.stems["half"]), read(inline.stems["half"]))


def test_async(server, song, tmp_path):
    async def separate():
        async with AsyncSeparator(server.url, "spleeter_2stems", shared_memory=True) as separator:
            return await asyncio.gather(
                *(separator.separate(song, tmp_path / name) for name in ("a", "b"))
            )

    first, second = asyncio.run(separate())
    with Separator(server.url, "spleeter_2stems") as separator:
        expected = separator.separate(song, tmp_path / "inline")
    for stem, path in expected.stems.items():
        np.testing.assert_array_equal(read(first.stems[stem]), read(path))
        np.testing.assert_array_equal(read(second.stems[stem]), read(path))
    assert regions() == registered(server) == set()


def test_cancelled_task(server, tmp_path):
    track = write_noise(tmp_path / "track.wav", 60)

    async def cancel():
        async with AsyncSeparator(server.url, "spleeter_2stems", shared_memory=True) as separator:
            started = asyncio.Event()
            task = asyncio.ensure_future(
                separator.separate(track, tmp_path / "out", progress=lambda *_: started.set())
            )
            await asyncio.wait_for(started.wait(), 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancel())
    assert list((tmp_path / "out").iterdir()) == []
    assert regions() == registered(server) == set()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_client_that_ends_midway_leaves_no_file(repository, tmp_path, how):
    track = write_noise(tmp_path / "track.wav", 240)
    out = tmp_path / "out"
    with LocalServer(repository, ["spleeter_2stems"]) as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "stemserve.cli", "separate", str(track), "--url", server.url,
             "--shared-memory", "--out", str(out)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any(path.stat().st_size > 100_000 for path in out.glob(".*/*.wav")):
                break
            time.sleep(0.02)
        process.send_signal(how)
        process.communicate(timeout=60)
        assert regions() == set()
        if how == signal.SIGINT:
            assert registered(server) == set()
            assert list(out.iterdir()) == []
        # The server is well: what it may still have been writing to is mapped.
        with Separator(server.url) as separator:
            separator.separate(write_noise(tmp_path / "next.wav", 3), tmp_path)


def test_a_request_given_up_keeps_its_memory_mapped(repository, tmp_path):
    """Unmapped while the server still computes into it, the region would kill the server."""
    track = write_noise(tmp_path / "track.wav", 120)
    with LocalServer(repository, ["spleeter_2stems"]) as server:
        with (
            Separator(
                server.url, shared_memory=True, in_flight=8, chunk_timeout_s=0.25
            ) as separator,
            pytest.raises(DeadlineError),
        ):
            separator.separate(track, tmp_path / "out")
        assert regions() == set()
        assert len(registered(server)) == 1
        with Separator(server.url, shared_memory=True) as separator:
            separator.separate(write_noise(tmp_path / "next.wav", 3), tmp_path)


def test_a_server_that_dies_midway(repository, tmp_path):
    track = write_noise(tmp_path / "track.wav", 120)
    with LocalServer(repository, ["spleeter_2stems"]) as server:
        with (
            Separator(server.url, shared_memory=True) as separator,
            pytest.raises(ServerError, match="went away while the track was being separated"),
        ):
            separator.separate(
                track, tmp_path / "out", progress=lambda *_: os.kill(server.pid, signal.SIGKILL)
            )
        assert regions() == set()
        assert list((tmp_path / "out").iterdir()) == []


def test_a_server_that_does_not_share_the_machine(server, monkeypatch, tmp_path):
    """The name of another machine's memory means nothing to a server."""
    registration = SharedTensors.registration

    def elsewhere(self):
        request = registration(self)
        request.key = "/stemserve_of_another_machine"
        return request

    monkeypatch.setattr(SharedTensors, "registration", elsewhere)
    with (
        Separator(server.url, "identity", shared_memory=True) as separator,
        pytest.raises(ServerError, match="cannot map the shared memory of this machine"),
    ):
        separator.separate(write_noise(tmp_path / "track.wav", 1), tmp_path / "out")
    assert regions() == set()


def test_no_room():
    spec = identity_spec(chunk_samples=10**9)
    with pytest.raises(DiskFullError, match=r"'/dev/shm' has no room for \d+ MB"):
        SharedTensors(spec, spec.stems, 1000)
    assert regions() == set()


def test_a_server_that_writes_nothing_is_found_out():
    spec = identity_spec()
    tensors = SharedTensors(spec, spec.stems, 2)
    try:
        _, ticket = tensors.request(np.zeros(spec.tensor_dims, np.float32), None, "1")
        answer = service_pb2.ModelInferResponse()
        for stem in spec.stems:
            answer.outputs.add(name=stem, datatype="FP32", shape=[1, *spec.tensor_dims])
        with pytest.raises(InvalidResponseError, match="NaN or infinite"):
            tensors.receive(answer, ticket)
    finally:
        tensors.close()
