import os
import random
import zipfile

import pytest

from stemserve.errors import CheckpointError
from stemserve_export.weights import archive as archives
from stemserve_export.weights.archive import read_member

MEMBER = "tiny/weights.ckpt"
CONTENT = b"weights " * 1000


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr(MEMBER, CONTENT)
        opened.writestr("tiny/noté.txt", b"a name that is not ASCII")
    return path


def refused(path, member=MEMBER):
    with pytest.raises(CheckpointError) as caught:
        read_member(path, member)
    return str(caught.value)


def test_read_member(archive):
    assert read_member(archive, MEMBER) == CONTENT


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_way_to_compress(tmp_path, method):
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w", method) as opened:
        opened.writestr(MEMBER, CONTENT)
    assert read_member(path, MEMBER) == CONTENT


@pytest.mark.parametrize("member", ["tiny/other.ckpt", "../tiny/weights.ckpt", ""])
def test_a_member_that_is_missing(archive, member):
    assert refused(archive, member) == (
        f"'{archive}' has no member '{member}'; expected the published wheel."
    )


@pytest.mark.parametrize("data", [b"", b"no archive at all", b"PK\x03\x04" + bytes(100)])
def test_no_archive(tmp_path, data):
    path = tmp_path / "w.whl"
    path.write_bytes(data)
    text = refused(path)
    assert text.startswith(f"'{path}' is no readable archive (")
    assert text.endswith("); expected the published wheel.")


def test_an_archive_that_is_missing(tmp_path):
    assert "is no readable archive" in refused(tmp_path / "none.whl")
    assert "is no readable archive" in refused(tmp_path)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_an_archive_that_was_cut(archive, share):
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * share)])
    assert "is no readable archive" in refused(archive)


def test_damage_anywhere_is_refused_or_does_not_touch_the_member(archive):
    """Any byte, at random: never another content, never another exception."""
    data, generator, n_refused = archive.read_bytes(), random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(data)
        damaged[generator.randrange(len(data))] ^= generator.randrange(1, 256)
        archive.write_bytes(damaged)
        try:
            assert read_member(archive, MEMBER) == CONTENT
        except CheckpointError:
            n_refused += 1
    assert n_refused > 100


def test_an_encrypted_member(archive):
    data = bytearray(archive.read_bytes())
    data[6] |= 1  # the flag in the local header, and in the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(data)
    assert "is encrypted" in refused(archive)


def test_a_member_that_unpacks_to_absurd_size(archive, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_MEMBER_BYTES", 7999)
    assert refused(archive) == (
        f"'{MEMBER}' in '{archive}' unpacks to 8000 bytes; expected at most 7999. This is no "
        "checkpoint that we know."
    )


def test_nothing_is_unpacked_to_disk(archive):
    before = os.listdir(archive.parent)  # noqa: PTH208
    read_member(archive, MEMBER)
    assert os.listdir(archive.parent) == before  # noqa: PTH208
