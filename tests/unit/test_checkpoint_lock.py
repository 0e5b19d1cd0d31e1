"""Files of which the leading digits of the digest are published: the first fetch pins the rest."""

import hashlib
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from support.loopback import serving
from support.toy_family import ToyFamily, everything, toy_entry, write_weights

from stemserve.errors import DigestMismatchError, DownloadError, ExportError
from stemserve.repository import read_config
from stemserve.spec import ModelSpec
from stemserve_export.catalog import SINGLE_FILE, PinnedFile
from stemserve_export.download import LOCK_NAME, CheckpointLock, fetch
from stemserve_export.exporter import export_model

SOURCE = "https://weights.example/model.pth"


def digest_of(data):
    return hashlib.sha256(data).hexdigest()


DATA = b"weights as they were published"
DIGEST = digest_of(DATA)
# Other bytes of the same published prefix. Two digits are quickly found; eight take 2^32 attempts.
PREFIX = DIGEST[:2]
OTHERS = next(
    data
    for data in (f"forged weights {number}".encode() for number in itertools.count())
    if digest_of(data).startswith(PREFIX)
)


@pytest.fixture
def published():
    """A file of which only a prefix of the digest is published."""
    return PinnedFile(SOURCE, sha256_prefix=PREFIX)


@pytest.fixture
def serve(monkeypatch):
    """Serve bytes at SOURCE until the next call."""
    get = requests.get

    def fetch_from(url):
        monkeypatch.setattr(requests, "get", lambda source, **options: get(url, **options))

    servers = []

    def start(data):
        context = serving(lambda request: request.reply(200, data))
        server = context.__enter__()
        servers.append(context)
        fetch_from(server.url)
        return server

    yield start
    for context in servers:
        context.__exit__(None, None, None)


@pytest.fixture
def get(tmp_path):
    def run(file, cache="cache"):
        return fetch(file, cache=tmp_path / cache, report=lambda text: None)

    return run


@pytest.fixture
def lock(tmp_path):
    return CheckpointLock(tmp_path)


# --- the published prefix -------------------------------------------------------------------


def test_a_file_of_the_published_prefix_is_taken(serve, get, published):
    server = serve(DATA)
    assert get(published).read_bytes() == DATA
    assert get(published).read_bytes() == DATA
    assert len(server.seen) == 1


@pytest.mark.parametrize("prefix", [DIGEST[:8], DIGEST[:63], DIGEST])
def test_a_file_of_another_prefix_is_refused(serve, get, published, prefix, tmp_path):
    serve(OTHERS)
    with pytest.raises(DigestMismatchError) as caught:
        get(replace(published, sha256_prefix=prefix))
    text = str(caught.value)
    assert f"has the sha256 {digest_of(OTHERS)}; expected {prefix}." in text
    assert f"It is not the published file '{SOURCE}'" in text
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_digits_further_back_do_not_count(serve, get, published):
    serve(DATA)
    with pytest.raises(DigestMismatchError):
        get(replace(published, sha256_prefix=DIGEST[1:9]))


# --- the lock -------------------------------------------------------------------------------


def test_what_came_is_recorded_once(lock, published):
    assert lock.pinned(published) == published
    lock.pin(published, DIGEST)
    assert json.loads(lock.path.read_text()) == {SOURCE: DIGEST}
    assert lock.pinned(published) == replace(published, sha256=DIGEST)
    lock.pin(published, digest_of(OTHERS))
    assert lock.pinned(published).sha256 == DIGEST
    assert [path.name for path in lock.path.parent.iterdir()] == [LOCK_NAME]


def test_several_files_are_recorded_side_by_side(lock, published):
    other = replace(published, source="https://weights.example/other.pth")
    lock.pin(other, digest_of(OTHERS))
    lock.pin(published, DIGEST)
    assert json.loads(lock.path.read_text()) == {
        SOURCE: DIGEST, other.source: digest_of(OTHERS),
    }  # fmt: skip
    assert lock.path.read_text().index(SOURCE) < lock.path.read_text().index(other.source)


def test_files_that_are_pinned_in_full_are_not_recorded(lock):
    whole = PinnedFile(SOURCE, DIGEST)
    lock.pin(whole, DIGEST)
    assert not lock.path.exists()
    lock.path.write_text(json.dumps({SOURCE: "0" * 64}))
    assert lock.pinned(whole) == whole


def test_other_bytes_of_the_same_prefix_are_refused_once_locked(serve, get, lock, published):
    """The prefix alone would let them through: this is what the lock is for."""
    serve(OTHERS)
    assert get(published, "unlocked").read_bytes() == OTHERS
    lock.pin(published, DIGEST)
    with pytest.raises(DigestMismatchError) as caught:
        get(lock.pinned(published), "locked")
    assert f"has the sha256 {digest_of(OTHERS)}; expected {DIGEST}." in str(caught.value)


def test_a_cached_copy_of_the_same_prefix_is_refused_once_locked(serve, get, lock, published):
    """The cache is the user's, the lock the repository's: they may be of different days."""
    serve(OTHERS)
    assert get(published).read_bytes() == OTHERS
    lock.pin(published, DIGEST)
    serve(DATA)
    assert get(lock.pinned(published)).read_bytes() == DATA
    serve(OTHERS)
    assert get(lock.pinned(published)).read_bytes() == DATA  # and is kept from then on


def test_a_copy_that_was_fetched_before_the_lock_is_kept(serve, get, lock, published):
    server = serve(DATA)
    path = get(published)
    lock.pin(published, DIGEST)
    assert get(lock.pinned(published)) == path
    assert len(server.seen) == 1


def test_a_lock_that_contradicts_the_published_prefix(lock, published):
    lock.path.write_text(json.dumps({SOURCE: "f" * 64}))
    assert not DIGEST.startswith("f")
    with pytest.raises(DigestMismatchError) as caught:
        lock.pinned(published)
    assert str(caught.value) == (
        f"'{lock.path}' pins '{SOURCE}' to {'f' * 64}, which contradicts the published prefix "
        f"{PREFIX}; find out who changed it, and remove the entry."
    )


@pytest.mark.parametrize("text", ["", "{", "\x00", '{"a": '])
def test_a_lock_file_that_is_damaged(lock, published, text):
    lock.path.write_text(text)
    for use in (lambda: lock.pinned(published), lambda: lock.pin(published, DIGEST)):
        with pytest.raises(DownloadError) as caught:
            use()
        sentence = str(caught.value)
        assert sentence.startswith(f"The lock file '{lock.path}' cannot be read (")
        assert sentence.endswith("); restore it, or remove it to pin anew what is published.")
    assert lock.path.read_text() == text  # it is not overwritten


def test_a_lock_file_that_is_no_text(lock, published):
    lock.path.write_bytes(b"\xff\xfe")
    with pytest.raises(DownloadError, match="cannot be read"):
        lock.pinned(published)


@pytest.mark.parametrize(
    "content",
    [[], "x", 7, None, {SOURCE: 7}, {SOURCE: ""}, {SOURCE: DIGEST[:8]}, {SOURCE: DIGEST.upper()}],
    ids=str,
)
def test_a_lock_file_of_something_else(lock, published, content):
    """A digest that was cut would pin less than it seems to."""
    lock.path.write_text(json.dumps(content))
    with pytest.raises(DownloadError) as caught:
        lock.pinned(published)
    assert str(caught.value) == (
        f"The lock file '{lock.path}' holds no mapping of sources to digests; restore it, or "
        "remove it to pin anew what is published."
    )


# --- through the export ---------------------------------------------------------------------


@pytest.fixture
def family(monkeypatch, tmp_path):
    return ToyFamily.installed(monkeypatch, tmp_path)


@pytest.fixture
def weights(tmp_path):
    return write_weights(tmp_path)[SINGLE_FILE]


@pytest.fixture
def entry(weights):
    weights.write_bytes(DATA)
    files = {SINGLE_FILE: PinnedFile(weights.as_uri(), sha256_prefix=PREFIX)}
    return replace(toy_entry({SINGLE_FILE: weights}), files=files)


@pytest.fixture
def repository(tmp_path):
    return tmp_path / "model_repository"


def export(entry, repository):
    return export_model(entry, repository, report=lambda text: None)


def test_the_first_export_pins_what_came(entry, family, repository, weights):
    assert export(entry, repository).built
    locked = json.loads((repository / LOCK_NAME).read_text())
    assert locked == {weights.as_uri(): DIGEST}
    [file] = ModelSpec.from_config(read_config(repository, "tiny")).checkpoint.files
    assert file.sha256 == DIGEST
    before = everything(repository)
    assert not export(entry, repository).built
    assert everything(repository) == before


def test_an_export_refuses_what_the_lock_does_not_pin(entry, family, repository, weights):
    export(entry, repository)
    before = everything(repository)
    weights.write_bytes(OTHERS)
    with pytest.raises(DigestMismatchError, match=f"expected {DIGEST}"):
        export(replace(entry, version=3), repository)
    assert everything(repository) == before
    assert len(family.builds) == 1


@pytest.mark.parametrize("where", ["build_failure", "export_failure"])
def test_an_export_that_fails_pins_nothing(entry, family, repository, where):
    setattr(family, where, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        export(entry, repository)
    assert not (repository / LOCK_NAME).exists()


def test_an_export_that_fails_in_its_last_step_pins_nothing(entry, family, repository, monkeypatch):
    original = Path.rename

    def fail(self, target):
        if self.name == "artefact":
            raise PermissionError(13, "Permission denied")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ExportError):
        export(entry, repository)
    assert not (repository / LOCK_NAME).exists()


def test_a_damaged_lock_stops_an_export_before_anything_is_made(entry, family, repository):
    repository.mkdir()
    (repository / LOCK_NAME).write_text("{")
    with pytest.raises(DownloadError, match="The lock file"):
        export(entry, repository)
    assert [path.name for path in repository.iterdir()] == [LOCK_NAME]
    assert family.builds == []
