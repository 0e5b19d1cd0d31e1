"""Every family as users run it today: its own package on the same weights, against what is served.

Weights are seeded, in the published formats, with the published names and shapes: the published
files cannot be had everywhere that tests run.
"""

import random
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import soundfile
import torch
from reference import demucs as demucs_reference
from reference import openunmix as openunmix_reference
from reference import spleeter as spleeter_reference
from support import demucs_checkpoints
from support.seeded import seeded_entry
from support.weights import published_unets

from stemserve import Separator
from stemserve.server import LocalServer
from stemserve_export.catalog import SINGLE_FILE, find_model
from stemserve_export.choices import with_checkpoint, with_name, with_options, with_precision
from stemserve_export.exporter import export_model
from stemserve_export.gate.measures import snr_db
from stemserve_export.gate.signals import rendered_song
from stemserve_export.weights.torch_file import load_plain

RATE = 44100
SMALL_SEGMENT = demucs_checkpoints.SMALL_HTDEMUCS["segment"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def small(folder):
    """A small HTDemucs with short segments: two specialists, and a whole one in half precision."""
    files = {}
    for seed, stem in enumerate(("drums", "vocals")):
        network = demucs_checkpoints.network("HTDemucs", demucs_checkpoints.SMALL_HTDEMUCS, seed)
        files[stem] = demucs_checkpoints.write_safetensors(network, folder / f"{stem}.safetensors")
    bag = find_model("htdemucs_ft")
    bag = replace(bag, stems=tuple(files), files={stem: bag.files[stem] for stem in files})
    whole = with_checkpoint(find_model("htdemucs"), [files["drums"].as_uri()])
    for entry in (
        with_name(with_checkpoint(bag, [folder.as_uri()]), "small_ft"),
        with_precision(with_name(whole, "small"), "fp16", "fp16"),
    ):
        chosen = with_options(entry, {"segment_seconds": str(SMALL_SEGMENT)})
        export_model(chosen, folder / "repository")
    return files


@pytest.fixture(scope="module")
def full(folder):
    """One full-size model of each family that has a published size."""
    names = ("htdemucs", "umxhq", "spleeter_5stems")
    entries = {name: seeded_entry(name, folder / "checkpoints") for name in names}
    for entry in entries.values():
        export_model(entry, folder / "repository")
    return entries


@pytest.fixture(scope="module")
def server(folder, small, full):
    with LocalServer(folder / "repository") as server:
        yield server


@pytest.fixture(scope="module")
def song(folder):
    """42.3 s of rendered music: six chunks of HTDemucs, the last two beyond the end."""
    mixture = rendered_song(int(42.3 * RATE), RATE).mixture
    path = folder / "song.wav"
    soundfile.write(path, mixture.T, RATE, subtype="FLOAT")
    return path, mixture


@pytest.fixture(scope="module")
def excerpt(folder, song):
    """3.7 s of it."""
    mixture = song[1][:, : int(3.7 * RATE)]
    path = folder / "excerpt.wav"
    soundfile.write(path, mixture.T, RATE, subtype="FLOAT")
    return path, mixture


def served(server, model, path, out, **options):
    with Separator(server.url, model) as separator:
        result = separator.separate(path, out, **options)
    return {
        stem: soundfile.read(file, dtype="float32", always_2d=True)[0].T
        for stem, file in result.stems.items()
    }


def worst_db(expected, found):
    assert set(expected) == set(found)
    return min(snr_db(np.asarray(expected[stem]), found[stem]) for stem in expected)


def local(entry, key=SINGLE_FILE):
    return Path(unquote(urlsplit(entry.files[key].source).path))


def test_htdemucs_equals_apply_model_with_a_short_last_chunk(server, full, song, tmp_path):
    path, mixture = song
    entry = full["htdemucs"]
    expected = demucs_reference.separate_track(local(entry), mixture, entry.stems)
    found = served(server, "htdemucs", path, tmp_path)
    assert worst_db(expected, found) >= 90


def test_a_specialist_equals_its_own_checkpoint(server, small, excerpt, tmp_path):
    path, mixture = excerpt
    found = served(server, "small_ft", path, tmp_path)
    for stem, file in small.items():
        expected = demucs_reference.separate_track(
            file, mixture, [stem], segment_seconds=SMALL_SEGMENT
        )
        assert snr_db(expected[stem], found[stem]) >= 90, stem


def test_a_shift_equals_that_of_demucs(server, small, excerpt, tmp_path):
    """One only: demucs' transformer draws from the same generator in every forward pass."""
    path, mixture = excerpt
    network = demucs_reference.load_network(small["vocals"])
    from demucs.apply import apply_model

    wave = torch.from_numpy(mixture)
    mean, std = wave.mean(0).mean(), wave.mean(0).std() + 1e-8
    random.seed(7)
    with torch.no_grad():
        stems = apply_model(network, ((wave - mean) / std)[None], shifts=1)[0] * std + mean
    expected = {"vocals": stems[network.sources.index("vocals")].numpy()}
    options = {"stems": ["vocals"], "shift_seed": 7}
    assert worst_db(expected, served(server, "small_ft", path, tmp_path, shifts=1, **options)) >= 90
    averaged = served(server, "small_ft", path, tmp_path / "two", shifts=2, **options)
    assert worst_db(expected, averaged) < 60


def test_half_precision_in_the_core_and_on_the_wire(server, small, excerpt, tmp_path):
    path, mixture = excerpt
    found = served(server, "small_fp16", path, tmp_path)
    expected = demucs_reference.separate_track(small["drums"], mixture, tuple(found))
    assert 45 <= worst_db(expected, found) <= 75


def test_openunmix_equals_its_package_chunk_by_chunk(server, full, song, tmp_path):
    entry = full["umxhq"]
    states = {stem: load_plain(local(entry, stem), stem) for stem in entry.stems}
    separator = openunmix_reference.published_separator(states, 1)
    with Separator(server.url, "umxhq") as client:
        chunk = client.spec.chunk_samples
    mixture = song[1][:, :chunk]
    path = tmp_path / "chunk.wav"
    soundfile.write(path, mixture.T, RATE, subtype="FLOAT")
    expected = openunmix_reference.separate(separator, torch.from_numpy(mixture)[None])
    found = served(server, "umxhq", path, tmp_path, overlap=0.0)
    assert worst_db({stem: value[0].numpy() for stem, value in expected.items()}, found) >= 100


def test_spleeter_equals_the_published_framing_of_a_whole_track(server, full, song, tmp_path):
    path, mixture = song
    entry = full["spleeter_5stems"]
    unets = published_unets(entry, local(entry))
    stems = spleeter_reference.separate_track(
        torch.from_numpy(mixture), unets, "average", output="softmax"
    )
    expected = {stem: value.numpy() for stem, value in zip(entry.stems, stems, strict=True)}
    assert worst_db(expected, served(server, "spleeter_5stems", path, tmp_path)) >= 100
