"""A smoke run killed at random moments: python tests/kill_study.py [KILLS [SEED]] writes what it survived.

Each time the kernel and all that belongs to the run get SIGKILL, and the run is started again in the same folder; when one
gets through, its results are held against those of an undisturbed run, and the rest of the kills go to a fresh folder.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TIMED = "second|speedup|extra_cost|images_per_s"  # metrics that are no function of the seed


def kill_all(process):
    """SIGKILL to a process and its descendants, the kernel (which has a session of its own) first."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def compare(folder, undisturbed):
    """Same rows and values (timings aside), and every file can be read."""
    names = sorted(f.name for f in (undisturbed / "results").iterdir())
    assert sorted(f.name for f in (folder / "results").iterdir()) == names
    for name in (n for n in names if n.endswith(".csv") and n != "runs.csv"):
        tables = [pd.read_csv(f / "results" / name, keep_default_na=False, dtype=str) for f in (folder, undisturbed)]
        tables = [t[~t["metric"].str.contains(TIMED)] for t in tables]
        key = [c for c in tables[0].columns if c not in ("value", "low", "high")]
        mine, theirs = (t.set_index(key).replace("", "nan").astype(float).sort_index() for t in tables)
        pd.testing.assert_frame_equal(mine, theirs, rtol=1e-4)
    assert set(pd.read_csv(folder / "results/runs.csv")["run"]) == set(pd.read_csv(undisturbed / "results/runs.csv")["run"])
    for path in folder.rglob("*.png"):
        Image.open(path).load()
    for path in folder.glob("cache/*.npz"):
        with np.load(path, allow_pickle=False) as stored:
            assert all(stored[k].size for k in ("features", "seconds") if k in stored)


def survive(command_for, undisturbed, kills, longest, folder, environment, seed=0):
    """Kill and resume; the moments in seconds, each with the rows and chunks that the run had written by then."""
    draw, moments, number = random.Random(seed), [], 0
    while len(moments) < kills:
        number += 1
        out = folder / f"run-{number}"
        out.mkdir()
        finished = False
        while not finished:
            process = subprocess.Popen(
                command_for(out), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            finished_chunks = {f: f.stat().st_mtime_ns for f in out.glob("cache/*.npz")}
            moment = draw.uniform(0, longest) if len(moments) < kills else 3600
            try:
                assert process.wait(moment) == 0, "a resumed run failed"
                finished = True
                same = all(f.stat().st_mtime_ns == stamp for f, stamp in finished_chunks.items())
                assert same, "a chunk that was finished before was computed again"
            except subprocess.TimeoutExpired:
                kill_all(process)
                rows = sum(len(f.read_text().splitlines()) - 1 for f in out.glob("results/*.csv"))
                moments.append((round(moment, 1), rows, len(list(out.glob("cache/*.npz")))))
        compare(out, undisturbed)
    return moments, number


def main():
    kills, seed = map(int, sys.argv[1:] + ["20", "0"][len(sys.argv) - 1 :])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def command(out):
            base = [sys.executable, "-m", "papermill", "--no-progress-bar", "hw.diffusion.ipynb", str(out / "notebook.ipynb")]
            return [*base, "-p", "PROFILE", "smoke", "-p", "OUTPUT_DIR", str(out)]

        (folder / "whole").mkdir()
        started = time.perf_counter()
        subprocess.run(command(folder / "whole"), cwd=ROOT, check=True, capture_output=True)
        longest = time.perf_counter() - started
        print(f"undisturbed: {longest:.0f} s", flush=True)
        moments, number = survive(command, folder / "whole", kills, longest, folder, os.environ, seed)
        for moment, rows, chunks in moments:
            print(f"killed after {moment} s with {rows} rows and {chunks} chunks written")
        print(f"{len(moments)} kills, {number} runs got through, each with the undisturbed run's results")


if __name__ == "__main__":
    main()
