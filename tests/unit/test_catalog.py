"""What the catalogue says of every model, held together with what is published and served."""

import re
from itertools import product

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from stemserve.errors import UnknownModelError
from stemserve.overlap import ChunkPlan
from stemserve.spec import ModelSpec
from stemserve_export.catalog import SINGLE_FILE, find_model, find_song, load_catalog
from stemserve_export.choices import with_precision
from stemserve_export.exporter import model_spec
from stemserve_export.triton_config import config_text

CATALOG = load_catalog()
PRECISIONS = ("fp32", "fp16")


@pytest.fixture(params=CATALOG)
def entry(request):
    return CATALOG[request.param]


def test_the_models_of_the_catalogue():
    assert {name: entry.stems for name, entry in CATALOG.items()} == {
        "spleeter_2stems": ("vocals", "accompaniment"),
        "spleeter_4stems": ("vocals", "drums", "bass", "other"),
        "spleeter_5stems": ("vocals", "piano", "drums", "bass", "other"),
        "umxhq": ("vocals", "drums", "bass", "other"),
        "umxl": ("vocals", "drums", "bass", "other"),
        "htdemucs": ("drums", "bass", "other", "vocals"),
        "htdemucs_6s": ("drums", "bass", "other", "vocals", "guitar", "piano"),
        "htdemucs_ft": ("drums", "bass", "other", "vocals"),
        "hdemucs_mmi": ("drums", "bass", "other", "vocals"),
    }


def test_an_unknown_model():
    with pytest.raises(UnknownModelError) as caught:
        find_model("demix")
    assert str(caught.value) == (
        f"The catalogue has no model 'demix'; it has {', '.join(sorted(CATALOG))} (see `stemserve "
        "export --list`)."
    )


def test_every_file_is_pinned(entry):
    for file in entry.files.values():
        assert re.match(r"https://|pypi:\S+==", file.source)
        if file.sha256 is None:
            assert re.fullmatch("[0-9a-f]{8,63}", file.sha256_prefix)
        else:
            assert re.fullmatch("[0-9a-f]{64}", file.sha256)
            assert not file.sha256_prefix
        # open-unmix and demucs write the first digits into the name.
        published = re.search(r"-([0-9a-f]{8})\.(?:pth|th)$", file.source)
        if published:
            assert (file.sha256 or file.sha256_prefix).startswith(published[1])


def test_no_file_is_in_two_models():
    sources = [file.source for entry in CATALOG.values() for file in entry.files.values()]
    assert len(set(sources)) == len(sources)


def test_weights_are_in_one_file_or_in_one_per_stem(entry):
    assert set(entry.files) in ({SINGLE_FILE}, set(entry.stems))
    assert set(entry.members) <= set(entry.stems)


def test_the_licence_of_the_weights_has_a_source(entry):
    assert entry.licence
    assert entry.licence_source.startswith("https://")
    assert entry.commercial_use in ("allowed", "forbidden")
    assert entry.training_data


def test_scores_say_what_was_measured_and_where_it_is_published(entry):
    if entry.scores is not None:
        assert set(entry.scores.stems) <= set(entry.stems)
        assert all(0 < score < 15 for score in entry.scores.stems.values())
        assert "SDR" in entry.scores.metric
        assert entry.scores.source.startswith("https://")


def test_models_with_published_scores():
    without = [name for name, entry in CATALOG.items() if entry.scores is None]
    assert without == ["spleeter_2stems", "spleeter_5stems", "htdemucs_6s"]


def test_the_song_is_pinned():
    song = find_song("audio_example")
    assert song.archive == CATALOG["spleeter_2stems"].files[SINGLE_FILE]
    assert re.fullmatch("[0-9a-f]{64}", song.member_sha256)


# --- specialists ----------------------------------------------------------------------------


def test_a_whole_model_has_no_parts():
    entry = CATALOG["htdemucs"]
    assert entry.parts() == ()
    assert entry.served_entries() == (entry,)


def test_a_model_of_specialists_is_served_as_one_per_stem_and_itself():
    entry = CATALOG["htdemucs_ft"]
    *parts, whole = entry.served_entries()
    assert whole is entry
    assert [part.name for part in parts] == [
        "htdemucs_ft_drums", "htdemucs_ft_bass", "htdemucs_ft_other", "htdemucs_ft_vocals",
    ]  # fmt: skip
    for stem, part in zip(entry.stems, parts, strict=True):
        assert part.stems == (stem,)
        assert part.files == {SINGLE_FILE: entry.files[stem]}
        assert part.parts() == ()
        assert part.scores is None
        assert (part.licence, part.commercial_use) == (entry.licence, entry.commercial_use)
        assert (part.family, part.version) == (entry.family, entry.version)


def test_only_the_fine_tuned_model_is_one_of_specialists():
    assert [name for name, entry in CATALOG.items() if entry.specialists] == ["htdemucs_ft"]


# --- the four agree -------------------------------------------------------------------------
#
# Graph, TensorRT profile, served configuration and chunk plan follow from one spec. Nothing is
# built here: what the graphs themselves are like, check_graph compares with the spec on export.


@pytest.fixture(params=product(PRECISIONS, PRECISIONS), ids="-".join)
def artefact(request, entry):
    """A model of the catalogue in one of its forms."""
    return with_precision(entry, *request.param)


def read_back(text):
    return ModelSpec.from_config(text_format.Parse(text, model_config_pb2.ModelConfig()))


def test_what_is_served_is_what_was_described(artefact):
    parts = [model_spec(part) for part in artefact.parts()]
    spec = model_spec(artefact)
    assert read_back(config_text(spec, parts)) == spec
    for part in parts:
        assert read_back(config_text(part)) == part
    assert (spec.name, spec.precision) == (artefact.name, artefact.precision)
    assert spec.checkpoint.licence == artefact.licence
    assert spec.checkpoint.commercial_use == artefact.commercial_use
    assert [file.source for file in spec.checkpoint.files] == [
        file.source for file in artefact.files.values()
    ]


def test_tensors_are_the_same_to_graph_profile_and_configuration(artefact):
    spec = model_spec(artefact)
    parts = [model_spec(part) for part in artefact.parts()]
    config = text_format.Parse(config_text(spec, parts), model_config_pb2.ModelConfig())
    dtype = {"fp32": model_config_pb2.TYPE_FP32, "fp16": model_config_pb2.TYPE_FP16}
    assert [tensor.name for tensor in config.input] == list(spec.input_names) == ["mixture"]
    assert [tensor.name for tensor in config.output] == list(spec.output_names)
    assert spec.output_names == artefact.stems
    for tensor in (*config.input, *config.output):
        assert tuple(tensor.dims) == spec.tensor_dims == (2, spec.chunk_samples)
        assert tensor.data_type == dtype[artefact.wire_dtype]
    profile = spec.batch_profile
    assert profile["min"] == (1, *spec.tensor_dims)
    assert profile["max"] == (config.max_batch_size, *spec.tensor_dims)
    assert 1 <= profile["opt"][0] <= profile["max"][0]
    assert profile["opt"][1:] == spec.tensor_dims


def test_the_clients_plan_is_the_exporters(artefact):
    spec = model_spec(artefact)
    parts = [model_spec(part) for part in artefact.parts()]
    plan = ChunkPlan.from_spec(read_back(config_text(spec, parts)))
    assert plan == ChunkPlan.from_spec(spec)
    assert (plan.chunk, plan.edge, plan.lead) == (
        spec.chunk_samples, spec.edge_samples, spec.lead_samples,
    )  # fmt: skip
    assert plan.centred == (spec.tail == "centred")
    if artefact.overlap:
        assert plan.crossfade
        assert plan.stride == int((1 - artefact.overlap) * plan.chunk)
    else:
        assert plan.stride == plan.chunk - plan.edge
    for part in parts:
        assert ChunkPlan.from_spec(part) == plan


def test_an_ensemble_joins_what_is_exported(artefact):
    parts = [model_spec(part) for part in artefact.parts()]
    text = config_text(model_spec(artefact), parts)
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.platform == ("ensemble" if parts else "onnxruntime_onnx")
    steps = {step.model_name: step for step in config.ensemble_scheduling.step}
    assert set(steps) == {part.name for part in parts}
    for part in parts:
        single = text_format.Parse(config_text(part), model_config_pb2.ModelConfig())
        assert dict(steps[part.name].input_map) == {single.input[0].name: "mixture"}
        assert dict(steps[part.name].output_map) == {single.output[0].name: part.stems[0]}
        for field in ("dims", "data_type"):
            assert getattr(single.input[0], field) == getattr(config.input[0], field)
            assert getattr(single.output[0], field) == getattr(config.output[0], field)
        assert single.max_batch_size == config.max_batch_size


FRAMING = {
    "spleeter": (527_360, 3072, 4096, "padded"),
    "openunmix": None,  # chunks of the family's own choice
    "htdemucs": (343_980, 0, 0, "centred"),  # demucs: 7.8 s
    "hdemucs": (485_100, 0, 0, "centred"),  # 11 s of the 44 s that demucs allows
}


def test_the_published_framing(entry):
    spec = model_spec(entry)
    found = (spec.chunk_samples, spec.edge_samples, spec.lead_samples, spec.tail)
    assert found == (FRAMING[entry.family] or found)
    assert (spec.sample_rate, spec.channels) == (44_100, 2)
    if entry.domain == "hybrid":  # demucs.apply's callers, demucs.apply's defaults
        assert (spec.normalization, spec.overlap, spec.window) == ("track", 0.25, "triangle")


def test_a_digest_of_which_a_prefix_is_known_is_filled_up_until_the_file_is_there():
    first = model_spec(CATALOG["umxl"]).checkpoint.files[0]
    assert first.sha256 == "bccbd9aa".ljust(64, "0")
    digests = {stem: f"{index}" * 64 for index, stem in enumerate(CATALOG["umxl"].stems)}
    files = model_spec(CATALOG["umxl"], digests).checkpoint.files
    assert [file.sha256 for file in files] == list(digests.values())
