"""``make bench-models``: every model of the catalogue, its graph against its own package.

Weights are seeded where the published ones cannot be had: they do not change what is computed.
"""

import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from support.seeded import seeded_entry

from bench.__main__ import child, medians
from stemserve_export.catalog import load_catalog
from stemserve_export.choices import with_precision
from stemserve_export.exporter import export_model

RUNS = 3


def figures_of(name, work, repository):
    entry = seeded_entry(name, work / "checkpoints")
    # One specialist stands for all: they are the same network.
    part = (entry.parts() or (entry,))[0]
    half = with_precision(part, "fp16")
    sizes, parity = {}, {}
    for chosen in (part, half):
        done = export_model(chosen, repository)
        sizes[chosen.precision] = (done.folder / "model.onnx").stat().st_size / 1e6
        parity[chosen.precision] = min(done.record["parity_db"].values())
        if chosen is part:
            record = done.record
    graph = repository / part.name / str(part.version) / "model.onnx"
    files = {key: file.source for key, file in part.files.items()}
    ours, theirs = [], []
    for _ in range(RUNS):
        ours.append(child("graph", graph))
        theirs.append(child("package", name, json.dumps(files)))
    ours, theirs = medians(ours), medians(theirs)
    return {
        "model": part.name,
        "parameters": record["parameters"],
        "nodes": record["nodes"],
        "size_mb": sizes,
        "graph_against_torch_db": parity,
        "graph": ours,
        "package": theirs,
        "ratio": theirs["cpu_s"] / ours["cpu_s"],
    }


def main():
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in sys.argv[1:] or load_catalog():
            results.append(figures_of(name, Path(scratch), Path(scratch) / "repository"))
    table = Table(title=f"one chunk, one thread, median of {RUNS} runs")
    for column in ("model", "parameters", "nodes", "MB fp32/fp16", "graph dB fp32/fp16",
                   "graph, CPU s", "package, CPU s", "ratio", "graph RSS MB"):  # fmt: skip
        table.add_column(column)
    for one in results:
        table.add_row(
            one["model"], f"{one['parameters'] / 1e6:.1f} M", str(one["nodes"]),
            "{fp32:.0f} / {fp16:.0f}".format(**one["size_mb"]),
            "{fp32:.0f} / {fp16:.0f}".format(**one["graph_against_torch_db"]),
            f"{one['graph']['cpu_s']:.2f}", f"{one['package']['cpu_s']:.2f}",
            f"{one['ratio']:.2f} x", f"{one['graph']['peak_rss_mb']:.0f}",
        )  # fmt: skip
    Console(width=130).print(table)
    Path("build").mkdir(exist_ok=True)
    Path("build/bench-models.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
