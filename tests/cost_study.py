"""Minutes that the notebook is expected to take on three graphics cards: python tests/cost_study.py prints the README's table.

No card was at hand. What counts is what the sections plan: for every network (images x steps, operations an evaluation) the
larger of its arithmetic at a card's rate and of its calls at a fixed time each, plus features and distances. The rates (CARDS)
are assumptions, a fifth to a half of what data sheets say; so a number may be wrong by a factor of two.
"""

import contextlib
import io
import math
import tempfile
from dataclasses import dataclass

import pandas as pd
import torch
from conftest import ROOT, cells_tagged, execute, set_up


@dataclass(frozen=True)
class Card:
    """What a machine with one graphics card does in a second."""

    half: float  # operations in 16 bit, wide networks
    single: float  # operations in float32
    call: float  # seconds that one evaluation of a network takes at least: some hundred small kernels, started one by one
    cpu: float  # its processor beside one core of the machine that the constants below were measured on


CARDS = {
    "H100, 80 GB": Card(150e12, 25e12, 0.008, 5),
    "T4, 16 GB": Card(20e12, 4e12, 0.012, 1.5),
    "laptop's, 8 GB": Card(25e12, 6e12, 0.008, 3),
}
RUNS = (("full", "bundled"), ("full", "hub"), ("quick", "hub"))
SECTIONS = ("foundations", "exercise-1", "exercise-2", "exercise-3", "exercise-4", "exercise-5", "stability", "speed")
DISTANCE = {"FID": 2.78, "FD-EffNet": 0.29}  # seconds of both distances of 2,048 images on one core; N^1.6
FEATURES = {"FID": 11.4e9, "FD-EffNet": 0.8e9}  # operations for one image
TEXT = {"text2image": 2e9, "stable-diffusion-v1-5": 800e9, "ldm-text2im-large-256": 200e9}  # operations of one evaluation
STEP = {"exercise-4": 0.003, "stability": 0.012}  # seconds of one training step: small networks, so the calls decide
FIXED = 10.0  # seconds of a section for figures, tables and files
JUDGE = 0.4  # minutes of one core for scoring the tables of one seed (exercise 4)


def planned(profile: str, source: str) -> tuple:
    """(the set-up as a module, section -> [(checkpoint, images, evaluations of each)]) of a profile, nothing being computed."""
    plans: dict[str, list] = {}
    record = pd.read_csv(ROOT / "outputs/results/foundations.csv")
    record = record[record["metric"] == "gflop_per_evaluation"].set_index("dataset")["value"]
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        nb = set_up("costs", PROFILE=profile, SOURCE="bundled", OUTPUT_DIR=scratch)
        nb.SOURCE_IN_FORCE, nb.DEVICE = source, torch.device("cuda")

        def section(name: str, work: list = ()) -> None:
            plans[name] = [*work]

        def network(name: str, gflop: float, wide: bool) -> object:
            spec = nb.DATA[name]
            made = nb.Checkpoint(
                name, source if spec.model else "bundled", None, (spec.channels, spec.size, spec.size), nb.ALPHA_BAR, "0" * 64
            )
            return nb.replace(made, dtype=torch.float16 if wide else torch.float32, control=gflop * 1e9)

        known = {n: (spec.gflop if source == "hub" and spec.model else record.get(n, 0)) for n, spec in nb.DATA.items()}
        networks = [network(n, known[n], n != "mnist") for n in nb.PROFILES[profile][source] if known[n]]
        nb.Section, nb.at_hand = section, lambda: networks
        begun = {cell: source for tag in SECTIONS for cell, source in cells_tagged(tag)}
        nb.text_model = lambda where, source, **given: type("Text", (), {"name": nb.Path(where).name, "source": source})
        nb.torch.backends.cudnn.allow_tf32 = False
        for cell in ("found-begin", "e1-begin", "e2-begin", "e3-begin", "e4-begin", "e5-begin", "stab-begin"):
            execute(nb, cell, begun[cell])
        sizes = begun["speed-begin"].split("SPEED_STEPS, SPEED_BATCH, SPEED_REPEATS = ")[1].split("\n")[0]
        steps, batch, repeats = eval(sizes, nb.__dict__)
        chosen = next((c for c in networks if c.name == "cifar10"), networks[0])
        plans["speed"] = [(chosen, 5 * batch * (repeats + 1), steps)]
    return nb, plans


def minutes(card: Card, nb: object, plans: dict, profile: str, source: str) -> dict[str, float]:
    """Section -> minutes on a card."""
    metric, spent = "FID" if source == "hub" else "FD-EffNet", {}
    for section, work in plans.items():
        seconds = FIXED + (30.0 if section == "speed" else 0.0)  # torch.compile
        for model, images, evaluations in work:
            operations = TEXT.get(model.name) or model.control
            rate = card.single if getattr(model, "dtype", torch.float16) == torch.float32 else card.half
            batch = min(nb.batch_of(model), images) if model.name in nb.DATA else 32
            calls = math.ceil(images / batch) * evaluations
            seconds += max(images * evaluations * operations / rate, calls * card.call)
        spent[section] = seconds
    of = lambda N: DISTANCE[metric] * (N / 2048) ** 1.6 / card.cpu  # noqa: E731
    pictures = lambda N: N * FEATURES[metric] / card.single  # noqa: E731
    for plan in (nb.PROFILES[profile][c.source][c.name] for c in nb.E1_MODELS):
        sampled = len(plan.ddim) + len(plan.ddpm)
        spent["exercise-1"] += 9 * sampled * of(plan.N) + sampled * pictures(plan.N)
        if source == "hub":  # real images, once: features, and the floors
            spent["foundations"] += pictures(20_000) + 60 * of(512)
    members = len(nb.FAMILY) * len(nb.E3_STEPS)
    spent["exercise-3"] += 9 * members * of(nb.E3_N) + members * pictures(nb.E3_N)
    spent["foundations"] += pictures(nb.FOUND_N) + nb.FOUND_N / 16 * of(32) + 4 * 9 * of(nb.CONTROL_N)
    spent["exercise-4"] = FIXED + nb.E4_RUNS * (nb.E4_STEPS * STEP["exercise-4"] + 60 * JUDGE / card.cpu)
    spent["stability"] = FIXED + nb.STAB_SEEDS * (nb.STAB_STEPS * STEP["stability"] + 12 * nb.STAB_EQUAL * card.call)
    return {section: spent[section] / 60 for section in SECTIONS}


def table() -> str:
    """The README's table: a row for each section, a column for each card and what `auto` may choose on it."""
    columns = {}
    for profile, source in RUNS:
        nb, plans = planned(profile, source)
        for name, card in CARDS.items():
            if source == "bundled" or (profile == "full") == name.startswith("H100"):
                column = minutes(card, nb, plans, profile, source)
                columns[f"{name}: `{profile}`, {source} networks"] = column | {"in all": sum(column.values())}
    frame = pd.DataFrame(columns)
    order = [c for name in CARDS for c in frame if c.startswith(name)]
    shown = frame[order].map(lambda m: f"{m:.1f}").rename_axis("section")
    return shown.to_markdown(disable_numparse=True, colalign=["left"] + ["right"] * len(order))


if __name__ == "__main__":
    print(table())
