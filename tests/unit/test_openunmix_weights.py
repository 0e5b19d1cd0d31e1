"""Open-Unmix checkpoints: what is read, and what is refused with which sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.openunmix_checkpoints import (
    SMALL_HIDDEN,
    STEMS,
    UMXHQ_HIDDEN,
    UMXL_HIDDEN,
    seeded_state,
    write_checkpoints,
)
from torch import Tensor

from stemserve.errors import CheckpointError
from stemserve_export.weights.openunmix import read_target, training_folder

Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize("hidden", [UMXHQ_HIDDEN, UMXL_HIDDEN, SMALL_HIDDEN])
def test_published_format_is_read(tmp_path: Path, hidden: int) -> None:
    path = write_checkpoints(tmp_path, hidden, ["drums"])["drums"]
    weights = read_target(path, "drums")
    assert (weights.hidden, weights.max_bin, weights.layers) == (hidden, 1487, 3)
    written = seeded_state(STEMS.index("drums") + 1, hidden)
    trained = {name for name in written if not name.endswith("num_batches_tracked")}
    assert set(weights.tensors) == trained
    for name in trained:
        assert torch.equal(weights.tensors[name], written[name])


def test_size_of_a_published_umxhq_file(tmp_path: Path) -> None:
    """The catalogue's 35,637,796 bytes: tensors and window, and a few kB of names."""
    path = write_checkpoints(tmp_path, UMXHQ_HIDDEN, ["vocals"])["vocals"]
    assert abs(path.stat().st_size - 35_637_796) < 10_000


def test_other_depth_and_bandwidth_are_read_from_the_shapes(tmp_path: Path) -> None:
    path = write_checkpoints(tmp_path, 32, ["bass"], max_bin=700, layers=2)["bass"]
    weights = read_target(path, "bass")
    assert (weights.hidden, weights.max_bin, weights.layers) == (32, 700, 2)


def _replace(name: str, value: Tensor) -> Change:
    return lambda state: state.update({name: value})


def _remove(part: str) -> Change:
    def change(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if part in name]:
            del state[name]

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_remove("fc1.weight"), r"has no tensor 'fc1\.weight'; an Open-Unmix has one"),
        (_remove("bn2.running_mean"), r"has no tensor 'bn2\.running_mean'"),
        (_remove("_reverse"), r"has no tensor 'lstm\.weight_ih_l0_reverse'; a bidirectional"),
        (_remove("lstm"), r"has no tensor 'lstm\.weight_ih_l0'"),
        (
            _replace("fc3.weight", torch.zeros(2 * 513, SMALL_HIDDEN)),
            r"'fc3\.weight' of shape \(1026, 16\); expected \(4098, 16\).*FFT of 4096 samples",
        ),
        (
            _replace("fc1.weight", torch.zeros(SMALL_HIDDEN, 1487)),
            r"'fc1\.weight' of shape \(16, 1487\); expected \(16, 2974\).*stereo",
        ),
        (_replace("fc1.weight", torch.zeros(5)), r"of shape \(5,\); expected 2 axes"),
        (_replace("input_mean", torch.zeros(0)), r"of shape \(0,\); expected 1 axes"),
        (_replace("input_mean", torch.zeros(3000)), r"'input_scale' of shape \(1487,\)"),
        (
            _replace("bn1.weight", torch.full((SMALL_HIDDEN,), torch.nan)),
            r"has NaN or infinity in 'bn1\.weight'",
        ),
        (
            _replace("bn1.weight", torch.ones(SMALL_HIDDEN, dtype=torch.int64)),
            r"'bn1\.weight' as torch\.int64; expected real numbers",
        ),
        (
            _replace("bn3.running_var", -torch.ones(4098)),
            r"negative variances in bn3\.running_var",
        ),
        (_replace("fc4.weight", torch.zeros(3)), r"has 'fc4\.weight', which no Open-Unmix has"),
        (_replace("sample_rate", torch.tensor(16000.0)), r"is for 16000 Hz; expected 44100 Hz"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, change: Change, sentence: str) -> None:
    state = seeded_state(1, SMALL_HIDDEN)
    change(state)
    path = tmp_path / "vocals.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=sentence):
        read_target(path, "vocals")


def test_more_bins_than_the_transform_has_are_refused(tmp_path: Path) -> None:
    path = write_checkpoints(tmp_path, SMALL_HIDDEN, ["vocals"], max_bin=2050)["vocals"]
    with pytest.raises(CheckpointError, match=r"looks at 2050 bins; .* has 2049"):
        read_target(path, "vocals")


class _Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("/tmp/stemserve-was-here"),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "vocals.pth"
    torch.save({**seeded_state(1, SMALL_HIDDEN), "extra": _Harmful()}, path)
    with pytest.raises(CheckpointError, match="Nothing in it was run"):
        read_target(path, "vocals")
    assert not Path("/tmp/stemserve-was-here").exists()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_checkpoints(tmp_path, SMALL_HIDDEN, ["vocals"])["vocals"]
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"of 'vocals' .* cannot be read as plain weights"):
        read_target(path, "vocals")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder as Open-Unmix's train.py leaves it."""
    settings = {"sample_rate": 44100, "nfft": 4096, "nhop": 1024, "nb_channels": 2}
    (tmp_path / "separator.json").write_text(json.dumps(settings))
    for stem in ("vocals", "other"):
        torch.save(seeded_state(1, SMALL_HIDDEN), tmp_path / f"{stem}.pth")
        (tmp_path / f"{stem}.chkpnt").write_bytes(b"optimiser")
        arguments = {"nfft": 4096, "nhop": 1024, "nb_channels": 2, "unidirectional": False}
        (tmp_path / f"{stem}.json").write_text(json.dumps({"args": arguments, "epochs": 3}))
    return tmp_path


def test_training_folder(trained: Path) -> None:
    files = training_folder(trained, ["other", "vocals"])
    assert files == {"other": trained / "other.pth", "vocals": trained / "vocals.pth"}


def _rewrite(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    content.get("args", content).update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("separator.json", {"nfft": 2048}, r"separator\.json' says nfft = 2048; only nfft = 4096"),
        ("separator.json", {"sample_rate": 16000}, "sample_rate = 16000; only sample_rate = 44100"),
        ("other.json", {"nhop": 512}, r"other\.json' says nhop = 512"),
        ("other.json", {"unidirectional": True}, "unidirectional = True"),
    ],
)
def test_training_for_another_transform_is_refused(
    trained: Path, file: str, changes: dict[str, object], sentence: str
) -> None:
    _rewrite(trained / file, **changes)
    with pytest.raises(CheckpointError, match=sentence):
        training_folder(trained, ["vocals", "other"])


def test_incomplete_training_folder_is_refused(trained: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds 0 checkpoints for 'bass'; .* bass\.pth"):
        training_folder(trained, ["bass"])
    (trained / "vocals.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"vocals\.json' cannot be read"):
        training_folder(trained, ["vocals"])
    (trained / "separator.json").unlink()
    with pytest.raises(CheckpointError, match=r"separator\.json' cannot be read"):
        training_folder(trained, ["vocals"])
