"""The notebook on CUDA, without a GPU: a device that refuses what CUDA refuses, and every section run on it."""

import copy
import functools
import gc
import io
import sys

import conftest
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import cells_tagged, execute, set_up
from device import CPU, CUDA, FakeCuda
from diffusers.training_utils import EMAModel
from shared import SECTIONS
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SAME = "on the same device"
TO_NUMPY = "can't convert cuda:0 device type tensor to numpy"


@pytest.fixture
def fake():
    with FakeCuda() as fake:
        yield fake


def square(device="cpu"):
    return torch.arange(1.0, 10.0).view(3, 3).to(device)


# ------------------------------------------------------------------------------------------- which tensors are on it


def by_default(device):
    with torch.device(device):
        return torch.ones(3)


MADE = {
    "zeros": lambda d: torch.zeros(3, device=d),
    "empty": lambda d: torch.empty(3, device=d),
    "full": lambda d: torch.full((3,), 2.0, device=d),
    "eye": lambda d: torch.eye(3, device=d),
    "arange": lambda d: torch.arange(3, device=d),
    "linspace": lambda d: torch.linspace(0, 1, 3, device=d),
    "logspace": lambda d: torch.logspace(0, 1, 3, device=d),
    "rand": lambda d: torch.rand(3, device=d),
    "randn": lambda d: torch.randn(3, device=d),
    "randint": lambda d: torch.randint(9, (3,), device=d),
    "randperm": lambda d: torch.randperm(3, device=d),
    "tensor": lambda d: torch.tensor([1, 2], device=d),
    "as_tensor of a list": lambda d: torch.as_tensor([1, 2], device=d),
    "as_tensor of an array": lambda d: torch.as_tensor(np.ones(2), device=d),
    "as_tensor of a tensor": lambda d: torch.as_tensor(torch.ones(2), device=d),
    "as_tensor of one on CUDA": lambda d: torch.as_tensor(torch.ones(2, device="cuda"), device=d),
    "by default": by_default,
    "zeros_like": lambda d: torch.zeros_like(torch.ones(2), device=d),
    "randn_like": lambda d: torch.randn_like(torch.ones(2, device=d)),
    "new_zeros": lambda d: torch.ones(2, device=d).new_zeros(3),
    "new_tensor": lambda d: torch.ones(2, device=d).new_tensor([3]),
    "to": lambda d: torch.ones(3).to(d),
    "to, and dtype": lambda d: torch.ones(3).to(d, torch.float64),
    "to device=": lambda d: torch.ones(3).to(device=torch.device(d)),
    "to another's": lambda d: torch.ones(3).to(torch.zeros(1, device=d)),
    "type_as": lambda d: torch.ones(3).type_as(torch.zeros(1, device=d)),
    "there and back": lambda d: torch.ones(3, device="cuda").to(d),
    "arithmetic": lambda d: (2 - square(d) * 2 + 1).exp(),
    "a view": lambda d: square(d)[1:].T.reshape(-1)[::2],
    "an element": lambda d: square(d)[0, 0],
    "iteration": lambda d: next(iter(square(d))),
    "split": lambda d: square(d).split(2)[1],
    "max": lambda d: square(d).max(1).indices,
    "one_hot": lambda d: F.one_hot(torch.tensor([1, 2], device=d)),
    "cov": lambda d: square(d).cov(),
    "linear": lambda d: torch.nn.Linear(3, 2).to(d)(square(d)),
    "a parameter": lambda d: torch.nn.Linear(3, 2).to(d).weight,
    "its data": lambda d: torch.nn.Linear(3, 2).to(d).weight.data,
    "a copied module's": lambda d: copy.deepcopy(torch.nn.Linear(3, 2).to(d)).weight,
    "a buffer": lambda d: torch.nn.BatchNorm1d(3).to(d).running_mean,
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_tensor_is_where_it_was_put(fake, make):
    there, here = make("cuda"), make("cpu")
    assert (there.device, there.is_cuda, there.is_cpu, there.get_device()) == (CUDA, True, False, 0)
    assert (here.device, here.is_cuda, here.is_cpu, here.get_device()) == (CPU, False, True, -1)
    assert there.cpu().device == there.to("cpu").device == CPU
    assert there.device == CUDA, "cpu() copies"
    assert here.cuda().device == CUDA
    assert here.device == CPU, "cuda() copies"
    assert there.to("cuda") is there


def test_a_copy_has_memory_of_its_own(fake):
    here = torch.zeros(3)
    for there in (here.cuda(), here.to("cuda"), torch.as_tensor(here, device="cuda")):
        there += 1
        back = there.cpu()
        there += 1
        assert (here.tolist(), back.tolist(), there.tolist()) == ([0] * 3, [1] * 3, [2] * 3)


def test_a_label_ends_with_its_tensor(fake):
    for _ in range(300):
        there = [torch.ones(5, device="cuda") for _ in range(10)]
        assert all(t.is_cuda for t in there)
        del there
        assert not any(torch.ones(5).is_cuda for _ in range(10)), "the same memory may come again"
    gc.collect()
    assert len(fake.labels) < 3000, "what is gone is forgotten"


def test_nothing_is_left_when_it_ends():
    before = torch.autocast, torch.Generator, torch.cuda.synchronize, torch.Tensor.device
    with FakeCuda():
        there = torch.ones(2).to("cuda")
        assert torch.cuda.is_bf16_supported()
        assert torch.cuda.get_device_capability() == (8, 0)
        assert torch.cuda.get_device_properties(0).total_memory > 0
        torch.cuda.synchronize()
    assert (torch.autocast, torch.Generator, torch.cuda.synchronize, torch.Tensor.device) == before
    assert there.device == CPU
    assert (there + torch.ones(2)).tolist() == [2, 2]


# ------------------------------------------------------------------------------------------------ what it refuses

LABELS = torch.tensor([0, 2, 1])
MIXED = {
    "add": lambda a, b: a + b,
    "rsub": lambda a, b: torch.rsub(a, b),
    "divide": lambda a, b: a / b,
    "power": lambda a, b: a**b,
    "compare": lambda a, b: a == b,
    "equal": lambda a, b: torch.equal(a, b),
    "in place": lambda a, b: a.add_(b),
    "augmented": lambda a, b: a.__imul__(b),
    "out": lambda a, b: torch.exp(a, out=b),
    "matmul": lambda a, b: a @ b,
    "cat": lambda a, b: torch.cat([a, b]),
    "stack": lambda a, b: torch.stack((a, b)),
    "stack numbers": lambda a, b: torch.stack([a[0, 0], b[0, 0]]),
    "where": lambda a, b: torch.where(a > 2, a, b),
    "masked_fill": lambda a, b: a.masked_fill(b > 2, 0.0),
    "lerp": lambda a, b: a.lerp(b, 0.5),
    "cdist": lambda a, b: torch.cdist(a, b),
    "linear": lambda a, b: F.linear(a, b),
    "conv2d": lambda a, b: F.conv2d(a[None, None], b[None, None]),
    "attention": lambda a, b: F.scaled_dot_product_attention(a[None], b[None], b[None]),
    "batch_norm": lambda a, b: F.batch_norm(a, b[0], b[1]),
    "mse_loss": lambda a, b: F.mse_loss(a, b),
    "cross_entropy": lambda a, b: F.cross_entropy(a, LABELS.to(b.device)),
    "embedding": lambda a, b: F.embedding(LABELS.to(a.device), b),
    "gather": lambda a, b: a.gather(0, LABELS.to(b.device)[None]),
    "index_select": lambda a, b: a.index_select(0, LABELS.to(b.device)),
    "index_select by a number": lambda a, b: a.index_select(0, LABELS.to(b.device)[1]),
    "write at an index": lambda a, b: a.__setitem__(LABELS.to(a.device), b),
    "foreach": lambda a, b: torch._foreach_add_([a, a], [b, b]),
    "foreach by a number": lambda a, b: torch._foreach_mul_([a, a], b[0, 0]),
    "a module": lambda a, b: torch.nn.Linear(3, 3).to(a.device)(b),
    "a loss's gradient": lambda a, b: setattr(a, "grad", b),
    "by a keyword": lambda a, b: torch.add(a, other=b),
    "eigenvalues": lambda a, b: torch.linalg.solve(a + torch.eye(3).to(a.device), b),
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_tensors_of_two_devices_do_not_meet(fake, mix):
    for device in ("cpu", "cuda"):
        mix(square(device), square(device))  # so it is the mixture that is refused below
    for a, b in (("cuda", "cpu"), ("cpu", "cuda")):
        with pytest.raises(RuntimeError, match=f"{SAME}|assigned grad has data located on a different device"):
            mix(square(a), square(b))


def test_a_number_of_the_cpu_is_taken(fake):
    there, number = square("cuda"), torch.tensor(2.0)
    for result in (there + number, number * there, there / number, there**number, number - there, there.clamp(min=number)):
        assert result.is_cuda
    assert torch.where(there > number, there, number).is_cuda
    assert there.add_(number).tolist() == (square() + 2).tolist()
    for refused in (lambda: square() + number.cuda(), lambda: number.add_(number.cuda()), lambda: square().mul_(number.cuda())):
        with pytest.raises(RuntimeError, match=SAME):
            refused()


def test_what_indexes_what(fake):
    there, here, index = square("cuda"), square(), torch.tensor([2, 0])
    for by in (index, index.cuda(), here[:, 0] > 1, index[0], index[0].cuda(), [0, 1], np.array([0, 1]), (slice(None), index)):
        assert there[by].is_cuda
    assert here[index].device == here[index.cuda()[0]].device == CPU, "a number on CUDA is read"
    for by in (index.cuda(), here.cuda()[:, 0] > 1, (slice(None), index.cuda())):
        with pytest.raises(RuntimeError, match="indices should be either on cpu"):
            here[by]
        with pytest.raises(RuntimeError, match="indices should be either on cpu"):
            here[by] = 0.0
    there[1:], there[0], there[index] = here[1:], here[0], torch.tensor(5.0)  # copies
    assert there.is_cuda
    assert there.cpu().tolist() == [[5] * 3, [4, 5, 6], [5] * 3]
    for value in (here[:2], here[0]):
        with pytest.raises(RuntimeError, match=SAME):
            there[index] = value
        with pytest.raises(RuntimeError, match=SAME):
            there.index_put_((index,), value)


def test_copy_takes_from_any_device(fake):
    there, here = torch.zeros(3, 3, device="cuda"), torch.zeros(3, 3)
    assert there.copy_(square()).is_cuda
    assert here.copy_(there).device == CPU
    assert here.equal(square())
    network = torch.nn.Linear(3, 3).to("cuda")
    network.load_state_dict({"weight": square(), "bias": torch.zeros(3)})
    assert network.weight.is_cuda
    assert network.weight.tolist() == square().tolist()


NUMPY = {
    "asarray": np.asarray,
    "stack": lambda t: np.stack([t, t]),
    "interp": lambda t: np.interp(t, [0, 1], [0, 1]),
    "from_dlpack": np.from_dlpack,
    "numpy": torch.Tensor.numpy,
    "savez": lambda t: np.savez(io.BytesIO(), t=t),
    "Series": lambda t: pd.Series(t[0]).to_numpy(float),
}


@pytest.mark.parametrize("convert", NUMPY.values(), ids=NUMPY)
def test_numpy_sees_the_cpu_alone(fake, convert):
    convert(square())
    with pytest.raises(TypeError, match=TO_NUMPY):
        convert(square("cuda"))


def test_numbers_are_read_from_it(fake):
    there = square("cuda")
    assert there.tolist() == square().tolist()
    assert (there[0, 1].item(), float(there[0, 1]), int(there[0, 1]), f"{there[0, 1]:.1f}") == (2.0, 2.0, 2, "2.0")
    assert (len(there), tuple(there.shape), there.dtype, bool((there > 0).all())) == (3, (3, 3), torch.float32, True)
    assert "2." in repr(there)


def test_a_generator_belongs_to_a_device(fake):
    here, there = (torch.Generator(device).manual_seed(0) for device in ("cpu", "cuda"))
    draws = (
        lambda g, d: torch.randn(3, generator=g, device=d),
        lambda g, d: torch.randint(9, (3,), generator=g, device=d),
        lambda g, d: torch.empty(3, device=d).normal_(generator=g),
        lambda g, d: torch.multinomial(torch.ones(3, device=d), 2, generator=g),
    )
    for draw in draws:
        assert draw(here, "cpu").device == CPU
        assert draw(there, "cuda").device == CUDA
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
            draw(here, "cuda")
        with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
            draw(there, "cpu")
    assert torch.randn(3, generator=here).to("cuda").is_cuda


# ------------------------------------------------------------------------------------------------------- training

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1),
    "AdamW, one by one": lambda p: torch.optim.AdamW(p, 0.1, foreach=False),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
}


def trained(make, device):
    """Weights of a network, of its averages and its gradients' norm after three steps on a device."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 3)).to(device)
    averaged, ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9)), EMAModel(network.parameters(), decay=0.9)
    optimizer, other = make(network.parameters()), copy.deepcopy(network)
    for _ in range(3):
        loss = (network(square(device)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        averaged.update_parameters(network)
        ema.step(network.parameters())
    ema.copy_to(other.parameters())
    found = {"trained": network, "averaged": averaged.module, "ema": other}
    found = {f"{k} {n}": p for k, m in found.items() for n, p in m.named_parameters()} | {"norm": norm}
    found |= {f"gradient {n}": p.grad for n, p in network.named_parameters()}
    assert all(v.device.type == device for v in found.values())
    return {k: v.detach().cpu() for k, v in found.items()}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_on_it_is_the_cpus(fake, make):
    there, here = trained(make, "cuda"), trained(make, "cpu")
    assert there.keys() == here.keys()
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, msg=name)


def test_a_network_and_its_data_must_be_on_one_device(fake):
    network = torch.nn.Linear(3, 3).to("cuda")
    with pytest.raises(RuntimeError, match=SAME):
        (network(square("cuda")) - square()).square().mean().backward()
    moments, optimizer = torch.zeros(3, 3), torch.optim.AdamW(network.parameters(), fused=True)
    network(square("cuda")).mean().backward()
    optimizer.step()
    optimizer.state[network.weight]["exp_avg"] = moments
    with pytest.raises(RuntimeError, match=SAME):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_and_can_be_turned_off(fake, dtype):
    network = torch.nn.Linear(3, 3).to("cuda")
    for enabled in (True, False):
        with torch.autocast("cuda", dtype, enabled=enabled):
            result = network(square("cuda"))
        assert (result.dtype, result.device) == (dtype if enabled else torch.float32, CUDA)
    assert fake.network == {("cuda", dtype): 1, ("cuda", torch.float32): 1}


# --------------------------------------------------------------------------------------------------- the notebook


def prepared(name, folder, device, half=None):
    """The set-up, executed and told its device and the 16-bit numbers in use; small batches, for the sake of this CPU."""
    module = set_up(name, PROFILE="smoke", SOURCE="bundled", OUTPUT_DIR=str(folder))
    module.DEVICE, module.HALF = torch.device(device), half
    if device == "cuda":
        module.batch_of = lambda checkpoint: 8  # a GPU's are of thousands
    return module


def run_section(module, section):
    for cell_id, source in conftest.cells_tagged(section):
        execute(module, cell_id, source)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if name.startswith("device-")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def on_cuda(tmp_path_factory):
    """(run a section once, layers of networks by place and precision; the folder of the results)."""
    folder, fake = tmp_path_factory.mktemp("cuda"), FakeCuda()
    module = prepared("device-cuda", folder, "cuda")

    @functools.cache
    def ran(section):
        fake.network.clear()
        with fake:
            run_section(module, section)
        return dict(fake.network)

    return ran, folder


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_runs_on_it_and_no_network_on_the_cpu(on_cuda, section):
    assert set(on_cuda[0](section)) == {("cuda", torch.float32)}


def test_the_summary_needs_no_network(on_cuda):
    assert on_cuda[0]("summary") == {}


def test_its_rows_are_the_cpus(on_cuda, tmp_path):
    run, folder = on_cuda
    run("exercise-1")
    run_section(prepared("device-cpu", tmp_path, "cpu"), "exercise-1")
    both = [pd.read_csv(path / "results/exercise-1.csv", dtype={"N": str, "steps": str}) for path in (folder, tmp_path)]
    keys = [c for c in both[0] if c not in ("run", "value", "low", "high")]
    cuda, cpu = (rows.fillna("").set_index(keys)["value"] for rows in both)
    assert list(cuda.index) == list(cpu.index)
    distances = cuda.index.get_level_values("metric") == "FD-EffNet"
    assert distances.sum() >= 6
    assert [*cuda[distances]] == pytest.approx([*cpu[distances]], rel=1e-3)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_runs_on_it(fake, tmp_path, half):
    run_section(prepared("device-half", tmp_path, "cuda", half), "speed")
    assert fake.network["cuda", half] > 0
    assert {place for place, _ in fake.network} == {"cuda"}


FAULTS = [  # section, what is taken for what in its cells and the set-up's
    ("exercise-1", "device=DEVICE", "device='cpu'"),
    ("exercise-1", ".to(DEVICE", ".to('cpu'"),
    ("exercise-1", ".cpu()", ""),
    ("exercise-4", ".cpu()", ""),
    ("exercise-4", "device=DEVICE", "device='cpu'"),
    ("exercise-5", ".cpu()", ""),
    ("stability", ".to(DEVICE", ".to('cpu'"),
    ("stability", ".cpu()", ""),
]


@pytest.mark.parametrize(("section", "right", "wrong"), FAULTS)
def test_a_forgotten_move_is_found(fake, monkeypatch, tmp_path, section, right, wrong):
    told = [(i, source) for i, source in cells_tagged("setup", section) if right in source]
    assert told
    monkeypatch.setattr(conftest, "cells_tagged", lambda *tags: [(i, s.replace(right, wrong)) for i, s in cells_tagged(*tags)])
    module = prepared("device-faulty", tmp_path, "cuda")
    with pytest.raises((RuntimeError, TypeError), match=f"{SAME}|{TO_NUMPY}"):
        run_section(module, section)
