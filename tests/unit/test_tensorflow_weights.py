"""Reading TensorFlow's checkpoints: right, and with a sentence where they are wrong or hostile."""

import base64
import io
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support.tensorflow_checkpoints import (
    DATA_NAME,
    DT_FLOAT,
    bundle,
    entry,
    field,
    header,
    masked_crc,
    table,
    write_archive,
    write_folder,
)

from stemserve.errors import CheckpointError
from stemserve_export.weights.tensorflow import read_arrays

DAMAGED = "damaged|cut short|cannot be read"


def tensors(count=30) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    named = {
        f"conv2d_{n}/{kind}": rng.standard_normal(shape).astype(np.float32)
        for n in range(count)
        for kind, shape in (("kernel", (3, 2, 4, 5)), ("bias", (5,)))
    }
    return {**named, "global_step": np.array(7), "scalar": np.array(2.5, dtype=np.float32)}


def raised(named):
    """The same names with other values."""
    return {name: np.add(array, 1, dtype=array.dtype) for name, array in named.items()}


def floats(named):
    return {name: array for name, array in named.items() if array.dtype == np.float32}


def assert_same(read, written) -> None:
    assert set(read) == set(written)
    for name, array in written.items():
        assert read[name].dtype == np.float32
        assert read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)


def one_tensor(tmp_path, value: bytes, data: bytes, key=b"w") -> Path:
    """A checkpoint with one entry of the caller's."""
    index = table({b"": header(), key: value})
    return write_folder(tmp_path, {"model.index": index, DATA_NAME: data})


def test_what_tensorflow_itself_wrote(tmp_path) -> None:
    """Written by tf.compat.v1.train.Saver of TensorFlow 2.21."""
    text = (Path(__file__).parent / "data/tensorflow_2_21_checkpoint.tar.gz.base64").read_text()
    archive = tmp_path / "checkpoint.tar.gz"
    archive.write_bytes(base64.b64decode(text))
    expected = {"scalar": np.float32(2.5), "empty": np.zeros((0, 3), np.float32)}
    for n in range(24):
        scope = f"conv2d_{n}" if n else "conv2d"
        expected[f"{scope}/kernel"] = np.arange(12, dtype=np.float32).reshape(3, 2, 1, 2) + n * 100
        expected[f"{scope}/bias"] = np.arange(2, dtype=np.float32) + n * 100
    assert_same(read_arrays(archive), expected)


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_archive(tmp_path, mode) -> None:
    written = tensors()
    archive = write_archive(tmp_path / "4stems.tar.gz", bundle(written), mode)
    assert_same(read_arrays(archive), floats(written))


def test_archive_whose_members_lie_in_a_folder(tmp_path) -> None:
    written = tensors(2)
    files = {f"./4stems/{name}": content for name, content in bundle(written).items()}
    assert_same(read_arrays(write_archive(tmp_path / "a.tar.gz", files)), floats(written))


def test_folder_and_path_of_the_index(tmp_path) -> None:
    written = tensors(2)
    folder = write_folder(tmp_path / "2stems", bundle(written))
    assert_same(read_arrays(folder), floats(written))
    assert_same(read_arrays(folder / "model.index"), floats(written))


def test_latest_of_several_checkpoints(tmp_path) -> None:
    old, new = tensors(1), raised(tensors(1))
    files = {
        name.replace("model", f"model.ckpt-{step}"): content
        for step, written in ((100, old), (200, new))
        for name, content in bundle(written).items()
        if name != "checkpoint"
    }
    files["checkpoint"] = (
        b'model_checkpoint_path: "/home/somebody/run/model.ckpt-200"\n'
        b'all_model_checkpoint_paths: "/home/somebody/run/model.ckpt-100"\n'
    )
    folder = write_folder(tmp_path / "run", files)
    assert_same(read_arrays(folder), floats(new))
    assert_same(read_arrays(folder / "model.ckpt-100.index"), floats(old))
    (folder / "checkpoint").unlink()
    with pytest.raises(CheckpointError, match=r"has 2 files \.index, and no file 'checkpoint'"):
        read_arrays(folder)


def test_what_macos_puts_beside_a_file_is_no_checkpoint(tmp_path) -> None:
    written = tensors(1)
    files = {"._model.index": b"\0\5\x16\7", "._checkpoint": b"\0\5\x16\7", **bundle(written)}
    assert_same(read_arrays(write_archive(tmp_path / "a.tar.gz", files)), floats(written))


def test_shards(tmp_path) -> None:
    written = tensors()
    assert_same(read_arrays(write_folder(tmp_path, bundle(written, shards=3))), floats(written))


def test_big_endian(tmp_path) -> None:
    written = tensors(2)
    folder = write_folder(tmp_path, bundle(written, big_endian=True))
    assert_same(read_arrays(folder), floats(written))


def test_only_what_is_wanted_is_read(tmp_path) -> None:
    written = tensors(2)
    folder = write_folder(tmp_path, bundle(written))
    read = read_arrays(folder, lambda name: name.endswith("/bias"))
    assert sorted(read) == ["conv2d_0/bias", "conv2d_1/bias"]
    with pytest.raises(CheckpointError, match="none of the float32 tensors"):
        read_arrays(folder, lambda name: name == "elsewhere")


# --- damage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.index", DATA_NAME])
def test_a_flipped_bit_anywhere_is_noticed_or_harmless(tmp_path, name) -> None:
    written = tensors(3)
    files = bundle(written)
    noticed = 0
    for position in range(0, len(files[name]), 7):
        content = bytearray(files[name])
        content[position] ^= 0x10
        folder = write_folder(tmp_path, {**files, name: bytes(content)})
        try:
            assert_same(read_arrays(folder), floats(written))
        except CheckpointError:
            noticed += 1
    positions = len(range(0, len(files[name]), 7))
    # Padding of the footer, the empty block of meta data, and the step counter's value, unread.
    assert noticed >= positions - 12


@pytest.mark.parametrize("name", ["model.index", DATA_NAME])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, name) -> None:
    files = bundle(tensors(3))
    size = len(files[name])
    for end in (*range(0, size, size // 40), size - 1):
        folder = write_folder(tmp_path, {**files, name: files[name][:end]})
        with pytest.raises(CheckpointError, match=DAMAGED):
            read_arrays(folder)


def test_an_archive_cut_short_anywhere_is_refused(tmp_path) -> None:
    written = tensors(10)
    archive = write_archive(tmp_path / "a.tar.gz", bundle(written))
    content = archive.read_bytes()
    for end in range(0, len(content) - 200, len(content) // 40):
        archive.write_bytes(content[:end])
        with pytest.raises(CheckpointError, match=f"{DAMAGED}|no '"):
            read_arrays(archive)


def test_flipped_bits_in_an_archive_are_noticed_or_harmless(tmp_path) -> None:
    written = tensors(1)
    archive = write_archive(tmp_path / "a.tar", bundle(written), "w")
    content = archive.read_bytes()
    noticed = 0
    for position in range(0, len(content) - 1024, 11):
        damaged = bytearray(content)
        damaged[position] ^= 0x40
        archive.write_bytes(damaged)
        try:
            assert_same(read_arrays(archive), floats(written))
        except CheckpointError:
            noticed += 1
    assert noticed


def test_wrong_values_are_named(tmp_path) -> None:
    files = bundle(tensors(3))
    content = bytearray(files[DATA_NAME])
    content[10] ^= 1
    folder = write_folder(tmp_path, {**files, DATA_NAME: bytes(content)})
    with pytest.raises(
        CheckpointError, match=r"'conv2d_0/bias' in 'model\.data.* not have the checksum"
    ):
        read_arrays(folder)


def test_a_wrong_block_of_the_index_is_told(tmp_path) -> None:
    files = bundle(tensors(3))
    content = bytearray(files["model.index"])
    content[40] ^= 1
    folder = write_folder(tmp_path, {**files, "model.index": bytes(content)})
    with pytest.raises(CheckpointError, match=r"block of 'model\.index' does not have the check"):
        read_arrays(folder)


def test_a_checkpoint_that_was_being_written_is_refused(tmp_path) -> None:
    files = bundle(tensors(3))
    del files["model.index"]
    with pytest.raises(CheckpointError, match=r"has 0 files \.index"):
        read_arrays(write_folder(tmp_path / "a", files))
    files = bundle(tensors(3), shards=2)
    del files["model.data-00001-of-00002"]
    with pytest.raises(CheckpointError, match=r"has no 'model\.data-00001-of-00002'"):
        read_arrays(write_folder(tmp_path / "b", files))


def test_data_of_another_checkpoint_is_refused(tmp_path) -> None:
    files = bundle(tensors(3))
    other = bundle(raised(tensors(3)))
    folder = write_folder(tmp_path, {**files, DATA_NAME: other[DATA_NAME]})
    with pytest.raises(CheckpointError, match="belongs to another index"):
        read_arrays(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(tmp_path, value) -> None:
    folder = write_folder(tmp_path, bundle({"w": np.array([1, value], dtype=np.float32)}))
    with pytest.raises(CheckpointError, match=r"'w' in .* has NaN or infinity"):
        read_arrays(folder)


# --- other files, and hostile ones ----------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"RIFF" + bytes(2000), bytes(100_000)])
def test_another_file_is_refused(tmp_path, content) -> None:
    (tmp_path / "a.index").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"'a\.index' is no index of a TensorFlow checkpoint"):
        read_arrays(tmp_path / "a.index")
    (tmp_path / "a.tar.gz").write_bytes(content)
    # Zeros are an empty archive.
    with pytest.raises(CheckpointError, match=r"cannot be read as a Ten|has 0 files \.index"):
        read_arrays(tmp_path / "a.tar.gz")


def test_a_file_that_is_not_there_is_told(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read .*No such file"):
        read_arrays(tmp_path / "a.tar.gz")
    with pytest.raises(CheckpointError, match=r"has no 'a\.index'"):
        read_arrays(tmp_path / "a.index")


def test_compressed_blocks_are_refused(tmp_path) -> None:
    index = table({b"": header(), b"w": entry(DT_FLOAT, [1], 0, 4, 0)}, compression=1)
    folder = write_folder(tmp_path, {"model.index": index, DATA_NAME: bytes(4)})
    with pytest.raises(CheckpointError, match="is compressed"):
        read_arrays(folder)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        # A length that lies must not cost memory: each of these asks for terabytes or the past.
        (entry(DT_FLOAT, [1 << 40], 0, 1 << 42, 0), "cut short, or belongs to another index"),
        (entry(DT_FLOAT, [1 << 20, 1 << 20], 0, 8, 0), "which cannot be"),
        (entry(DT_FLOAT, [2], 1 << 40, 8, 0), "cut short, or belongs to another index"),
        (entry(DT_FLOAT, [2], -8, 8, 0), "which cannot be"),
        (entry(DT_FLOAT, [-2], 0, 8, 0), "none negative"),
        (entry(DT_FLOAT, [-1, -2], 0, 8, 0), "none negative"),
        (entry(DT_FLOAT, [1] * 40, 0, 4, 0), "at most 8 sizes"),
        (entry(DT_FLOAT, [2], 0, 8, 0, shard=3), "data file 3 of 1"),
        (entry(DT_FLOAT, [2], 0, 8, 0, shard=-1), "data file -1 of 1"),
        (entry(DT_FLOAT, [2], 0, 8, 0, sliced=True), "stored in slices"),
        (entry(DT_FLOAT, [2], 0, 8, 0)[:-2], "cannot be decoded"),
        (b"\xff" * 30, "cannot be decoded"),
    ],
)
def test_hostile_entries_are_refused_without_memory(tmp_path, value, message) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message):
        read_arrays(one_tensor(tmp_path, value, bytes(16)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_tensors_that_share_bytes_are_refused(tmp_path) -> None:
    """Ten thousand entries over one large tensor would unfold into terabytes."""
    data = bytes(64)
    value = entry(DT_FLOAT, [16], 0, 64, masked_crc(data))
    index = table({b"": header(), b"a": value, b"b": value})
    folder = write_folder(tmp_path, {"model.index": index, DATA_NAME: data})
    with pytest.raises(CheckpointError, match="bytes 64 to 64 are left"):
        read_arrays(folder)


@pytest.mark.parametrize("shards", [0, -1, 1 << 30])
def test_absurd_numbers_of_shards_are_refused(tmp_path, shards) -> None:
    index = table({b"": header(shards), b"w": entry(DT_FLOAT, [1], 0, 4, 0)})
    folder = write_folder(tmp_path, {"model.index": index, DATA_NAME: bytes(4)})
    with pytest.raises(CheckpointError, match=f"has {shards} data files"):
        read_arrays(folder)


def test_keys_out_of_order_or_too_long_are_refused(tmp_path) -> None:
    value = entry(DT_FLOAT, [1], 0, 4, 0)
    for entries in ({b"b": value, b"a": value}, {b"x" * 2000: value}):
        folder = write_folder(tmp_path, {"model.index": table(entries), DATA_NAME: bytes(4)})
        with pytest.raises(CheckpointError, match="contradict each other"):
            read_arrays(folder)


def test_a_table_without_header_is_refused(tmp_path) -> None:
    index = table({b"w": entry(DT_FLOAT, [1], 0, 4, 0)})
    folder = write_folder(tmp_path, {"model.index": index, DATA_NAME: bytes(4)})
    with pytest.raises(CheckpointError, match="has no header"):
        read_arrays(folder)


def test_a_name_that_is_no_text_is_refused(tmp_path) -> None:
    path = one_tensor(tmp_path, entry(DT_FLOAT, [1], 0, 4, 0), bytes(4), key=b"\xff\xfe")
    with pytest.raises(CheckpointError, match="whose name is no text"):
        read_arrays(path)


def test_unknown_fields_are_skipped(tmp_path) -> None:
    data = np.float32([3]).tobytes()
    value = entry(DT_FLOAT, [1], 0, 4, masked_crc(data)) + field(90, b"later") + field(91, 5)
    assert read_arrays(one_tensor(tmp_path, value, data))["w"] == 3


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.index", tarfile.SYMTYPE),
        ("model.index", tarfile.LNKTYPE),
        ("other", tarfile.CHRTYPE),
        ("other", tarfile.FIFOTYPE),
        ("/etc/model.index", tarfile.REGTYPE),
        ("a/../../model.index", tarfile.REGTYPE),
    ],
)
def test_hostile_members_are_refused(tmp_path, name, kind) -> None:
    path = write_archive(tmp_path / "a.tar", bundle(tensors(1)), "w")
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo(name)
        member.type = kind
        member.linkname = "/etc/passwd"
        archive.addfile(member, io.BytesIO())
    with pytest.raises(CheckpointError, match="Do not trust this file"):
        read_arrays(path)


def test_huge_members_are_refused(tmp_path) -> None:
    path = tmp_path / "a.tar"
    member = tarfile.TarInfo("model.data-00000-of-00001")
    member.size = 5 << 30
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(CheckpointError, match="a member of 5368709120 bytes"):
        read_arrays(path)


def test_a_huge_index_is_refused(tmp_path) -> None:
    files = {**bundle(tensors(1)), "model.index": bytes((16 << 20) + 1)}
    with pytest.raises(CheckpointError, match="the index of a checkpoint has at most"):
        read_arrays(write_folder(tmp_path, files))
