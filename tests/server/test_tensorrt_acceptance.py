"""TensorRT takes the served graph, by a build ahead of time without a GPU."""

import json


def test_a_served_graph_is_parsed_and_built(repository, run_cli):
    done = run_cli(
        "check-tensorrt", "spleeter_2stems", "--repository", repository,
        "--compute-capability", "8.6", "--json", timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (build,) = json.loads(done.stdout)["builds"]
    assert build["problem"] is None
    assert build["plan_bytes"] > 10_000_000
