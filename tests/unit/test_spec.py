import dataclasses

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from stemserve.errors import SpecError
from stemserve.spec import PARAMETER_PREFIX, SPEC_VERSION, Checkpoint, CheckpointFile, ModelSpec
from stemserve_export.triton_config import config_text, model_config

DIGESTS = ("0" * 64, "0123456789abcdef" * 4)
DtypeInt8 = model_config_pb2.DataType.Value("TYPE_INT8")


def checkpoint(*files, **changes):
    texts = {"licence": "MIT", "commercial_use": "allowed", "training_data": "songs"}
    return Checkpoint(tuple(CheckpointFile(*file) for file in files), **{**texts, **changes})


def served(spec):
    """The configuration as Triton reads it: from the text on disk."""
    return text_format.Parse(config_text(spec), model_config_pb2.ModelConfig())


# --- validation -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": ""}, "it has no name"),
        ({"stems": ()}, "stems must be one or more different names, got ()"),
        ({"stems": ("a", "a")}, "stems must be one or more different names, got ('a', 'a')"),
        ({"version": 0}, "version must be 1 or more, got 0"),
        ({"sample_rate": 0}, "sample_rate must be 1 or more, got 0"),
        ({"channels": 0}, "channels must be 1 or more, got 0"),
        ({"chunk_samples": 0}, "chunk_samples must be 1 or more, got 0"),
        ({"max_batch_size": 0}, "max_batch_size must be 1 or more, got 0"),
        (
            {"edge_samples": 32, "lead_samples": 32},
            "edge_samples must be at least 0 and below half a chunk (64 samples), got 32",
        ),
        (
            {"edge_samples": -1},
            "edge_samples must be at least 0 and below half a chunk (64 samples), got -1",
        ),
        (
            {"edge_samples": 5, "lead_samples": 4},
            "lead_samples (4) must cover edge_samples (5), or the start of every track would be "
            "a partial sum",
        ),
        ({"overlap": 1.0}, "overlap must lie in [0, 1), got 1.0"),
        ({"overlap": -0.1}, "overlap must lie in [0, 1), got -0.1"),
        ({"overlap": float("nan")}, "overlap must lie in [0, 1), got nan"),
        ({"domain": "time"}, "domain must be one of mask, hybrid, got 'time'"),
        ({"window": "hann"}, "window must be one of triangle, got 'hann'"),
        ({"normalization": "chunk"}, "normalization must be one of none, track, got 'chunk'"),
        ({"wire_dtype": "int8"}, "wire_dtype must be one of fp32, fp16, got 'int8'"),
        ({"precision": "bf16"}, "precision must be one of fp32, fp16, got 'bf16'"),
        ({"tail": "left"}, "tail must be one of padded, centred, got 'left'"),
        (
            {"tail": "centred", "lead_samples": 1},
            "lead_samples must be 0 where the tail is centred",
        ),
        ({"checkpoint": checkpoint()}, "it names no file that its weights come from"),
        (
            {"checkpoint": checkpoint(("file:///my weights.pth", DIGESTS[0]))},
            "a checkpoint's source must be a URI, got 'file:///my weights.pth'",
        ),
        (
            {"checkpoint": checkpoint(("", DIGESTS[0]))},
            "a checkpoint's source must be a URI, got ''",
        ),
        (
            {"checkpoint": checkpoint(("file:///w", "0" * 63))},
            f"a sha256 has 64 hex digits, got '{'0' * 63}'",
        ),
        (
            {"checkpoint": checkpoint(("file:///w", "A" * 64))},
            f"a sha256 has 64 hex digits, got '{'A' * 64}'",
        ),
        (
            {"checkpoint": checkpoint(("file:///w", DIGESTS[0]), commercial_use="maybe")},
            "commercial use must be one of allowed, forbidden, unknown, got 'maybe'",
        ),
    ],
)
def test_an_invalid_field_is_named_with_what_was_expected(make_spec, changes, problem):
    with pytest.raises(SpecError) as caught:
        make_spec(**changes)
    name = changes.get("name", "tiny")
    assert str(caught.value) == f"The spec of model '{name}' is not valid: {problem}."


@pytest.mark.parametrize("stem", ["../../stem", "a/b", "", ".."])
def test_a_stem_that_is_no_plain_file_name_is_refused(make_spec, stem):
    """Stems become file names, and a client takes them from whatever server it is pointed at."""
    with pytest.raises(SpecError, match="stem"):
        make_spec(stems=("vocals", stem))


@pytest.mark.parametrize(
    "changes",
    [
        {"edge_samples": 31, "lead_samples": 31},
        {"overlap": 0.0},
        {"overlap": 0.999},
        {"max_batch_size": 1, "stems": ("vocals",), "domain": "hybrid", "wire_dtype": "fp16"},
        {"tail": "centred", "precision": "fp16", "overlap": 0.0},
    ],
)
def test_the_limits_themselves_are_valid(make_spec, changes):
    assert make_spec(**changes).stems


def test_a_spec_cannot_be_changed(make_spec):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_spec().overlap = 0.5


# --- what follows for the graph -------------------------------------------------------------


def test_names_and_shapes_of_the_graph(make_spec):
    spec = make_spec(channels=1, chunk_samples=128)
    assert spec.input_names == ("mixture",)
    assert spec.output_names == ("vocals", "accompaniment")
    assert spec.tensor_dims == (1, 128)


@pytest.mark.parametrize(("largest", "opt"), [(1, 1), (2, 1), (3, 1), (8, 4), (32, 16)])
def test_batch_profile(make_spec, largest, opt):
    profile = make_spec(max_batch_size=largest).batch_profile
    assert profile == {"min": (1, 2, 64), "opt": (opt, 2, 64), "max": (largest, 2, 64)}


@pytest.mark.parametrize(("wire", "triton"), [("fp32", "TYPE_FP32"), ("fp16", "TYPE_FP16")])
def test_triton_dtype(make_spec, wire, triton):
    assert make_spec(wire_dtype=wire).triton_dtype == triton


# --- codec ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"options": {}},
        {"overlap": 0.1 + 0.2, "edge_samples": 7, "lead_samples": 9},  # no short decimal
        {"wire_dtype": "fp16", "domain": "hybrid", "normalization": "track"},
        {"stems": ("vocals", "drums", "bass", "other"), "channels": 1, "max_batch_size": 1},
        {"tail": "centred", "precision": "fp16"},
        {
            "checkpoint": checkpoint(
                ("https://host/vocals.pth?a=1#sha256=b", DIGESTS[0]),  # a mark of its own
                ("pypi:wheel==1.0", DIGESTS[1]),
                ("file:///my%20weights/ünï.th", DIGESTS[1]),
                licence="research only",
                commercial_use="forbidden",
                training_data='two\nlines, "quoted"',
            )
        },
    ],
)
def test_a_spec_survives_the_way_through_config_pbtxt(make_spec, changes):
    spec = make_spec(**changes)
    assert ModelSpec.from_config(served(spec)) == spec


def test_all_parameters_carry_the_prefix_and_are_text(make_spec):
    parameters = make_spec().to_parameters()
    assert parameters["stemserve.spec_version"] == str(SPEC_VERSION)
    assert parameters["stemserve.checkpoint.files"] == f"file:///w.ckpt#sha256={'0' * 64}"
    assert parameters["stemserve.checkpoint.licence"] == "MIT"
    assert parameters["stemserve.checkpoint.commercial_use"] == "allowed"
    assert parameters["stemserve.tail"] == "padded"
    assert parameters["stemserve.precision"] == "fp32"
    assert parameters["stemserve.option.mask_extension"] == "average"
    assert all(key.startswith(PARAMETER_PREFIX) for key in parameters)
    assert all(isinstance(value, str) for value in parameters.values())


def test_the_files_of_a_checkpoint_keep_their_order(make_spec):
    files = [(f"https://host/{stem}.pth", DIGESTS[1]) for stem in ("vocals", "drums", "bass")]
    spec = make_spec(checkpoint=checkpoint(*files))
    assert spec.to_parameters()["stemserve.checkpoint.files"] == " ".join(
        f"https://host/{stem}.pth#sha256={DIGESTS[1]}" for stem in ("vocals", "drums", "bass")
    )
    read = ModelSpec.from_config(served(spec)).checkpoint.files
    assert [(file.source, file.sha256) for file in read] == files


def test_parameters_of_others_are_ignored(make_spec):
    spec = make_spec()
    config = model_config(spec)
    config.parameters["intra_op_thread_count"].string_value = "2"
    assert ModelSpec.from_config(config) == spec


def broken_version(text):
    def change(config):
        config.parameters["stemserve.spec_version"].string_value = text

    return change


def drop(*names):
    def change(config):
        for name in names:
            del config.parameters[f"stemserve.{name}"]

    return change


def put(name, value):
    def change(config):
        config.parameters[f"stemserve.{name}"].string_value = value

    return change


CONFIGURATION = "The configuration of model 'tiny' "


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param(
            lambda config: config.parameters.clear(),
            "Model 'tiny' carries no stemserve spec (parameter 'stemserve.spec_version'), so its "
            "chunking is unknown; choose a model that `stemserve export` built.",
            id="not ours",
        ),
        pytest.param(
            broken_version(str(SPEC_VERSION + 1)),
            f"Model 'tiny' has spec version {SPEC_VERSION + 1}; this client reads versions up to "
            f"{SPEC_VERSION}. Upgrade it with `pip install --upgrade stemserve`.",
            id="future",
        ),
        pytest.param(
            broken_version("one"),
            "Model 'tiny' has the spec version 'one', which no stemserve wrote; export the model "
            "again.",
            id="nonsense",
        ),
        pytest.param(
            broken_version("0"),
            "Model 'tiny' has the spec version '0', which no stemserve wrote; export the model "
            "again.",
            id="version 0",
        ),
        pytest.param(
            drop("family"),
            CONFIGURATION + "lacks parameter 'stemserve.family'; export the model again with "
            "this stemserve.",
            id="one missing",
        ),
        pytest.param(
            drop("overlap", "checkpoint.licence"),
            CONFIGURATION + "lacks parameters 'stemserve.checkpoint.licence', "
            "'stemserve.overlap'; export the model again with this stemserve.",
            id="two missing",
        ),
        pytest.param(
            put("colour", "red"),
            CONFIGURATION + f"has parameter 'stemserve.colour', unknown to spec version "
            f"{SPEC_VERSION}; upgrade this client, or export the model again.",
            id="unknown",
        ),
        pytest.param(
            put("sample_rate", "44.1k"),
            CONFIGURATION + "has 'stemserve.sample_rate' = '44.1k'; expected a whole number. "
            "Export the model again.",
            id="no integer",
        ),
        pytest.param(
            put("overlap", "a quarter"),
            CONFIGURATION + "has 'stemserve.overlap' = 'a quarter'; expected a number. Export "
            "the model again.",
            id="no number",
        ),
        pytest.param(
            put("checkpoint.files", "file:///w"),
            CONFIGURATION + "has 'file:///w' in 'stemserve.checkpoint.files'; expected "
            "URI#sha256=HEX. Export the model again.",
            id="a file without digest",
        ),
        pytest.param(
            put("checkpoint.files", "file:///w#sha256=12"),
            "The spec of model 'tiny' is not valid: a sha256 has 64 hex digits, got '12'.",
            id="a short digest",
        ),
        pytest.param(
            put("checkpoint.files", " "),
            "The spec of model 'tiny' is not valid: it names no file that its weights come from.",
            id="no files",
        ),
        pytest.param(
            put("checkpoint.commercial_use", "yes"),
            "The spec of model 'tiny' is not valid: commercial use must be one of allowed, "
            "forbidden, unknown, got 'yes'.",
            id="another use",
        ),
        pytest.param(
            drop("tail", "precision", "checkpoint.commercial_use"),
            CONFIGURATION + "lacks parameters 'stemserve.checkpoint.commercial_use', "
            "'stemserve.precision', 'stemserve.tail'; export the model again with this stemserve.",
            id="of before these were there",
        ),
        pytest.param(
            put("domain", "time"),
            "The spec of model 'tiny' is not valid: domain must be one of mask, hybrid, got "
            "'time'.",
            id="invalid value",
        ),
        pytest.param(
            lambda config: setattr(config.input[0], "name", "audio"),
            CONFIGURATION + "has the inputs ['audio']; expected one, 'mixture'.",
            id="other input",
        ),
        pytest.param(
            lambda config: config.input.add(name="extra"),
            CONFIGURATION + "has the inputs ['mixture', 'extra']; expected one, 'mixture'.",
            id="two inputs",
        ),
        pytest.param(
            lambda config: config.input[0].dims.append(1),
            CONFIGURATION + "has the input dims [2, 64, 1]; expected [channels, chunk samples].",
            id="three dims",
        ),
        pytest.param(
            lambda config: config.input[0].dims.__setitem__(1, -1),
            CONFIGURATION + "has the input dims [2, -1]; expected [channels, chunk samples].",
            id="dynamic chunk",
        ),
        pytest.param(
            lambda config: config.output[1].dims.__setitem__(1, 65),
            CONFIGURATION + "has the output 'accompaniment' with dims [2, 65]; every stem must "
            "have the input's dims [2, 64] and dtype.",
            id="other dims of an output",
        ),
        pytest.param(
            lambda config: setattr(config.output[0], "data_type", DtypeInt8),
            CONFIGURATION + "has the output 'vocals' with dims [2, 64]; every stem must have the "
            "input's dims [2, 64] and dtype.",
            id="other dtype of an output",
        ),
        pytest.param(
            lambda config: [
                setattr(tensor, "data_type", DtypeInt8)
                for tensor in (*config.input, *config.output)
            ],
            CONFIGURATION + "has tensors of TYPE_INT8; expected TYPE_FP32 or TYPE_FP16.",
            id="int8",
        ),
        pytest.param(
            lambda config: config.ClearField("output"),
            "The spec of model 'tiny' is not valid: stems must be one or more different names, "
            "got ().",
            id="no outputs",
        ),
        pytest.param(
            lambda config: config.ClearField("max_batch_size"),
            "The spec of model 'tiny' is not valid: max_batch_size must be 1 or more, got 0.",
            id="no batch axis",
        ),
    ],
)
def test_a_broken_configuration_is_explained(make_spec, change, sentence):
    config = served(make_spec())
    change(config)
    with pytest.raises(SpecError) as caught:
        ModelSpec.from_config(config)
    assert str(caught.value) == sentence
    assert caught.value.exit_code == 35
