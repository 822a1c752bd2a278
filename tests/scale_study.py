"""Does the study scale out? One process with all cores against one process a core, under `accelerate launch`.

Not a test: `python tests/scale_study.py` (some minutes on two CPU cores) measures the same images of cifar10's network
both ways and records images per second, their ratio and both distances, as outputs/run/results/scale-study.csv.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import ROOT, cells_tagged, set_up

N, STEPS = 64, 20
BODY = f"""
import json

checkpoint = load_checkpoint("cifar10")
measure(checkpoint, PROCESS.num_processes, 1)  # warm-up; other seeds and steps than below
PROCESS.wait_for_everyone()
started = time.perf_counter()
features = measure(checkpoint, {N}, {STEPS}, size={N // 8}).features
seconds = time.perf_counter() - started
reference = load_reference("cifar10", "bundled")
if PROCESS.is_main_process:
    facts = {{"processes": PROCESS.num_processes, "threads": torch.get_num_threads(), "seconds": seconds}}
    facts["distance"] = jackknife(reference.distances(features)) | {{"n_real": int(reference.n_real)}}
    Path(OUTPUT_DIR, "facts.json").write_text(json.dumps(facts))
"""


def measured(processes, threads, folder):
    """Run the set-up and BODY as a script in that many processes; its facts."""
    folder.mkdir()
    parameters, setup = cells_tagged("parameters"), cells_tagged("setup")
    given = f"OUTPUT_DIR, SOURCE, PROFILE = {str(folder)!r}, 'bundled', 'quick'"
    script = folder / "study.py"
    script.write_text("\n\n".join([*(s for _, s in parameters), given, *(s for _, s in setup), BODY]), encoding="utf-8")
    # without --multi_gpu accelerate starts a single process on CPUs, silently
    options = ["--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", f"--num_processes={processes}"]
    launch = ["-m", "accelerate.commands.launch", *options] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, *launch, str(script)], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "facts.json").read_text())


def main():
    os.chdir(ROOT)
    nb = set_up("study", SOURCE="bundled")
    section = nb.Section("scale-study", [(nb.load_checkpoint("cifar10"), N, STEPS)])
    cores = len(os.sched_getaffinity(0))
    about = {"dataset": "cifar10", "method": "DDIM", "eta": 0.0, "steps": STEPS, "N": N}
    found = {"one": [], "many": []}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(3):  # in turns, so that a neighbour's load meets both
            found["one"].append(measured(1, cores, Path(scratch, f"one-{repeat}")))
            found["many"].append(measured(cores, 1, Path(scratch, f"many-{repeat}")))
    speeds = {}
    for way, facts in found.items():
        speeds[way] = sorted(N / f["seconds"] for f in facts)
        label = "1 process, {threads} threads" if way == "one" else "{processes} processes, {threads} thread each"
        label = label.format(**facts[0])
        low, middle, high = speeds[way]
        section.add("images_per_s", middle, low=low, high=high, detail=label, **about)
        section.add("FD-EffNet", **facts[0]["distance"], detail=label, **about)
        print(f"{label}: {middle:.2f} images/s [{low:.2f}, {high:.2f}], distance {facts[0]['distance']['value']:.4f}")
    ratios = sorted(one["seconds"] / many["seconds"] for one, many in zip(*found.values(), strict=True))
    ratio = section.add("images_per_s_ratio", ratios[1], low=ratios[0], high=ratios[2], **about)
    print(f"one process a core makes {ratio.value:.2f} times as many images a second; rows in {nb.OUTPUT}/results")


if __name__ == "__main__":
    main()
