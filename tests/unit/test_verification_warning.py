"""What `stemserve serve` says of a model's report."""

import hashlib
import json

import pytest

from stemserve.errors import ModelFileMissingError
from stemserve.verification import verification_warning

GRAPH = b"graph"
SHA256 = hashlib.sha256(GRAPH).hexdigest()
REPORT = {
    "report_version": 1, "passed": True, "failures": [], "graph_sha256": SHA256, "parts": {},
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """Write a model with a report; keywords change it, None leaves it out."""

    def write(report, version="1", name="toy", config=""):
        folder = tmp_path / name / version
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "config.pbtxt").write_text(f'name: "{name}"\n{config}')
        if not config:
            (folder / "model.onnx").write_bytes(GRAPH)
        if report is not None:
            text = report if isinstance(report, str) else json.dumps(report)
            (folder / "verification.json").write_text(text)
        return folder

    return write


def test_a_report_in_order(model, tmp_path):
    model(REPORT)
    assert verification_warning(tmp_path, "toy") is None


def test_no_report(model, tmp_path):
    model(None)
    assert verification_warning(tmp_path, "toy") == (
        "Model 'toy' has not been verified; run `stemserve verify toy`."
    )


def test_a_report_of_an_older_version_of_the_model(model, tmp_path):
    model(REPORT, "9")
    model(None, "10")
    assert "has not been verified" in verification_warning(tmp_path, "toy")


def test_a_report_that_failed(model, tmp_path):
    folder = model({**REPORT, "passed": False, "failures": ["a", "b"]})
    assert verification_warning(tmp_path, "toy") == (
        f"Model 'toy' failed its verification in 2 of its checks (see "
        f"'{folder}/verification.json'); export it again, then run `stemserve verify toy`."
    )


def test_a_report_of_another_graph(model, tmp_path):
    folder = model(REPORT)
    (folder / "model.onnx").write_bytes(b"other graph")
    assert verification_warning(tmp_path, "toy") == (
        "Model 'toy' was verified with another graph than the one here; run `stemserve verify toy`."
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[1]", '{"passed": true}', json.dumps({**REPORT, "failures": None})]
)
def test_a_report_that_is_damaged(model, tmp_path, text):
    model(text)
    assert "cannot be read" in verification_warning(tmp_path, "toy")


def test_a_report_of_a_newer_stemserve(model, tmp_path):
    model({**REPORT, "report_version": 2})
    assert "has the version 2, not 1" in verification_warning(tmp_path, "toy")


def test_an_ensemble_answers_for_its_specialists(model, tmp_path):
    model(REPORT, name="part")
    step = 'ensemble_scheduling { step { model_name: "part" model_version: -1 } }'
    model({**REPORT, "graph_sha256": None, "parts": {"part": SHA256}}, name="whole", config=step)
    assert verification_warning(tmp_path, "whole") is None
    (tmp_path / "part" / "1" / "model.onnx").write_bytes(b"other graph")
    assert "with another graph" in verification_warning(tmp_path, "whole")


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ModelFileMissingError):
        (tmp_path / "toy" / "1").mkdir(parents=True)
        (tmp_path / "toy" / "1" / "verification.json").write_text(json.dumps(REPORT))
        verification_warning(tmp_path, "toy")
