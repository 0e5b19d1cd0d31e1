"""``make bench``: prints the figures as a table and writes them to ``build/bench.json``."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from rich.console import Console
from rich.table import Table

from stemserve.repository import default_repository
from stemserve.server import LocalServer
from stemserve_export.song import place_song

RUNS = 5
MODEL = "spleeter_2stems"


def child(*arguments, timeout=900):
    """Run one task in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.child", *map(str, arguments)],
        capture_output=True, text=True, check=True, timeout=timeout,
    )  # fmt: skip
    return json.loads(done.stdout)


def client(url, song, out, transport):
    """Run the command as a user does; its own account of time and memory, start-up left out."""
    shutil.rmtree(out, ignore_errors=True)  # replacing files takes time, too
    options = ["--shared-memory"] if transport == "shared" else []
    done = subprocess.run(
        [sys.executable, "-m", "stemserve.cli", "separate", str(song), "--url", url, "--json",
         "--out", str(out), *options],
        capture_output=True, text=True, check=True, timeout=1800,
    )  # fmt: skip
    metadata = json.loads(done.stdout)
    return {"wall_s": metadata["runtime_seconds"], "peak_rss_mb": metadata["client_peak_rss_mb"]}


def medians(runs):
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def pair(ours, theirs, runs=RUNS):
    """Run two tasks in turn; medians of both, and of the ratio theirs / ours pair by pair."""
    a, b = [], []
    for _ in range(runs):
        a.append(ours())
        b.append(theirs())
    ratio = statistics.median(y["wall_s"] / x["wall_s"] for x, y in zip(a, b, strict=True))
    return medians(a), medians(b), ratio


def tiled(song, path, minutes):
    """Tile a clip to a track of so many minutes, written in blocks."""
    clip, rate = soundfile.read(song, dtype="float32", always_2d=True)
    remaining = minutes * 60 * rate
    with soundfile.SoundFile(path, "w", rate, 2, "PCM_16", format="WAV") as out:
        while remaining > 0:
            out.write(np.clip(clip[:remaining], -1, 1))
            remaining -= len(clip)
    return path


def main():
    figures = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "runs": RUNS,
    }
    graph = default_repository() / MODEL / "1" / "model.onnx"
    # In memory where that can be: what is compared is not the disk.
    memory = "/dev/shm" if shutil.disk_usage("/dev/shm").free > 4e9 else None
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        work = Path(scratch)
        song = place_song("audio_example", work)
        six = tiled(song, work / "six.wav", 6)
        chunk_s = 512 * 1024 / 44100

        ours, theirs, _ = pair(lambda: child("bare", graph, six, 1), lambda: child("eager", 1))
        chunks = -(-(6 * 60 * 44100 + 4096) // (512 * 1024))
        figures["chunk_cpu_ms"] = {
            "graph": ours["cpu_s"] / chunks * 1e3,
            "eager_pytorch": theirs["cpu_s"] / 8 * 1e3,
            "chunk_seconds": chunk_s,
        }
        with LocalServer(models=[MODEL]) as server:
            ours, theirs, ratio = pair(
                lambda: client(server.url, six, work / "out", "grpc"),
                lambda: child("reference", six, work / "ref"),
            )
            figures["six_minutes"] = {
                "client": ours, "pytorch": theirs, "times_faster": ratio,
                "x_realtime": 360 / ours["wall_s"],
            }  # fmt: skip
            threads = os.cpu_count()
            for transport in ("shared", "grpc"):
                ours, theirs, ratio = pair(
                    lambda transport=transport: client(server.url, six, work / "out", transport),
                    lambda: child("bare", graph, six, threads),
                )
                share = 1 / ratio - 1
                figures[f"overhead_{transport}"] = {"client": ours, "bare": theirs, "share": share}
            if "--hour" in sys.argv:
                hour = tiled(song, work / "hour.wav", 60)
                figures["hour"] = client(server.url, hour, work / "out", "grpc")
            figures["server_peak_rss_mb"] = server.peak_rss_mb()
    report(figures)
    Path("build").mkdir(exist_ok=True)
    Path("build/bench.json").write_text(json.dumps(figures, indent=2) + "\n")


def report(figures):
    table = Table(title=f"{figures['machine']}, median of {figures['runs']} runs")
    for column in ("figure", "ours", "peer", "ratio"):
        table.add_column(column)
    chunk = figures["chunk_cpu_ms"]
    table.add_row(
        f"CPU of one {chunk['chunk_seconds']:.1f} s chunk, one thread",
        f"{chunk['graph']:.0f} ms (ONNX Runtime)", f"{chunk['eager_pytorch']:.0f} ms (PyTorch)",
        f"{chunk['eager_pytorch'] / chunk['graph']:.2f} x",
    )  # fmt: skip
    six = figures["six_minutes"]
    table.add_row(
        "6-minute track, files to files",
        f"{six['client']['wall_s']:.1f} s, {six['client']['peak_rss_mb']:.0f} MB client",
        f"{six['pytorch']['wall_s']:.1f} s, {six['pytorch']['peak_rss_mb']:.0f} MB (PyTorch)",
        f"{six['times_faster']:.2f} x",
    )
    for transport, name in (("shared", "shared memory"), ("grpc", "gRPC")):
        over = figures[f"overhead_{transport}"]
        table.add_row(
            f"client + Triton over a bare loop, {name}", f"{over['client']['wall_s']:.2f} s",
            f"{over['bare']['wall_s']:.2f} s (ONNX Runtime)", f"{over['share']:+.1%}",
        )  # fmt: skip
    if "hour" in figures:
        hour = figures["hour"]
        table.add_row(
            "60-minute track", f"{hour['wall_s']:.0f} s, {hour['peak_rss_mb']:.0f} MB client",
            f"{six['client']['peak_rss_mb']:.0f} MB at 6 minutes",
            f"{hour['peak_rss_mb'] / six['client']['peak_rss_mb']:.2f} x",
        )  # fmt: skip
    table.add_row("server, peak memory", f"{figures['server_peak_rss_mb']:.0f} MB", "", "")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
