"""scripts/plan.py: the model by hand, what it counts against what happens, and the commands."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import Processes
from helpers import ROOT, refusal, write_images
from torch import nn

sys.path.insert(0, str(ROOT / "scripts"))
import plan  # noqa: E402
import plan_measure  # noqa: E402
import plan_model  # noqa: E402
from plan_model import Cluster  # noqa: E402

MB = 1e6

# A device that takes 10 ms + 1 ms per image, 4 + 0.5 of them for the backward pass.
MEASURED = {
    "settings": {
        "arch": "resnet18", "image_size": 100, "small_stem": False, "moco_dim": 128,
        "moco_k": 65536, "mlp": True, "amp": "off", "aug_plus": False,
    },
    "machine": {"cpu": "a CPU", "gpu": "a GPU", "torch": "2.0", "date": "2026-01-01"},
    "device": "cuda",
    "device_bytes": 2e9,
    "steps": [
        {"images": n, "seconds": 0.010 + 0.001 * n, "backward_seconds": 0.004 + 0.0005 * n}
        for n in (8, 16, 64)
    ],
    "parameter_bytes": 100 * MB,
    "buffer_bytes": 2 * MB,
    "activations": {"fixed": MB, "per_image": 10 * MB},
    "key_forward": {"fixed": 0, "per_image": 2 * MB},
    "pair_seconds": 0.010,
}  # fmt: skip
FLAGS = "-a resnet18 --image-size 100 --mlp".split()


def changed(**figures: object) -> dict:
    return {**copy.deepcopy(MEASURED), **figures}


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"measured": MEASURED}), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------


def test_fit_finds_the_line_that_made_the_times() -> None:
    images = [4, 8, 32, 128]
    assert plan_model.fit(images, [0.02 + 0.003 * n for n in images]) == pytest.approx((0.02, 3e-3))
    rng = np.random.default_rng(0)
    noisy = [(0.02 + 0.003 * n) * rng.uniform(0.97, 1.03) for n in images]
    assert plan_model.fit(images, noisy) == pytest.approx((0.02, 3e-3), rel=0.1)


def test_fit_has_no_negative_part() -> None:
    a, b = plan_model.fit([2, 4, 8], [1.0, 3.0, 7.0])  # -1 + n
    assert a == 0 and 0.5 < b < 1
    a, b = plan_model.fit([2, 4, 8], [3.0, 2.0, 1.0])
    assert b == 0 and 1 < a < 3


def test_network_bytes_by_hand() -> None:
    assert plan_model.network_bytes(MEASURED, 32, 4) == {
        "all_reduce": 150 * MB,  # 2 * 3/4 of the gradients
        "shuffle": 24 * 30_000,  # 3/4 of 32 images of 3 * 100 * 100 bytes
        "gather": 96 * 512,  # 32 keys of each of the three others, 128 floats each
    }
    assert set(plan_model.network_bytes(MEASURED, 32, 1).values()) == {0.0}


COUNTED = f"""
import json, sys
from types import SimpleNamespace
import torch, torch.distributed as dist
sys.path.insert(0, {str(ROOT / "scripts")!r})
import plan_measure
from moco.launch import launch
from moco import distributed
from moco.train import step as training

out = sys.argv[1]
received = {{"shuffle": 0, "gather": 0, "all_reduce": 0}}
exchange, gather = dist.all_to_all_single, dist.all_gather_into_tensor

def counted_exchange(output, input, sizes, *more):
    row = output[0].numel() * output.element_size()
    received["shuffle"] += row * sum(s for r, s in enumerate(sizes) if r != dist.get_rank())
    exchange(output, input, sizes, *more)

def counted_gather(output, input):
    received["gather"] += output.numel() * output.element_size() - input.numel() * 4
    gather(output, input)

def counted_reduction(state, bucket):
    world = dist.get_world_size()
    received["all_reduce"] += 2 * (world - 1) // world * bucket.buffer().numel() * 4
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

def worker(device, _):
    args = SimpleNamespace(arch="resnet8", image_size=16, small_stem=False, moco_dim=32,
                           moco_k=256, mlp=True, amp="off")
    step = plan_measure.Step(args, 8, device)
    model = distributed.data_parallel(step.moco, device)
    model.register_comm_hook(None, counted_reduction)
    dist.all_to_all_single, dist.all_gather_into_tensor = counted_exchange, counted_gather
    for _ in range(STEPS):
        training.forward_and_backward(model, *step.views, device, step.options, step.guard)
    if dist.get_rank() == 0:
        size = sum(p.numel() * 4 for p in step.moco.encoder_q.parameters())
        json.dump([received, size], open(out, "w"))

launch(worker, None, devices=[torch.device("cpu")])
""".replace("STEPS", "30")


def test_network_bytes_are_those_of_a_step_on_two_processes(tmp_path: Path) -> None:
    """Rows, keys and gradient buckets as they are handed to torch's collectives."""
    processes = Processes(tmp_path / "out", tmp_path / "seen.json", count=2, code=COUNTED)
    assert processes.wait() == [0, 0], processes.output()
    received, size = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    settings = {**MEASURED["settings"], "image_size": 16, "moco_dim": 32}
    expected = plan_model.network_bytes(changed(parameter_bytes=size, settings=settings), 8, 2)
    assert received["all_reduce"] == 30 * expected["all_reduce"]
    assert received["gather"] == 30 * expected["gather"]
    # Which rows change rank is drawn: 4 of 8 on average.
    assert received["shuffle"] == pytest.approx(30 * expected["shuffle"], rel=0.1)


def test_network_seconds_by_hand() -> None:
    """Two nodes of eight: within a node at 100, between nodes at 10 per GPU, 80 for a ring."""
    found = plan_model.network_seconds(MEASURED, 16, Cluster(8, 2, None, 100e9, 10e9))
    assert found["all_reduce"] == pytest.approx(187.5 * MB / 80e9)
    assert found["shuffle"] == pytest.approx(8 * 30_000 / 10e9)  # half of 16 images change node
    assert found["gather"] == pytest.approx(15 * 16 * 512 / 80e9)
    # One node is not slowed by adapters, nor a node of one GPU by what is inside of it.
    within = plan_model.network_seconds(MEASURED, 32, Cluster(8, 1, None, 100e9, 1))
    assert within["all_reduce"] == pytest.approx(175 * MB / 100e9)
    assert within["shuffle"] == pytest.approx(28 * 30_000 / 100e9)
    across = plan_model.network_seconds(MEASURED, 32, Cluster(1, 4, None, 1, 10e9))
    assert across["all_reduce"] == pytest.approx(150 * MB / 10e9)
    assert across["shuffle"] == pytest.approx(24 * 30_000 / 10e9)


def at(cluster: Cluster, figures: dict = MEASURED, batch: int = 256) -> dict:
    return plan_model.predict(figures, cluster, batch, 2560, 2)


def test_a_step_by_hand_and_its_limit() -> None:
    fast = at(Cluster(8, 1, None, 1e15, 1e15))
    assert fast["limit"] == "compute" and fast["step_seconds"] == pytest.approx(0.042)
    assert fast["images_per_s"] == pytest.approx(256 / 0.042)
    assert fast["hours"] == pytest.approx(20 * 0.042 / 3600)  # 2 epochs of 10 steps
    assert fast["cores_per_node"] == pytest.approx(256 * 0.010 / 0.042)

    # The loader: 256 pairs of 10 ms on 32 cores take 80 ms, on 64 cores 40 ms.
    slow = at(Cluster(8, 1, 32, 1e15, 1e15))
    assert slow["limit"] == "loader" and slow["step_seconds"] == pytest.approx(0.080)
    assert at(Cluster(8, 1, 64, 1e15, 1e15))["limit"] == "compute"
    # Without cores of its own it adds up: 32 pairs in each process.
    alone = at(Cluster(8, 1, 0, 1e15, 1e15))
    assert alone["step_seconds"] == pytest.approx(0.042 + 0.320) and alone["limit"] == "loader"
    # Two nodes have twice the cores.
    assert at(Cluster(4, 2, 16, 1e15, 1e15))["step_seconds"] == pytest.approx(0.080)


def test_the_all_reduce_hides_behind_the_backward_pass_of_a_gpu() -> None:
    """175 MB per step; the backward pass of 32 images takes 20 ms."""
    small = sum(28 * 30_000 / rate for rate in (10e9,)) + 7 * 32 * 512 / 10e9
    hidden = at(Cluster(8, 1, None, 10e9, 1))  # 17.5 ms
    assert hidden["network_seconds_not_hidden"] == pytest.approx(small)
    longer = at(Cluster(8, 1, None, 1e9, 1))  # 175 ms
    assert longer["network_seconds_not_hidden"] == pytest.approx(0.175 - 0.020 + 10 * small)
    assert longer["limit"] == "network"
    on_cpu = at(Cluster(8, 1, None, 10e9, 1), changed(device="cpu"))
    assert on_cpu["network_seconds_not_hidden"] == pytest.approx(0.0175 + small)


def test_memory_by_hand() -> None:
    alone = plan_model.memory_bytes(MEASURED, 32, 1)
    assert alone == {
        "both encoders": 204 * MB,
        "momentum": 100 * MB,
        "gradient buckets": 0,
        "queue": 65536 * 512,
        "images": 96 * 30_000,
        "activations": 321 * MB,
        "key forward or gradients": 100 * MB,  # of 64 and 100
    }
    several = plan_model.memory_bytes(MEASURED, 64, 2)
    assert several["gradient buckets"] == 100 * MB
    assert several["images"] == 5 * 64 * 30_000
    assert several["key forward or gradients"] == 128 * MB
    assert not at(Cluster(1, 1, None, 1, 1))["fits"]  # 256 images are more than 2 GB
    assert at(Cluster(8, 1, None, 1, 1))["fits"]


# ------------------------------------------------------------------------------------------------
# Plans
# ------------------------------------------------------------------------------------------------


def planned(*flags: object, out: Path, capsys: pytest.CaptureFixture) -> tuple[dict, str]:
    plan.main([*map(str, flags), "--out", str(out)])
    return json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out


def test_where_adding_gpus_stops_paying(measured, tmp_path, capsys) -> None:
    """10 + 256/W ms: 64 GPUs take 14 ms and 128 take 12, the first time below 1.25; 32 take 18."""
    found, said = planned(
        *FLAGS, "--gpus", 8, "--measured", measured, "--intra-gbs", 1e6, "--inter-gbs", 1e6,
        out=tmp_path / "plan.json", capsys=capsys,
    )  # fmt: skip
    assert [row["gpus"] for row in found["rows"]] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert [row["nodes"] for row in found["rows"]] == [1, 1, 1, 1, 2, 4, 8, 16]
    milliseconds = [1e3 * row["step_seconds"] for row in found["rows"]]
    assert milliseconds == pytest.approx([10 + 256 / 2**i for i in range(8)], rel=1e-3)
    assert found["rows"][3] == found["plan"]
    assert found["plan"]["efficiency"] == pytest.approx(266 / 42 / 8, rel=1e-3)
    assert found["stops_paying_at"] == 64
    assert "adding GPUs stops paying at 64" in said and "12.0 ms, 10.0 do not shrink" in said
    # 256 images are more than the 2 GB of the device, and more than was measured.
    assert not found["rows"][0]["fits"] and "does not fit, extrapolated" in said
    assert [row["extrapolated"] for row in found["rows"]] == [True, True] + [False] * 4 + [True] * 2


def test_a_slow_network_or_loader_stops_it_earlier(measured, tmp_path, capsys) -> None:
    common = (*FLAGS, "--gpus", 8, "--measured", measured)
    out = {"out": tmp_path / "plan.json", "capsys": capsys}
    found, said = planned(*common, "--inter-gbs", 0.1, **out)
    assert found["stops_paying_at"] == 8  # the second node comes over the network
    assert found["rows"][4]["limit"] == "network" and "limit: network" in said
    found, said = planned(*common, "--cores", 16, **out)
    # 16 cores make 256 pairs in 160 ms: two GPUs take 138, so already they wait.
    assert [row["limit"] for row in found["rows"][:4]] == ["compute", *["loader"] * 3]
    assert found["stops_paying_at"] == 2
    # 42 ms of computing, and a little network, for 256 pairs of 10 ms.
    assert "60.9 cores per node to keep up, 16 given" in said


@pytest.mark.parametrize(
    ("batch", "gpus", "note"),
    [
        (256, 8, "groups of 32, as in"),
        (256, 2, "groups of 32, as in"),
        (128, 8, "one group of 16 on each GPU"),
        (96, 2, "48 is no multiple"),
    ],
)
def test_batch_norm_is_that_of_the_run(batch, gpus, note, measured, tmp_path, capsys) -> None:
    _, said = planned(
        *FLAGS, "-b", batch, "--gpus", gpus, "--measured", measured,
        out=tmp_path / "plan.json", capsys=capsys,
    )  # fmt: skip
    assert note in said


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A convolution, a ReLU, a mean and a linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).relu().mean(dim=(2, 3)))


class Fake:
    """As much of a `plan_measure.Step` as `activation_bytes` uses."""

    def __init__(self, encoder: nn.Module, images: torch.Tensor) -> None:
        self.device, self.options = torch.device("cpu"), SimpleNamespace(amp="off")
        self.moco = SimpleNamespace(
            encoder_q=encoder, encoder_k=encoder, prepare=torch.Tensor.float
        )
        self.views = [images]


@pytest.mark.parametrize("n", [2, 5])
def test_activations_of_a_small_network_by_hand(n: int) -> None:
    images = torch.zeros(n, 3, 8, 8, dtype=torch.uint8)
    kept, passing = plan_measure.activation_bytes(Fake(Encoder(16), images))
    # The convolution keeps its input, the ReLU its output, the linear layer its own; and features.
    assert kept == 4 * n * (3 * 8 * 8 + 4 * 6 * 6 + 4 + 16)
    # Nothing is kept of keys but what is in use: at most input, convolution's output, ReLU's.
    assert passing == 4 * n * (3 * 8 * 8 + 2 * 4 * 6 * 6)


def test_activations_are_what_autograd_saves() -> None:
    args = SimpleNamespace(arch="resnet18", image_size=32, small_stem=True, moco_dim=16,
                           moco_k=64, mlp=True, amp="off")  # fmt: skip
    step = plan_measure.Step(args, 3, torch.device("cpu"))
    kept, _ = plan_measure.activation_bytes(step)
    own = {t.untyped_storage().data_ptr() for t in step.moco.state_dict().values()}
    saved = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = step.moco.encoder_q(step.moco.prepare(step.views[0]))
    total = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)
    assert kept == total + features.numel() * 4
    assert total > 3 * 64 * 32 * 32 * 4 * 10  # ten and more maps of the first stage


TINY = "-a resnet8 --image-size 16 --moco-k 64 --moco-dim 32 -b 16 --gpus 4 --repeats 5".split()


def test_measure_once_and_plan_often(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_images(tmp_path / "data", {"a": 6}, size=24)
    first, said = planned(
        *TINY, tmp_path / "data", "--measure-batches", 4, 2, 8,
        out=tmp_path / "new" / "first.json", capsys=capsys,
    )  # fmt: skip
    figures = first["measured"]
    assert [entry["images"] for entry in figures["steps"]] == [2, 4, 8]
    for entry in figures["steps"]:
        assert 0 < entry["backward_seconds"] < entry["seconds"] < 10
    # resnet8 with 32 outputs: stem, three stages with their shortcuts, linear layer.
    assert figures["parameter_bytes"] == 4 * (464 + 4672 + 14528 + 57728 + 2080)
    assert figures["device"] == "cpu" and "every GPU below is one such CPU" in said
    assert 0 < figures["pair_seconds"] < 0.1
    assert first["plan"]["images_per_gpu"] == 4 and not first["plan"]["extrapolated"]

    again, _ = planned(
        *TINY, "--measured", tmp_path / "new" / "first.json",
        out=tmp_path / "again.json", capsys=capsys,
    )  # fmt: skip
    assert (again["plan"], again["rows"]) == (first["plan"], first["rows"])
    status, line = refusal(
        plan.main, [*TINY, "--mlp", "--measured", tmp_path / "again.json"], capsys
    )
    assert status == 2 and "mlp False, this plan is for True" in line


# ------------------------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("-a resnet51", "did you mean"),
        ("--gpus 0", "--gpus must be at least 1, got 0"),
        ("--nodes -1", "--nodes must be at least 1"),
        ("--gpus 3", "--batch-size 256 is over all GPUs and must be a multiple"),
        ("--gpus 8 --nodes 32", "with at least two images for each; use 512"),
        ("--cores -1", "--cores must be at least 0"),
        ("--intra-gbs 0", "--intra-gbs must be a positive number"),
        ("--inter-gbs nan", "--inter-gbs must be a positive number"),
        ("--images 100", "--images 100 are fewer than one batch of 256"),
        ("--epochs 0", "--epochs must be at least 1"),
        ("--moco-k 128", "--moco-k 128 is smaller"),
        ("--image-size 0", "--image-size must be at least 1"),
        ("-a vit_b_16 --image-size 50", "vit_b_16 with images of 50 pixels"),
        ("-a vgg11 --small-stem", "--small-stem is for"),
        ("--device tpu", "--device must be cpu or cuda"),
        ("--device cuda:77", "GPU(s) visible"),
        ("--device cpu --amp fp16", "--amp fp16 needs a GPU"),
        ("--repeats 4", "at least 5 repeats"),
        ("--measure-batches 8", "two different sizes"),
        ("--measure-batches 1 8", "at least 2 images"),
        ("--measure-batches 8 99999", "more than the --moco-k"),
        ("/no/such/folder", "no such data folder"),
        ("--measured nowhere.json", "cannot read nowhere.json"),
        ("--measured x.json --measure-batches 2 4", "takes the place of measuring"),
        ("--check resnet18", "--check expects ARCH:PIXELS:BATCH, got 'resnet18'"),
        ("--check resnet18:64:x", "--check expects"),
        ("--check resnet18:64:6", "multiple of 4"),
        ("--check resnet1:64:8", "unknown arch"),
        ("--check --measured x.json", "--check measures for itself"),
        ("--out .", "is a folder"),
        ("--frobnicate", "unrecognized"),
    ],
)
def test_refused_at_once(flags: str, part: str, capsys: pytest.CaptureFixture) -> None:
    status, line = refusal(plan.main, flags.split(), capsys)
    assert status == 2 and part in line, line


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "holds no figures"),
        ("[]", "holds no figures"),
        ('{"rows": []}', "no 'measured'"),
        (json.dumps({"measured": changed(steps=MEASURED["steps"][:1])}), "two batch sizes"),
        (json.dumps({"measured": changed(pair_seconds=-1)}), "not positive"),
        (json.dumps({"measured": changed(pair_seconds=math.nan)}), "not positive"),
        (json.dumps({"measured": changed(parameter_bytes="many")}), "holds no figures"),
        (json.dumps({"measured": changed(machine={})}), "no 'cpu'"),
        (json.dumps({"measured": changed(device="abacus")}), "holds no figures"),
        (json.dumps({"measured": {}}), "holds no figures"),
    ],
)
def test_a_file_that_holds_no_figures(content, part, tmp_path, capsys) -> None:
    path = tmp_path / "measured.json"
    path.write_text(content, encoding="utf-8")
    status, line = refusal(plan.main, [*FLAGS, "--measured", path], capsys)
    assert status == 2 and part in line, line


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("-a resnet50 --image-size 100 --mlp", "arch resnet18, this plan is for resnet50"),
        ("-a resnet18 --mlp", "image_size 100, this plan is for 224"),
        ("-a resnet18 --image-size 100", "mlp True"),
        ("-a resnet18 --image-size 100 --mlp --amp bf16", "amp off"),
        ("-a resnet18 --image-size 100 --mlp --moco-k 4096", "moco_k 65536"),
        ("-a resnet18 --image-size 100 --mlp --small-stem", "small_stem False"),
    ],
)
def test_figures_of_another_run_are_refused_by_name(flags, name, measured, capsys) -> None:
    status, line = refusal(plan.main, [*flags.split(), "--measured", measured], capsys)
    assert status == 2 and name in line, line


# ------------------------------------------------------------------------------------------------
# Against real runs
# ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_predictions_are_held_against_runs(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "plan.py"), "--device", "cpu", "--moco-k", "64",
         "--repeats", "5", "--check", "resnet8:16:8", "--out", str(out)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["check"]["rows"]
    assert [row["unit"] for row in rows] == ["MiB", "images/s", "images/s", "images/s"]
    for row in rows:
        assert row["what"] in done.stdout
        assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    one, two, sharing = (row["prediction"] for row in rows[1:])
    assert (one["images_per_gpu"], two["images_per_gpu"]) == (8, 4)
    assert sum(two["network_seconds"].values()) > 0 == sum(one["network_seconds"].values())
    assert rows[2]["measured"] == rows[3]["measured"]
