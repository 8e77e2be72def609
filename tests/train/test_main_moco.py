"""main_moco.py as a user meets it: command lines, refusals, run folders, exact resumption.

Everything runs on the CPU, in this process where a process of its own is not the point.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import FORKING, Processes
from helpers import TINY, differences, free_port, parsed, read_log, refusal, write_images

import main_moco
from moco import cli
from moco.config import PretrainConfig
from moco.log import versions_tested
from moco.tasks.moco import MoCoTask

pytestmark = pytest.mark.usefixtures("elsewhere")


def flat(argv: list) -> SimpleNamespace:
    """The flat values of a command line that has been checked."""
    return SimpleNamespace(**cli.pretrain_config(list(map(str, argv))).to_flat())


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """256 image files, for command lines that are parsed only."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(256):
        (folder / f"{i}.jpg").touch()
    return folder


def train(data: Path, *flags: object, seed: int = 1) -> None:
    main_moco.main([*TINY, *map(str, flags), "--seed", str(seed), str(data)])


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth.tar"))


# ---- Command lines -------------------------------------------------------------------------------

MOCO_LINE = (
    "-a resnet50 --lr 0.03 --batch-size 256 --dist-url 'tcp://localhost:10001' "
    "--multiprocessing-distributed --world-size 1 --rank 0 DIR"
)
ALIGN_UNIFORM_LINE = (
    "-a resnet50 --lr 0.03 --batch-size 128 --gpus 0 1 2 3 "
    "--multiprocessing-distributed --world-size 1 --rank 0 DIR"
)
DEFAULT_OBJECTIVE = "3 * align(alpha=2) + 1 * uniform(t=3, with intra-batch pairs)"


def words(line: str, folder: Path | str = "DIR") -> list[str]:
    return [str(folder) if word == "DIR" else word for word in shlex.split(line)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (MOCO_LINE, {}),
        (
            f"--mlp --moco-t 0.2 --aug-plus --cos {MOCO_LINE}",
            {"objective": "1 * InfoNCE(tau=0.2)", "mlp": True, "aug_plus": True, "cos": True},
        ),
        (f"{MOCO_LINE} --lr 0.015 --batch-size 128", {"lr": 0.015, "batch_size": 128}),
        ("DIR", {}),
    ],
    ids=["MoCo v1", "MoCo v2", "MoCo on 4 GPUs", "plain"],
)
def test_commands_of_upstream_parse_and_resolve(many, line, expected):
    config = cli.pretrain_config(words(line, many))
    args = SimpleNamespace(**config.to_flat())
    defaults = {
        "arch": "resnet50", "lr": 0.03, "batch_size": 256, "epochs": 200, "schedule": [120, 160],
        "momentum": 0.9, "weight_decay": 1e-4, "moco_dim": 128, "moco_k": 65536, "moco_m": 0.999,
        "image_size": 224, "data": str(many), "nodes": 1, "node_rank": 0,
        "objective": DEFAULT_OBJECTIVE, "mlp": False, "aug_plus": False, "cos": False,
    }  # fmt: skip
    for name, value in {**defaults, **expected}.items():
        assert getattr(args, name) == value, name
    assert args.processes == len(config.placement.devices)


@pytest.mark.parametrize(
    "line",
    [
        ALIGN_UNIFORM_LINE,
        "-a resnet50 --lr 0.03 -b 128 --gpus=0,1,2,3 --schedule 120 160 DIR",
        "-a resnet50 --lr 0.03 -b 128 --schedule 120 160 --gpus 0 1 2 3 -- DIR",
    ],
)
def test_gpus_and_schedule_end_where_the_numbers_end(line):
    args = parsed(words(line))
    assert args.gpus == [0, 1, 2, 3]
    assert args.schedule == [120, 160]
    assert (args.arch, args.lr, args.batch_size, args.data) == ("resnet50", 0.03, 128, "DIR")


def test_every_flag_of_the_ancestors_is_known():
    line = (
        "-j 4 --workers 5 --epochs 3 --start-epoch 1 -b 8 --batch-size 16 --lr 1 --learning-rate 2 "
        "--schedule --momentum 0.5 --wd 0.1 --weight-decay 0.2 -p 5 --print-freq 6 --resume R "
        "--world-size 2 --rank 1 --dist-url tcp://h:1 --dist-backend gloo --seed 7 --gpu 3 "
        "--multiprocessing-distributed --moco-dim 64 --moco-k 100 --moco-m 0.9 --moco-t 0.1 --mlp "
        "--aug-plus --cos --moco-contr-w 1 --moco-contr-tau 0.2 --moco-align-w 2 "
        "--moco-align-alpha 1 --moco-unif-w 3 --moco-unif-t 4 --moco-unif-no-intra-batch DIR"
    )
    args = cli.parser_of(PretrainConfig).parse_args(words(line))
    assert (args.workers, args.batch_size, args.lr, args.weight_decay) == (5, 16, 2.0, 0.2)
    assert (args.print_freq, args.gpu, args.rank, args.schedule) == (6, 3, 1, ())
    assert args.intra_batch is False


@pytest.mark.parametrize(
    ("flags", "formula"),
    [
        ("", DEFAULT_OBJECTIVE),
        ("--moco-t 0.07", "1 * InfoNCE(tau=0.07)"),
        ("--moco-contr-w 1 --moco-contr-tau 0.2 --moco-align-w 0 --moco-unif-w 0",
         "1 * InfoNCE(tau=0.2)"),
        # As a fork's README has it: parameters of terms that are off may be anything.
        ("--moco-contr-w 1.0 --moco-contr-tau 0.2 --moco-unif-w 0 --moco-unif-t 0 "
         "--moco-align-w 0 --moco-align-alpha 0", "1 * InfoNCE(tau=0.2)"),
        ("--moco-unif-no-intra-batch --moco-unif-t 2",
         "3 * align(alpha=2) + 1 * uniform(t=2, queue only)"),
        ("--moco-align-w 0 --moco-align-alpha 0.5", "1 * uniform(t=3, with intra-batch pairs)"),
        ("--symmetric", f"{DEFAULT_OBJECTIVE}, symmetric"),
        ("--moco-contr-w 0.25 --moco-align-alpha 1 --moco-unif-no-intra-batch",
         "0.25 * InfoNCE(tau=0.07) + 3 * align(alpha=1) + 1 * uniform(t=3, queue only)"),
    ],
)  # fmt: skip
def test_objective_as_a_formula(data, flags, formula):
    assert flat([*TINY, *shlex.split(flags), str(data)]).objective == formula


@pytest.mark.parametrize(
    ("batch", "ranks", "flags", "size", "groups", "span"),
    [
        (256, 1, "", 32, 8, 1),
        (256, 8, "", 32, 1, 1),
        (256, 2, "", 32, 4, 1),
        (256, 16, "", 32, 1, 2),  # 16 images on each device
        (256, 32, "", 32, 1, 4),
        (64, 1, "", 32, 2, 1),
        (32, 1, "", 16, 2, 1),  # within one group the shuffle would do nothing
        (48, 1, "", 24, 2, 1),
        (100, 1, "", 25, 4, 1),
        (200, 1, "", 25, 8, 1),
        (96, 2, "", 24, 2, 1),  # 48 on each: 32 does not fit
        (8, 1, "", 4, 2, 1),
        (7, 1, "", 7, 1, 1),  # warned of
        (256, 1, "--accumulate 8", 32, 1, 1),
        (256, 1, "--accumulate 16", 16, 1, 1),
        (256, 1, "--bn-splits 1", 256, 1, 1),
        (256, 2, "--bn-splits 16", 8, 16, 1),
        (256, 4, "--group-size 128", 128, 1, 2),
        (256, 2, "--group-size 8", 8, 16, 1),
    ],
)  # fmt: skip
def test_groups_are_of_32_images_or_nearly(
    many, monkeypatch, batch, ranks, flags, size, groups, span
):
    if ranks > 1:
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", ranks)):
            monkeypatch.setenv(name, str(value))
    line = [*TINY, "--moco-k", "256", "--batch-size", str(batch), *flags.split(), str(many)]
    config = cli.pretrain_config(line)
    assert config.placement.processes == ranks
    assert (config.group_size, config.bn_groups, config.group_span) == (size, groups, span)
    assert config.to_flat()["bn_group_size"] == config.to_flat()["loss_group_size"] == size


def test_a_seed_is_drawn_and_the_run_folder_named(many):
    first, second = (flat([*TINY[:-2], str(many)]) for _ in range(2))
    assert first.seed != second.seed and not first.seed_given
    assert Path(first.save_dir).parent == Path("results")
    for part in ("resnet8", "3align2", "1unif3", "k64", "b8", f"s{first.seed}"):
        assert part in Path(first.save_dir).name
    assert not Path("results").exists()  # only training makes it


# ---- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("", ["arguments are required: DIR"]),
        ("--mystery 3", ["unrecognized arguments: --mystery"]),
        ("--moco-align-w 0 --moco-unif-w 0", ["all loss weights are zero"]),
        ("--moco-align-w -1", ["--moco-align-w", "at least 0", "-1"]),
        ("--moco-unif-w nan", ["--moco-unif-w", "nan"]),
        ("--moco-align-alpha 0.5", ["--moco-align-alpha", "at least 1", "got 0.5"]),
        ("--moco-unif-t -2", ["--moco-unif-t", "positive", "got -2"]),
        ("--moco-contr-w 1 --moco-contr-tau 0", ["--moco-contr-tau", "positive", "got 0"]),
        ("--moco-t 0", ["--moco-t ", "positive", "got 0"]),
        ("--moco-t inf", ["--moco-t ", "positive", "got inf"]),
        ("--moco-t 0.2 --moco-contr-tau 0.2", ["--moco-t", "--moco-contr-tau"]),
        ("--moco-t 0.2 --moco-align-w 0", ["--moco-t", "--moco-align-w"]),
        ("--moco-t 0.2 --moco-unif-no-intra-batch", ["--moco-t", "--moco-unif-no-intra-batch"]),
        ("--moco-k 7", ["--moco-k 7", "smaller", "batch of 8"]),
        ("--moco-k 0", ["--moco-k", "got 0"]),
        ("--moco-dim 0", ["--moco-dim", "got 0"]),
        ("--moco-m 1.5", ["--moco-m", "[0, 1]", "1.5"]),
        ("-a resnt18", ["unknown arch 'resnt18'", "did you mean", "resnet18"]),
        ("-a nonsense", ["unknown arch 'nonsense'", "--help"]),
        ("-a squeezenet1_0", ["SqueezeNet", "linear layer", "choose another arch"]),
        ("-a inception_v3", ["inception_v3", "auxiliary", "choose another"]),
        ("-a mobilenet_v3_small --small-stem", ["--small-stem", "mobilenet"]),
        ("-a densenet121 --image-size 8", ["images of 8 pixels do not fit"]),
        ("--image-size 0", ["--image-size", "got 0"]),
        ("--resume missing.pth.tar", ["--resume", "missing.pth.tar"]),
        ("--amp fp16", ["--amp fp16", "GPU", "bf16"]),
        ("--amp fp8", ["--amp", "fp8", "bf16"]),
        ("--accumulate 0", ["--accumulate", "got 0"]),
        ("--accumulate two", ["--accumulate", "two"]),
        ("--accumulate 3", ["--accumulate 3", "batch of 8", "equal parts"]),
        ("--accumulate 8", ["--accumulate 8", "batch of 8", "two images"]),
        ("--accumulate 2 --bn-splits 8", ["--bn-splits 8", "batch of 4", "--accumulate 2"]),
        ("--symmetric --moco-k 15", ["--moco-k 15", "twice", "batch of 8", "--symmetric"]),
        ("--init-from nowhere.pth.tar", ["--init-from", "nowhere.pth.tar"]),
        ("--init-from ''", ["--init-from", "empty"]),
        ("--bn-splits 3", ["--bn-splits 3", "does not divide", "8"]),
        ("--bn-splits 8", ["--bn-splits 8", "one image"]),
        ("--bn-splits 0", ["--bn-splits", "'0'"]),
        ("--bn-splits many", ["--bn-splits", "'many'", "auto"]),
        ("--group-size 1", ["--group-size", "at least 2", "'1'"]),
        ("--group-size 3", ["--group-size 3 does not fit --batch-size 8", "2, 4, 8"]),
        ("--group-size 8 --accumulate 2", ["--group-size 8", "in 2 parts", "fit: 2, 4"]),
        ("--group-size 4 --bn-splits 2", ["--group-size and --bn-splits were both given"]),
        ("--lr nan", ["--lr", "nan"]),
        ("--lr -1", ["--lr", "-1"]),
        ("--wd nan", ["--weight-decay", "nan"]),
        ("--momentum inf", ["--momentum", "inf"]),
        ("--schedule-factor nan", ["--schedule-factor", "nan"]),
        ("--schedule=12x", ["--schedule", "12x"]),
        ("--schedule -5", ["--schedule"]),
        ("--mean nan 0 0", ["--mean"]),
        ("--seed 18446744073709551616", ["--seed"]),
        ("--save-dir ''", ["--save-dir"]),
        ("--resume ''", ["--resume"]),
        ("--device auto --gpus", ["--gpus"]),
        ("-a vit_b_16 --image-size 30", ["30"]),
        ("-a resnet18 --batch-size 1", ["--batch-size 1"]),
        ("--start-epoch 5 --epochs 5", ["--start-epoch"]),
        ("--dist-url localhost:10001", ["--dist-url"]),
        ("--dist-backend mystery", ["--dist-backend"]),
        ("--batch-size 0", ["--batch-size", "got 0"]),
        ("--batch-size 31", ["31", "30 images", "lower --batch-size"]),
        ("--epochs -1", ["--epochs", "-1"]),
        ("--start-epoch -1", ["--start-epoch", "-1"]),
        ("--max-steps -1", ["--max-steps", "-1"]),
        ("--warmup-epochs -1", ["--warmup-epochs", "-1"]),
        ("--print-freq 0", ["--print-freq", "got 0"]),
        ("--keep-last 0", ["--keep-last", "got 0"]),
        ("--keep-every -1", ["--keep-every", "-1"]),
        ("--knn-every -1", ["--knn-every must be at least 0, got -1"]),
        ("--knn-bank 0", ["--knn-bank must be at least 1, got 0"]),
        ("--images-per-class 0", ["--images-per-class", "got 0"]),
        ("-j -1", ["--workers", "-1"]),
        ("--seed -1", ["--seed", "-1"]),
        ("--crop-scale 0.5 0.2", ["--crop-scale", "0.5 0.2"]),
        ("--std 0 1 1", ["--std", "positive"]),
        ("--gpus 0 1", ["--device cpu", "[0, 1]"]),
        ("--device auto --gpu 99", ["GPU 99 does not exist"]),
        ("--gpu 0 --gpus 0 1", ["--gpu and --gpus"]),
        ("--world-size 0", ["--world-size", "got 0"]),
        ("--world-size 2", ["2 nodes", "--dist-url tcp://HOST:PORT"]),
        ("--world-size 2 --rank 2 --dist-url tcp://h:1", ["--rank 2", "0..1"]),
        ("--world-size 3 --rank 0 --dist-url tcp://h:1", ["--batch-size 8", "multiple", "3", "6"]),
    ],
)
def test_bad_flags_are_refused_at_parse_time(data, capsys, flags, named):
    folder = [] if flags == "" else [data]
    argv = [*TINY, "--max-steps", 0, "--save-dir", "run", *shlex.split(flags), *folder]
    status, message = refusal(main_moco.main, argv, capsys)
    assert status == 2
    for part in named:
        assert part in message, message
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("flags", "folder", "named"),
    [
        ("--resume auto", None, ["--resume auto", "give --save-dir"]),
        ("--max-steps 0 --save-dir probe", None, ["probe"]),
        ("--max-steps 1", "", ["DIR"]),  # an unset shell variable
    ],
)
def test_folders_that_cannot_be_are_refused_at_parse_time(data, capsys, flags, folder, named):
    write_images(Path(), {"probe": 9})
    Path("probe/lincls.json").write_text("{}")
    argv = [*TINY, *flags.split(), data if folder is None else folder]
    status, message = refusal(main_moco.main, argv, capsys)
    assert status == 2 and all(part in message for part in named), message


def test_a_folder_without_images_is_refused(tmp_path, capsys):
    """Other cases, and data sets that are not there, are in tests/data/."""
    write_images(tmp_path / "beside", {"a": 9})  # images beside an empty train/ are not meant
    (tmp_path / "beside" / "train").mkdir()
    (tmp_path / "file").touch()
    for name, said in (
        ("beside", "no images in"),
        ("missing", "no such data folder"),
        ("file", "is a file, expected a data folder"),
    ):
        status, message = refusal(main_moco.main, [*TINY, tmp_path / name], capsys)
        assert status == 2 and str(tmp_path / name) in message and said in message
    status, message = refusal(main_moco.main, [*TINY, "--dataset", "cifar10", tmp_path], capsys)
    assert status == 1 and "nothing is downloaded" in message


def test_images_per_class_needs_classes_and_a_batch(data, capsys):
    argv = [*TINY, "--images-per-class", 2, "--save-dir", "run"]
    status, message = refusal(main_moco.main, [*argv, data], capsys)
    assert status == 1 and "6 images" in message and "batch of 8" in message
    status, message = refusal(main_moco.main, [*argv, data / "train" / "class_0"], capsys)
    assert status == 1 and "no labels" in message
    assert not Path("run").exists()


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """Two epochs of three steps without interruption."""
    folder = tmp_path_factory.mktemp("run") / "folder"
    train(data, "--epochs", 2, "--save-dir", folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("-a resnet8x4", ["is of arch resnet8,", "resnet8x4"]),
        ("--moco-k 128", ["moco_k: 64 before, 128 now"]),
        ("--moco-k 128 --allow-changes", ["does not fit", "queue"]),
        ("--mlp --allow-changes", ["does not fit", "encoder_q.fc.0.weight"]),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(data, run, capsys, flags, named):
    argv = [*TINY, "--resume", run / "checkpoint_0000.pth.tar", *shlex.split(flags), data]
    status, message = refusal(main_moco.main, argv, capsys)
    assert status == 1
    for part in ["checkpoint_0000.pth.tar", *named]:
        assert part in message, message
    assert not Path("results").exists()


def test_a_file_that_is_no_pretraining_checkpoint_is_refused(data, run, tmp_path, capsys):
    """Damage of all kinds is in tests/checkpoint/."""
    path = tmp_path / "file.pth.tar"
    content = load(run / "checkpoint_0000.pth.tar")
    torch.save({"state_dict": content["state_dict"]}, path)
    for damage in (None, path.read_bytes()[:5000]):
        if damage:
            path.write_bytes(damage)
        status, message = refusal(main_moco.main, [*TINY, "--resume", path, data], capsys)
        assert status == 1 and f"{path} " in message


def test_a_checkpoint_of_an_evaluation_is_named_for_what_it_is(data, tiny_run, capsys):
    path = tiny_run / "lincls" / "checkpoint.pth.tar"
    argv = [*TINY, "--mlp", "--moco-dim", 16, "--allow-changes", "--resume", path, data]
    status, message = refusal(main_moco.main, argv, capsys)
    assert status == 1
    assert f"{path} is a checkpoint of main_lincls.py, expected one of main_moco.py" in message


# ---- A run and its folder ------------------------------------------------------------------------


def test_run_folder(run):
    names = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    saved = {"checkpoint_0000.pth.tar", "checkpoint_0001.pth.tar"}
    assert names == {".lock", "args.json", "log.jsonl", *saved}
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    facts = json.loads((run / "args.json").read_text())
    assert facts["objective"] == DEFAULT_OBJECTIVE
    assert (facts["arch"], facts["moco_k"], facts["moco_dim"]) == ("resnet8", 64, 128)
    assert (facts["seed"], facts["batch_size"], facts["bn_groups"]) == (1, 8, 2)
    assert facts["provenance"].keys() == {"git", "python", "torch", "torchvision"}


def test_log_has_every_step_and_the_terms_add_up(run):
    lines = read_log(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 1, 1]
    for line in lines:
        assert line.keys() == {
            "kind", "step", "time", "epoch", "loss", "align", "unif", "lr", "images_per_s",
            "data_share", "grad_norm",
        }  # fmt: skip
        assert math.isfinite(line["loss"])
        assert line["loss"] == pytest.approx(3 * line["align"] + line["unif"], abs=1e-5)
        assert 0 <= line["align"] <= 4 and line["unif"] <= 0
        assert 0 <= line["data_share"] <= 1 and line["images_per_s"] > 0


@pytest.mark.parametrize("epoch", [0, 1])
def test_checkpoint_content(run, epoch):
    content = load(run / f"checkpoint_{epoch:04d}.pth.tar")
    assert content.keys() == {
        "version", "arch", "epoch", "step", "step_in_epoch", "state_dict", "optimizer", "scaler",
        "shuffle_generator", "rng", "cuda_rng", "means", "skipped", "skipped_in_a_row", "args",
        "checksum",
    }  # fmt: skip
    assert (content["arch"], content["epoch"]) == ("resnet8", epoch + 1)
    assert (content["step"], content["step_in_epoch"]) == (3 * (epoch + 1), 0)
    state = content["state_dict"]
    assert {name.split(".")[0] for name in state} == {"module"}
    assert {name.split(".")[1] for name in state} == {
        "encoder_q", "encoder_k", "queue", "queue_ptr"
    }  # fmt: skip
    assert state["module.queue"].shape == (128, 64)
    assert state["module.queue_ptr"].tolist() == [24 * (epoch + 1) % 64]
    assert all(value.isfinite().all() for value in state.values())
    json.dumps(content["args"])
    assert content["args"]["objective"] == DEFAULT_OBJECTIVE


def test_start_prints_the_derived_numbers(data, capsys):
    argv = [word for word in TINY[:-2]]  # no seed
    main_moco.main([*argv, "--moco-t", "0.2", "--max-steps", "1", str(data)])
    out = capsys.readouterr().out
    folder = next(Path("results").iterdir())
    drawn = json.loads((folder / "args.json").read_text())["seed"]
    for fact in (
        "objective: 1 * InfoNCE(tau=0.2)\n",
        "30 images, 3 steps per epoch, 200 epochs",
        "8 over 1 process(es), 8 each",
        "groups: 2 of 4 images; batch norm, intra-batch pairs and the loss's log in each\n",
        "resnet8, 0.09 M parameters, 32 px",
        "64 x 128",
        "CPU",
        f"seed: {drawn} (drawn)",
        f"run folder: {folder}",
        "torch " + torch.__version__,
        f"(tested: {versions_tested('torch')})\n",
        "done: 1 steps",
    ):
        assert fact in out, out
    (line,) = read_log(folder)
    assert line.keys() >= {"loss", "contr", "contr_top1", "contr_top5"}
    assert not {"align", "unif"} & line.keys()


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        ("--schedule 1 --schedule-factor 0.5 --warmup-epochs 1", [0.015, 0.015, 0.015]),
        ("--cos", [0.03, 0.0225, 0.0075]),
    ],
)
def test_learning_rate_of_each_epoch(data, flags, rates, capsys):
    """And the first images of each class alone are trained on."""
    flags = [*shlex.split(flags), "--images-per-class", 3, "--epochs", 3]
    train(data, *flags, "--save-dir", "r")
    assert [line["lr"] for line in read_log(Path("r"))] == pytest.approx(rates)
    assert "9 images, 1 steps per epoch, 3 epochs" in capsys.readouterr().out
    last = load(Path("r/checkpoint_0002.pth.tar"))
    assert last["optimizer"]["param_groups"][0]["lr"] == pytest.approx(rates[-1])


def test_max_steps_0_saves_the_untrained_encoder(data, capsys):
    train(data, "--max-steps", 0, "--save-dir", "r")
    assert checkpoints(Path("r")) == ["step_00000000.pth.tar"]
    content = load(Path("r/step_00000000.pth.tar"))
    assert (content["epoch"], content["step"]) == (0, 0)
    task = MoCoTask(cli.pretrain_config([*TINY, str(data)]))
    torch.manual_seed(1)
    fresh = task.build_module().state_dict()
    saved = {name.removeprefix("module."): t for name, t in content["state_dict"].items()}
    assert differences(dict(fresh), saved) == []


def test_a_flat_folder_without_labels_trains(tmp_path, capsys):
    write_images(tmp_path, {"flat": 9, "nested/deep": 4, "nested": 5})
    for folder in ("flat", "nested"):
        train(tmp_path / folder, "--max-steps", 1, "--save-dir", f"run-{folder}")
        assert len(read_log(tmp_path / f"run-{folder}")) == 1
        assert "9 images, 1 steps per epoch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    ["--amp bf16 --mlp --aug-plus --bn-splits 4", "--accumulate 4 --symmetric --moco-t 0.2",
     "--accumulate 2 --bn-splits 2 --channels-last --moco-k 11"],
)  # fmt: skip
def test_variants_train_with_finite_losses(data, flags):
    train(data, *shlex.split(flags), "--max-steps", 3, "--save-dir", "r")
    assert all(math.isfinite(line["loss"]) for line in read_log(Path("r")))
    state = load(Path("r/checkpoint_0000.pth.tar"))["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


# ---- --init-from ---------------------------------------------------------------------------------


def initial(data: Path, capsys, *flags: object) -> tuple[dict[str, torch.Tensor], str]:
    """State dict that a run with these flags begins with, and what it prints."""
    capsys.readouterr()
    shutil.rmtree("begun", ignore_errors=True)
    train(data, *flags, "--max-steps", 0, "--save-dir", "begun", seed=5)
    state = load(Path("begun/step_00000000.pth.tar"))["state_dict"]
    plain = {name.removeprefix("module."): t for name, t in state.items()}
    return plain, capsys.readouterr().out


def test_init_from_a_run_takes_the_query_encoder_and_nothing_else(data, run, capsys):
    """With its batch-norm statistics and its head; both encoders, a queue of its own; also with
    other batch-norm groups and memory formats."""
    path = run / "checkpoint_0001.pth.tar"
    theirs = {n.removeprefix("module."): t for n, t in load(path)["state_dict"].items()}
    ours, said = initial(data, capsys, "--init-from", path)
    content = load(Path("begun/step_00000000.pth.tar"))
    assert (content["epoch"], content["step"]) == (0, 0)
    assert content["args"]["init_from"] == str(path)
    assert json.loads(Path("begun/args.json").read_text())["init_from"] == str(path)
    flags = ["--bn-splits", 2, "--channels-last", "--accumulate", 2]
    assert differences(ours, initial(data, capsys, "--init-from", path, *flags)[0]) == []
    fresh, _ = initial(data, capsys)
    assert f"starting from {path} (moco file of resnet8); the projection head is the file's" in said
    for name, tensor in ours.items():
        if name.startswith("queue"):
            assert torch.equal(tensor, fresh[name])
        else:
            assert torch.equal(tensor, theirs[name.replace("encoder_k", "encoder_q")]), name
    assert not torch.equal(ours["queue"], theirs["queue"])


@pytest.mark.parametrize("kind", ["another head", "a backbone alone"])
def test_init_from_a_file_without_this_head_keeps_a_random_one(data, run, kind, capsys):
    path, flags, named = run / "checkpoint_0001.pth.tar", ["--mlp"], "(linear) has another shape"
    theirs = {n: t for n, t in load(path)["state_dict"].items() if "encoder_q" in n}
    backbone = {
        n.removeprefix("module.encoder_q."): t for n, t in theirs.items() if ".fc." not in n
    }
    if kind == "a backbone alone":
        path, flags, named = Path("backbone.pth"), [], "(plain file of resnet8)"
        torch.save(backbone, path)
    ours, said = initial(data, capsys, "--init-from", path, *flags)
    fresh, _ = initial(data, capsys, *flags)
    assert "the projection head starts from random weights" in said and named in said
    for encoder in ("encoder_q", "encoder_k"):
        own = {n.removeprefix(f"{encoder}."): t for n, t in ours.items() if n.startswith(encoder)}
        head = {n: fresh[f"encoder_q.{n}"] for n in own if n.startswith("fc.")}
        assert differences(own, {**backbone, **head}) == []


def test_init_from_another_architecture_or_no_encoder_is_refused(data, run, tmp_path, capsys):
    (tmp_path / "text").write_text("x = 1")
    for path, named in (
        (run / "checkpoint_0001.pth.tar", ["holds a resnet8", "this run's resnet20"]),
        (tmp_path / "text", [str(tmp_path / "text")]),
    ):
        argv = [*TINY, "-a", "resnet20", "--init-from", path, "--save-dir", "r", data]
        status, message = refusal(main_moco.main, argv, capsys)
        assert status == 1 and "--init-from" in message or "text" in message
        assert all(part in message for part in named), message
        assert not Path("r").exists()


def test_a_run_that_was_started_from_weights_is_resumed_from_its_own(data, run, capsys):
    """The same command again goes on, also when the weights are gone; others are refused."""
    weights = Path("weights.pth.tar")
    shutil.copy(run / "checkpoint_0001.pth.tar", weights)
    start = ["--epochs", 2, "--init-from", weights]
    train(data, *start, "--save-dir", "whole")
    train(data, *start, "--max-steps", 2, "--save-dir", "cut")
    weights.rename("moved.pth.tar")
    capsys.readouterr()
    train(data, *start, "--save-dir", "cut", "--resume", "auto")
    said = capsys.readouterr().out
    assert "resuming cut/step_00000002" in said and "starting from" not in said
    assert_same_end(Path("whole"), Path("cut"))
    # Without the flag, too: it is a fact of the run.
    train(data, "--epochs", 2, "--save-dir", "on", "--resume", "whole/checkpoint_0000.pth.tar")
    assert load(Path("on/checkpoint_0001.pth.tar"))["args"]["init_from"] == str(weights)
    assert_same_end(Path("whole"), Path("on"))
    argv = [*TINY, "--epochs", 2, "--init-from", "moved.pth.tar"]
    status, message = refusal(
        main_moco.main, [*argv, "--resume", "auto", "--save-dir", "cut", data], capsys
    )
    assert status == 1 and "init_from: 'weights.pth.tar' before, 'moved.pth.tar' now" in message
    status, message = refusal(
        main_moco.main, [*argv, "--resume", "whole/checkpoint_0000.pth.tar", data], capsys
    )
    assert status == 2 and "--init-from" in message and "--resume" in message


def test_a_non_finite_loss_stops_the_run_with_the_last_good_checkpoint_on_disk(data, capsys):
    flags = "--schedule 1 --schedule-factor 1e35 --epochs 3 --save-dir r"
    status, message = refusal(main_moco.main, [*TINY, *shlex.split(flags), data], capsys)
    assert status == 1
    for part in ("not finite in epoch 1", "align nan", "checkpoint_0000.pth.tar", "--lr"):
        assert part in message, message
    assert checkpoints(Path("r")) == ["checkpoint_0000.pth.tar"]
    state = load(Path("r/checkpoint_0000.pth.tar"))["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
    assert all(math.isfinite(line["loss"]) for line in read_log(Path("r")))


# ---- Same again, and going on --------------------------------------------------------------------


def assert_same_end(a: Path, b: Path) -> None:
    a, b = (load(folder / "checkpoint_0001.pth.tar") for folder in (a, b))
    found = differences(a, b)  # all but these is a function of the seed
    assert [name for name in found if not name.startswith(("/args", "/rng"))] == []


def test_one_seed_gives_one_result_with_any_number_of_workers(data, run):
    train(data, "--epochs", 2, "-j", 2, "--save-dir", "again")
    assert_same_end(run, Path("again"))


@pytest.mark.parametrize("steps", [3, 4])
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(data, run, steps, capsys):
    train(data, "--epochs", 2, "--max-steps", steps, "--save-dir", "cut")
    whole_epochs, rest = divmod(steps, 3)
    newest = f"step_{steps:08d}" if rest else f"checkpoint_{whole_epochs - 1:04d}"
    assert f"{newest}.pth.tar" in checkpoints(Path("cut"))
    capsys.readouterr()
    train(data, "--epochs", 2, "--resume", "auto", "--save-dir", "cut")
    said = f"resuming cut/{newest}.pth.tar: {whole_epochs} epochs and {rest} steps done"
    assert said in capsys.readouterr().out
    assert_same_end(run, Path("cut"))
    assert [line["step"] for line in read_log(Path("cut"))] == [1, 2, 3, 4, 5, 6]


def test_resume_from_a_named_checkpoint_into_a_new_folder(data, run):
    """With its seed."""
    argv = [*TINY[:-2], "--epochs", 2, "--resume", run / "checkpoint_0000.pth.tar", "-j", 1]
    main_moco.main([str(word) for word in [*argv, "--save-dir", "new", data]])
    assert_same_end(run, Path("new"))
    assert json.loads(Path("new/args.json").read_text())["seed"] == 1
    assert checkpoints(Path("new")) == ["checkpoint_0001.pth.tar"]
    assert [line["step"] for line in read_log(Path("new"))] == [4, 5, 6]


def test_resume_auto_starts_fresh_in_a_folder_with_arguments_only(data, run):
    Path("run").mkdir()
    shutil.copy(run / "args.json", "run")
    train(data, "--epochs", 2, "--resume", "auto", "--save-dir", "run")
    assert_same_end(run, Path("run"))


def test_resume_of_a_finished_run_changes_no_checkpoint(data, run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    before = {name: (tmp_path / "copy" / name).read_bytes() for name in checkpoints(run)}
    train(data, "--epochs", 2, "--resume", "auto", "--save-dir", tmp_path / "copy")
    assert {name: (tmp_path / "copy" / name).read_bytes() for name in checkpoints(run)} == before


@pytest.mark.long
def test_dropout_too_is_a_function_of_the_seed(data):
    """With workers, and after a resume."""
    flags = ["-a", "mobilenet_v3_small", "--epochs", 2]
    train(data, *flags, "--save-dir", "a")
    train(data, *flags, "--max-steps", 2, "-j", 1, "--save-dir", "b")
    train(data, *flags, "--resume", "auto", "--save-dir", "b")
    assert_same_end(Path("a"), Path("b"))


# ---- Two processes -------------------------------------------------------------------------------


TWO_CPUS = """
import functools, sys
from dataclasses import replace
from moco import cli
from moco.config import Placement
from moco.launch import launch_config
from moco.tasks.moco import MoCoTask
from moco.train.loop import train
two = Placement(devices=("cpu", "cpu"), processes=2, local_processes=2)
config = replace(cli.pretrain_config(sys.argv[1:]), placement=two)
launch_config(functools.partial(train, task=MoCoTask), config)
"""


@pytest.mark.long
def test_an_error_in_a_rank_that_was_started_here_ends_in_one_line(data, tmp_path):
    """As on a node of several GPUs, where this process starts the ranks: here on two CPUs."""
    shutil.copytree(data, tmp_path / "data")
    for bad in (tmp_path / "data" / "train").glob("*/00[0-4].png"):
        bad.write_bytes(b"")
    argv = [*TINY, "--save-dir", tmp_path / "run", tmp_path / "data"]
    started = Processes(tmp_path / "out", *argv, code=TWO_CPUS, before=FORKING)
    assert started.wait() == [1]
    assert "error: cannot read image" in started.output()


# Runs main_moco.py's main and leaves what each rank's module holds in the end.
ON_EACH_RANK = """
import os, sys, torch, main_moco
from moco.tasks.moco import MoCoTask
built, build = [], MoCoTask.build_module
MoCoTask.build_module = lambda self: built.append(build(self)) or built[-1]
main_moco.main(sys.argv[2:])
torch.save(built[0].state_dict(), sys.argv[1] + os.environ.get("RANK", ""))
"""


@pytest.mark.long
def test_both_launchers_give_bit_equal_ranks_and_checkpoints(data, tmp_path):
    """As under torchrun, and upstream's flags on two nodes; weights, queue and pointer of both
    ranks. torchrun itself is in test_preempt.py."""
    flags = [*TINY[:-2], "--epochs", 1, data]  # no seed, no --save-dir: rank 0 says
    torchrun = Processes(
        tmp_path / "out", tmp_path / "torchrun", *flags, count=2, code=ON_EACH_RANK,
        before=f"import os; os.chdir({str(tmp_path)!r})",
    )  # fmt: skip
    assert torchrun.wait() == [0, 0], torchrun.output()
    assert "8 over 2 process(es), 4 each" in torchrun.output(0)
    assert torchrun.output().count("objective:") == 1  # rank 0 alone prints
    (first,) = (tmp_path / "results").iterdir()
    seed = json.loads((first / "args.json").read_text())["seed"]

    flags += ["--seed", seed, "--save-dir", tmp_path / "second", "--multiprocessing-distributed"]
    flags += ["--world-size", 2, "--dist-url", f"tcp://localhost:{free_port()}"]
    nodes = []
    for rank in range(2):
        words = [tmp_path / f"node{rank}", *flags, "--rank", rank]
        nodes.append(Processes(tmp_path / f"out{rank}", *words, code=ON_EACH_RANK))
    for node in nodes:
        assert node.wait() == [0], node.output()

    ranks = {name: load(tmp_path / name) for name in ("torchrun0", "torchrun1", "node0", "node1")}
    for name, state in ranks.items():
        found = differences(dict(ranks["torchrun0"]), dict(state))
        if name.endswith("1"):  # each rank has its own batch-norm statistics
            found = [difference for difference in found if "running_" not in difference]
        assert found == [], name
    a, b = (load(folder / "checkpoint_0000.pth.tar") for folder in (first, tmp_path / "second"))
    assert differences(a, b) and all(d.startswith("/args") for d in differences(a, b))
    assert a["rng"].shape[0] == 2
    saved = {name.removeprefix("module."): t for name, t in a["state_dict"].items()}
    assert differences(saved, dict(ranks["torchrun0"])) == []
