"""What is timed, each in a process of its own: ``python -m bench.child TASK ARGUMENT…``.

Prints one JSON object: seconds of the work itself (start-up and imports left out), CPU seconds
and the process's peak resident memory.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path


def reference(song: str, out: str) -> Callable[[], None]:
    """The track through the published algorithm in plain PyTorch, files to files."""
    import soundfile
    import torch
    from reference.spleeter import separate_track
    from support.weights import published_unets

    from stemserve_export.catalog import find_model

    entry = find_model("spleeter_2stems")
    unets = published_unets(entry)
    Path(out).mkdir(parents=True, exist_ok=True)

    def work() -> None:
        track, rate = soundfile.read(song, dtype="float32")
        stems = separate_track(torch.from_numpy(track.T), unets, "average")
        for name, stem in zip(entry.stems, stems, strict=True):
            soundfile.write(f"{out}/{name}.wav", stem.numpy().T, rate, subtype="FLOAT")

    return work


def bare(graph: str, song: str, threads: str) -> Callable[[], None]:
    """The track's chunks through ONNX Runtime in a loop, nothing written."""
    import onnxruntime

    from stemserve.audio import AudioReader
    from stemserve.overlap import ChunkPlan, cut
    from stemserve_export.catalog import find_model
    from stemserve_export.exporter import model_spec

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    plan = ChunkPlan.from_spec(model_spec(find_model("spleeter_2stems")))
    with AudioReader(song) as reader:
        chunks = [chunk.samples[None] for chunk in cut(reader.blocks(44100), plan)]
    session.run(None, {"mixture": chunks[0]})

    def work() -> None:
        for chunk in chunks:
            session.run(None, {"mixture": chunk})

    return work


def eager(threads: str) -> Callable[[], None]:
    """Eight chunks through the published algorithm in eager PyTorch."""
    import torch
    from reference.spleeter import separate_track
    from support.weights import published_unets

    from stemserve_export.catalog import find_model

    torch.set_num_threads(int(threads))
    unets = published_unets(find_model("spleeter_2stems"))
    # One segment of 512 frames with the zeros that the published framing puts in front.
    chunk = torch.randn(2, 512 * 1024 - 4096) * 0.1
    separate_track(chunk, unets, "average")

    def work() -> None:
        for _ in range(8):
            separate_track(chunk, unets, "average")

    return work


def graph(path: str) -> Callable[[], None]:
    """One chunk of noise through ONNX Runtime, one thread."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    shape = (1, *session.get_inputs()[0].shape[1:])
    chunk = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    session.run(None, {"mixture": chunk})
    return lambda: session.run(None, {"mixture": chunk})


def package(name: str, files: str) -> Callable[[], None]:
    """The same chunk through the family's own package in eager PyTorch, one thread."""
    import torch
    from support.peers import eager_peer

    torch.set_num_threads(1)
    peer, chunk_samples = eager_peer(name, json.loads(files))
    chunk = torch.randn(2, chunk_samples, generator=torch.Generator().manual_seed(0)) * 0.1
    peer(chunk)
    return lambda: peer(chunk)


def peak_rss_kib() -> int:
    """Of this program; getrusage would tell the parent's, too, which is kept across exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Run one task and report."""
    task = {
        "reference": reference,
        "bare": bare,
        "eager": eager,
        "graph": graph,
        "package": package,
    }[sys.argv[1]]
    work = task(*sys.argv[2:])
    wall, cpu = time.monotonic(), time.process_time()
    work()
    print(
        json.dumps(
            {
                "wall_s": time.monotonic() - wall,
                "cpu_s": time.process_time() - cpu,
                "peak_rss_mb": peak_rss_kib() * 1024 / 1e6,
            }
        )
    )


if __name__ == "__main__":
    main()
