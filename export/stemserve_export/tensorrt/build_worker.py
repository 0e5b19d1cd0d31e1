"""The process that builds one plan: a question as JSON on stdin, an answer as JSON on stdout.

TensorRT prints as it likes; what it writes to stdout is sent to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from stemserve.errors import StemserveError
from stemserve_export.tensorrt.builder import (
    BuildSettings,
    GraphContract,
    build_plan,
    known_compute_capabilities,
    load_api,
)


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Answer ``describe`` or ``build``; what stemserve raises becomes ``{"problem": sentence}``."""
    try:
        api = load_api("tensorrt_rtx")
        if question["task"] == "describe":
            return {
                "version": str(api.__version__),
                "compute_capabilities": known_compute_capabilities(api),
            }
        contract = GraphContract.from_record(question["contract"])
        settings = BuildSettings(compute_capabilities=[question["compute_capability"]])
        plan = build_plan(api, Path(question["graph"]), contract, settings)
    except StemserveError as error:
        return {"problem": str(error)}
    return {
        "seconds": round(plan.build_seconds, 2),
        "layers": plan.layers,
        "plan_bytes": len(plan.data),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    """Answer the question on stdin."""
    question = json.load(sys.stdin)
    ours = os.dup(1)
    os.dup2(2, 1)
    text = json.dumps(answer(question))
    with os.fdopen(ours, "w") as stdout:
        stdout.write(text)


if __name__ == "__main__":
    main()
