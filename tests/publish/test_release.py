"""scripts/release.py: what is published of a real run, and what a stranger finds wrong in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import ROOT, read_log, refusal

import main_lincls
from moco.checkpoint import load_encoder, read_checkpoint, write_checkpoint, write_safetensors
from moco.encoders import build_encoder

release = runpy.run_path(str(ROOT / "scripts" / "release.py"))["main"]
WEIGHTS = re.compile(r"toy-(backbone|full|linear)-([0-9a-f]{8})\.(pth|safetensors)")


@pytest.fixture(scope="module")
def run_of(tiny_run, tmp_path_factory) -> Path:
    """A folder with two epochs of pretraining, a probe of the second, and its metrics."""
    root = tmp_path_factory.mktemp("someone") / "home"
    shutil.copytree(tiny_run / "run", root / "run")
    shutil.copytree(tiny_run / "lincls", root / "probe")
    metrics = {
        "checkpoint": str(root / "run" / "checkpoint_0001.pth.tar"), "layer": "projection",
        "images": 15, "alpha": 2.0, "t": 2.0, "alignment": 0.123456, "uniformity": -1.5,
        "uniformity_infimum": -3.4, "seed": 0,
    }  # fmt: skip
    (root / "metrics.json").write_text(json.dumps(metrics))
    return root


def publish(root: Path, out: str | Path, *flags: str, whole: bool = True) -> Path:
    """A release of the run's end, if `whole` with its probe and metrics."""
    if whole:
        flags += ("--lincls", str(root / "probe" / "checkpoint.pth.tar"),
                  "--metrics", str(root / "metrics.json"))  # fmt: skip
    release([str(root / "run" / "checkpoint_0001.pth.tar"), str(out), *flags])
    return Path(out)


@pytest.fixture(scope="module")
def published(run_of) -> Path:
    return publish(run_of, run_of / "toy", "--licence", "cc-by-nc-4.0")


@pytest.fixture
def copy(published, tmp_path) -> Path:
    """A release to tamper with."""
    return shutil.copytree(published, tmp_path / "copy")


def sum_again(folder: Path) -> None:
    """SHA256SUMS as a forger would make it fit again."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "SHA256SUMS"
    )
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def findings(folder: Path, capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        release(["--verify", str(folder)])
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert not out and all(line.startswith(f"{folder}: ") for line in err.splitlines()), err
    return err


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{old!r} is not in {path.name}"
    path.write_text(text.replace(old, new, 1))


def weights_of(folder: Path, kind: str, suffix: str) -> Path:
    (path,) = folder.glob(f"*-{kind}-*.{suffix}")
    return path


# ---- What is in it -------------------------------------------------------------------------------


def test_a_release_holds_what_it_should_and_verifies(published, capsys):
    names = {path.relative_to(published).as_posix() for path in published.rglob("*.*")}
    weights = {name for name in names if WEIGHTS.fullmatch(name)}
    kinds = sorted(WEIGHTS.fullmatch(name).group(1, 3) for name in weights)
    assert kinds == [(k, s) for k in ("backbone", "full", "linear") for s in ("pth", "safetensors")]
    assert names - weights == {
        "README.md", "config.json", "args.json", "log.jsonl", "align_uniform.json",
        "lincls/args.json", "lincls/log.jsonl", "lincls/lincls.json",
    }  # fmt: skip
    checked = subprocess.run(
        ["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=published, capture_output=True, text=True
    )
    assert checked.returncode == 0 and checked.stdout.count(": OK") == len(names), checked.stderr
    release(["--verify", str(published)])
    assert "verified" in capsys.readouterr().out


def test_names_carry_the_hash_that_torch_hub_checks(published, tmp_path):
    for kind in ("backbone", "linear"):
        path = weights_of(published, kind, "pth")
        state = torch.hub.load_state_dict_from_url(
            path.as_uri(), model_dir=str(tmp_path), check_hash=True, progress=False,
            weights_only=True,
        )  # fmt: skip
        assert "conv1.weight" in state and ("fc.weight" in state) == (kind == "linear")


def test_every_file_holds_the_encoder_of_the_checkpoint(published, run_of):
    wanted = load_encoder(run_of / "run" / "checkpoint_0001.pth.tar")[0].state_dict()
    for path in published.iterdir():
        if WEIGHTS.fullmatch(path.name):
            found = load_encoder(path)[0].state_dict()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted), path.name
    source = read_checkpoint(run_of / "run" / "checkpoint_0001.pth.tar")
    for suffix in ("pth", "safetensors"):
        full = read_checkpoint(weights_of(published, "full", suffix))
        assert full["state_dict"].keys() == source["state_dict"].keys()
        for name, tensor in source["state_dict"].items():
            assert torch.equal(full["state_dict"][name], tensor), name
        assert (full["epoch"], full["step"], full["arch"]) == (2, 6, "resnet8")
        assert "optimizer" not in full and "rng" not in full
        assert load_encoder(weights_of(published, "full", suffix), head="projection")
    probe = load_encoder(run_of / "probe" / "checkpoint.pth.tar", head="linear")[0].state_dict()
    for suffix in ("pth", "safetensors"):
        network, _ = load_encoder(weights_of(published, "linear", suffix), head="linear")
        assert all(torch.equal(t, probe[name]) for name, t in network.state_dict().items())


def test_nothing_in_it_names_a_place_on_this_machine(published, run_of):
    for path in published.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for secret in (str(run_of), "someone", "pytest"):
                assert secret.encode() not in data, (path.name, secret)
    args = json.loads((published / "args.json").read_text())
    assert (args["data"], args["save_dir"], args["lr"]) == ("labelled", "run", 0.03)
    assert json.loads((published / "lincls" / "args.json").read_text())["data"] == "labelled"


def test_the_log_is_that_of_the_run_up_to_the_checkpoint(published, run_of, tmp_path):
    assert read_log(published) == read_log(run_of / "run")
    release([str(run_of / "run" / "checkpoint_0000.pth.tar"), "early"])
    assert [line["step"] for line in read_log(tmp_path / "early")] == [1, 2, 3]
    card = (tmp_path / "early" / "README.md").read_text()
    assert "| Epochs | 1 of 2, 3 steps |" in card and "at step 3" in card


def test_the_card_says_what_the_logs_say(published):
    card = (published / "README.md").read_text()
    result = json.loads((published / "lincls" / "lincls.json").read_text())
    last, knn = result["last"], result["knn"]
    for line in (
        "license: cc-by-nc-4.0",
        "    loss = 3 * align(alpha=2) + 1 * uniform(t=3, with intra-batch pairs)",
        "| Encoder | resnet8, 64 features |",
        "| Data | 30 images of `labelled` (folder) |",
        "| Queue | 64 keys of 16 dimensions |",
        f"| Last epoch (1) | top-1 {last['top1']:.2f}, top-3 {last['top5']:.2f} |",
        f"| k-NN (k 30, temperature 0.07, backbone) | top-1 {knn['top1']:.2f}, top-3 "
        f"{knn['top5']:.2f} |",
        "| Held-out L_align (alpha 2; projection, 15 images) | 0.1235 |",
        "| Held-out L_uniform (t 2; projection, 15 images) | -1.5000 |",
        f"| Training align term at step 6 | {read_log(published)[-1]['align']:.4f} |",
    ):
        assert f"{line}\n" in card, line
    assert "batch size 8" in card and "InfoNCE" not in card
    for word in ("load_encoder", "onnx", "The weights: cc-by-nc-4.0.", "wang2020hypersphere"):
        assert word in card, word


def test_accuracies_of_other_protocols_say_so(run_of, data, tmp_path, capsys):
    """Fewer labels, several settings and folds stand in the rows of the figures; what fine-tuning
    has reached is no figure of this encoder."""
    pretrained = run_of / "run" / "checkpoint_0001.pth.tar"
    names = tmp_path / "some.txt"
    names.write_text("".join(f"class_{c}/00{i}.png\n" for c in range(3) for i in range(4)))
    for name, flags in (
        ("part", f"--labels {names} --knn --lr 0.9 --epochs 2"),
        ("folds", "--labels 80 --folds 2 --lr 0.1,0.5 --epochs 1"),
        ("heads", "--images-per-class 8 --lr 0.1,0.5 --epochs 1 --cached"),
        ("tuned", "--finetune --epochs 1"),
    ):
        probe = tmp_path / name
        main_lincls.main(
            [*flags.split(), *"--batch-size 8 -j 0 --device cpu --seed 5 --schedule 1".split(),
             "--pretrained", str(pretrained), "--save-dir", str(probe), str(data)]
        )  # fmt: skip
        argv = [str(pretrained), f"{name}-out", "--lincls", str(probe / "checkpoint.pth.tar")]
        if name == "tuned":
            status, message = refusal(release, argv, capsys)
            assert status == 1 and "fine-tuning" in message and not Path(argv[1]).exists()
            continue
        release(argv)
        card = Path(argv[1], "README.md").read_text()
        last = json.loads((probe / "lincls.json").read_text())["last"]
        epoch, figures = last["epoch"], f"top-1 {last['top1']:.2f}, top-3 {last['top5']:.2f}"
        wanted = {
            "part": [f"| Last epoch (1), labels of some.txt alone | {figures} |",
                     "| k-NN (k 12, temperature 0.07, backbone), labels of some.txt alone |"],
            "folds": [f"| Last epoch (0), 80 % of the labels | {figures} |",
                      "| Chosen among | 2 settings by 2 folds of the training images: lr 0."],
            "heads": ["| Last epoch (0), 8 images of each class, cached features "
                      f"| {figures} (lr {last.get('lr')}, weight decay 0) |",
                      "| Chosen among | 2 settings by their accuracy on the validation images"],
        }[name]  # fmt: skip
        assert all(row in card for row in wanted), (epoch, card)
        assert str(tmp_path) not in card
    # A forger who drops the labels from result and card is told by the arguments.
    folder = Path("folds-out")
    result = json.loads((folder / "lincls" / "lincls.json").read_text())
    del result["labels"]
    (folder / "lincls" / "lincls.json").write_text(json.dumps(result))
    edit(folder / "README.md", ", 80 % of the labels", "")
    edit(folder / "README.md", ", 80 % of the labels", "")
    sum_again(folder)
    assert "labels is None, lincls/args.json says 80.0" in findings(folder, capsys)


def test_the_encoder_alone_is_one_file_with_all_figures(run_of, published, capsys):
    folder = publish(run_of, "alone", "--encoder-only", "--licence", "mit")
    release(["--verify", "alone"])
    assert [*folder.glob("*.pth"), *folder.glob("*.safetensors")] == [
        weights_of(folder, "backbone", "safetensors")
    ]
    encoder, info = load_encoder(folder)
    same, _ = load_encoder(weights_of(published, "backbone", "pth"))
    assert all(map(torch.equal, encoder.state_dict().values(), same.state_dict().values()))
    assert info["epoch"] == 2 and info["args"]["arch"] == info["arch"]
    card = (folder / "README.md").read_text()
    for text in ("Linear evaluation", "0.1235", "license: mit", "| Epochs | 2"):
        assert text in card, text
    assert "Classifier in the file" not in card and "facebookresearch/moco:" not in card
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({**args, "lr": 9.0}))
    sum_again(folder)
    assert "args.json is not what alone-backbone-" in findings(folder, capsys)


def test_without_probe_metrics_or_licence_the_card_has_no_such_figures(run_of, tmp_path):
    folder = publish(run_of, "plain v1.0", whole=False)
    assert list(folder.glob("plain-v1-0-backbone-*.pth")), "no dot before the hash"
    card = (folder / "README.md").read_text()
    for word in ("top-1", "Linear evaluation", "Held-out", "license:"):
        assert word not in card, word
    assert "no licence" in card and not (folder / "lincls").exists()


@pytest.mark.long
def test_a_checkpoint_of_upstream_moco_has_no_recipe_and_loads_in_all_tools(run_of, monkeypatch):
    """A ResNet-18, which the other tools have too: the Python of the card gives equal features."""
    pytest.importorskip("timm")
    network = build_encoder("resnet18", 16).state_dict()
    state = {f"module.encoder_{x}.{name}": t for x in "qk" for name, t in network.items()}
    content = {"arch": "resnet18", "epoch": 2, "state_dict": state, "optimizer": {}}
    torch.save(content, "moco_v2.pth.tar")
    shutil.copy(run_of / "run" / "log.jsonl", "log.jsonl")  # of something else
    release(["moco_v2.pth.tar", "out", "--name", "moco-v2"])
    monkeypatch.chdir("out")
    card = Path("README.md").read_text()
    assert "| Encoder | resnet18, 512 features |" in card and "| Epochs | 2 |" in card
    for word in ("Objective", "lr", "| Data", "Training"):
        assert word not in card, word
    assert not Path("log.jsonl").exists() and not Path("args.json").exists()

    assert "library_name: timm" in card and '"num_features": 512' in Path("config.json").read_text()
    for word in ("torchvision", "timm", "Hugging Face", "detectron2"):
        assert word in card, word
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = load_encoder("../moco_v2.pth.tar")[0](images)
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        namespace: dict = {}
        exec(block, namespace)
        with torch.no_grad():
            output = namespace.get("model", namespace.get("encoder"))(images)
        assert torch.equal(output, wanted), block


# ---- What a stranger finds -----------------------------------------------------------------------


def test_a_flipped_byte_a_missing_and_an_unlisted_file_are_named(copy, capsys):
    path = weights_of(copy, "full", "safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = findings(copy, capsys)
    assert path.name in found and "damaged" in found
    sum_again(copy)
    assert "in its name" in findings(copy, capsys)
    path.unlink()
    sum_again(copy)
    assert "there is no NAME-full-HASH.safetensors" in findings(copy, capsys)


def test_sums_that_do_not_fit_the_folder(copy, capsys):
    (copy / "extra.txt").write_text("hello")
    assert "extra.txt is not in SHA256SUMS" in findings(copy, capsys)
    (copy / "extra.txt").unlink()
    (copy / "lincls" / "log.jsonl").rename(copy.parent / "log.jsonl")
    assert "lincls/log.jsonl is missing" in findings(copy, capsys)
    (copy.parent / "log.jsonl").rename(copy / "lincls" / "log.jsonl")
    with open(copy / "SHA256SUMS", "a") as file:
        file.write(f"{'0' * 64}  ../outside\n")
    assert "no sum of a file" in findings(copy, capsys)
    (copy / "SHA256SUMS").write_bytes(b"\xff\xfe")
    assert "no sum of a file" in findings(copy, capsys)
    (copy / "SHA256SUMS").unlink()
    assert "no release" in findings(copy, capsys)


ROW = "| Held-out L_align (alpha 2; projection, 15 images) |"


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("README.md", f"{ROW} 0.1235 |", f"{ROW} 0.0235 |", f"README.md lacks '{ROW} 0.1235 |'"),
        ("README.md", "lr 0.03, momentum", "lr 0.3, momentum", "lr 0.3, momentum"),
        ("README.md", "| Seed | 1 |", "| Seed | 1 |\n| ImageNet top-1 | 76.50 |",
         "has '| ImageNet top-1 | 76.50 |', which no file says"),
        ("README.md", "| Seed | 1 |\n", "", "lacks '| Seed | 1 |'"),
        ("README.md", "The weights: cc-by-nc-4.0.", "The weights: mit.", "The weights: cc-by-nc"),
        ("README.md", "pipeline_tag", "license: mit\npipeline_tag", "has 'license: mit'"),
        ("README.md", "## Files", "`toy-full-01234567.pth`\n\n## Files", "toy-full-01234567.pth"),
        ("README.md", "| Seed | 1 |\n", "| Seed | 1 |\n| Seed | 1 |\n", "has '| Seed | 1 |'"),
        ("README.md", "\n| Seed | 1 |\n", "\n\n| Seed | 1 |\n", None),
        ("README.md", "# toy\n", "# ViT-22B\n", "lacks '# toy'"),
        ("args.json", '"lr": 0.03', '"lr": 0.3', "args.json is not what"),
        ("args.json", '"git": "', '"git": "/home/someone/', "args.json names places"),
        ("config.json", '"num_features": 64', '"num_features": 2048',
         "config.json lacks 'num_features: 64'"),
        ("config.json", "0.485", "0.5", "pretrained_cfg.mean: [0.5, "),
        ("config.json", '"license": "cc-by-nc-4.0"', '"license": "mit"', "The weights: mit."),
        ("config.json", '"architecture"', '"x": 1,\n "architecture"', "config.json has 'x: 1'"),
        ("config.json", "{", "", "config.json is not JSON"),
        ("config.json", "{", '{"a": ' + "[" * 20000, "its values are nested too deeply"),
        ("log.jsonl", "{", "", "log.jsonl has lines that are no"),
        ("lincls/lincls.json", '"top1": ', '"top1": 1', "the log says"),
        ("lincls/lincls.json", '"last"', '"lost"', "KeyError 'last'"),
        ("align_uniform.json", "-1.5", "-2.5", "projection, 15 images) | -2.5000 |'"),
        ("align_uniform.json", "-1.5", '"-1.5"', "no model card can be made"),
    ],
)  # fmt: skip
def test_figures_that_the_logs_do_not_say_even_with_fitting_sums(
    file, old, new, said, copy, capsys
):
    if "lincls" in file:  # of best and last, not of k-NN, whose figure is in the card alone
        text = (copy / file).read_text()
        at = text.index('"best"')
        (copy / file).write_text(text[:at] + text[at:].replace(old, new, 1))
    else:
        edit(copy / file, old, new)
    assert file in findings(copy, capsys)
    sum_again(copy)
    if said:
        assert said in findings(copy, capsys)
    else:
        release(["--verify", str(copy)])


def test_lines_of_the_card_have_an_order(copy, capsys):
    text = (copy / "README.md").read_text()
    (copy / "README.md").write_text(text.replace("## Files", "# x").replace("## Load", "## Files")
                                    .replace("# x", "## Load"))  # fmt: skip
    sum_again(copy)
    assert "in another order" in findings(copy, capsys)


def test_another_backbone_under_a_fitting_name(copy, capsys):
    path = weights_of(copy, "backbone", "safetensors")
    content = read_checkpoint(path)
    state = content.pop("state_dict")
    state["conv1.weight"][0, 0, 0, 0] += 1
    path.unlink()
    write_safetensors(other := copy / "other", state, content)
    digest = hashlib.sha256(other.read_bytes()).hexdigest()[:8]
    other.rename(copy / f"toy-backbone-{digest}.safetensors")
    edit(copy / "README.md", path.name, f"toy-backbone-{digest}.safetensors")
    sum_again(copy)
    found = findings(copy, capsys)
    assert "holds another backbone than" in found
    assert path.name in found, "the card says how to load a file that is not there"


def test_words_may_be_added_to_the_card(copy, capsys):
    edit(copy / "README.md", "## Files", "## About us\n\nThanks to our cluster.\n\n## Files")
    sum_again(copy)
    (copy / ".gitattributes").write_text("*.pth filter=lfs")  # as a clone from a hub has it
    release(["--verify", str(copy)])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: (f / "args.json").rename("a") and (f / "args.json").symlink_to("../a"),
         "args.json is a symbolic link"),
        (lambda f: (f / "more").symlink_to("/etc"), "more is a symbolic link"),
        (lambda f: (f / "lincls" / "up").symlink_to(".."), "lincls/up is a symbolic link"),
        (lambda f: (f / "SHA256SUMS").rename("s") and (f / "SHA256SUMS").symlink_to("../s"),
         "SHA256SUMS is a symbolic link"),
        (lambda f: (f / "dangling\x1b").symlink_to("nowhere"), r"dangling\x1b is a symbolic link"),
        (lambda f: os.mkfifo(f / "pipe"), "pipe is neither a file nor a folder"),
        (lambda f: (f / "/".join("a" * 200)).mkdir(parents=True), "more than 4 folders deep"),
        (lambda f: (f / "x\ny\x1b[2J\udce9").write_text(""), r"x\ny\x1b[2J\xe9 is not in SHA"),
    ],
)  # fmt: skip
def test_what_no_release_holds_is_refused_in_one_line(make, said, copy, capsys):
    make(copy)
    found = findings(copy, capsys)
    assert said in found and found.count("\n") == 1 and found[:-1].isprintable()


# ---- Text from files -----------------------------------------------------------------------------

HOSTILE = "x\n\n# Owned\r\n<script>alert(1)</script>|<img src=x> [a](http://b) ` \x1b[31m\u202e*e* "


def test_text_from_files_is_no_markup_and_no_terminal_sequence(run_of, tmp_path, capsys):
    """A checkpoint's objective and arguments, names of runs and class lists, results of others."""
    source = read_checkpoint(run_of / "run" / "checkpoint_0001.pth.tar")
    for key in ("objective", "data", "dataset", "amp", "seed", "epochs"):
        source["args"][key] = HOSTILE
    source["args"]["crop_scale"] = [HOSTILE, HOSTILE]
    source["epoch"] = HOSTILE
    run = tmp_path / "run"
    run.mkdir()
    write_checkpoint(run / "hostile.pth.tar", source)
    args = {**source["args"], "provenance": {HOSTILE: HOSTILE}}
    (run / "args.json").write_text(json.dumps(args))
    probe = tmp_path / "probe"
    shutil.copytree(run_of / "probe", probe)
    result = json.loads((probe / "lincls.json").read_text())
    result["labels"] = {"of": HOSTILE}
    result["protocol"][HOSTILE] = result["train_images"] = result["knn"]["layer"] = HOSTILE
    (probe / "lincls.json").write_text(json.dumps(result))
    (probe / "args.json").unlink()
    metrics = json.loads((run_of / "metrics.json").read_text())
    metrics |= {"layer": HOSTILE, "checkpoint": "hostile.pth.tar"}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    release([str(run / "hostile.pth.tar"), "out", "--lincls", str(probe / "checkpoint.pth.tar"),
             "--metrics", "metrics.json"])  # fmt: skip
    release(["--verify", "out"])
    out, err = capsys.readouterr()
    assert "verified" in out and all(line.isprintable() for line in (out + err).splitlines())

    card = Path("out/README.md").read_text()
    assert "    align(alpha) = mean_i" in card, "by the numbers, whatever the formula says"
    assert card.count("Owned") >= 10 and "\x1b" not in card and "\u202e" not in card
    titles = [line for line in card.splitlines() if line.startswith("#")]
    assert titles == ["# out", *(f"## {title}" for title in (
        "Objective", "Recipe", "Linear evaluation", "Alignment and uniformity", "Files", "Load",
        "Licence", "Citation"))]  # fmt: skip
    assert not re.search(r"<(?![qk]_i, )", card.replace("exp(-t", "")), "no raw HTML"
    for line in card.splitlines():
        assert not line.startswith("|") or line.count("|") == 3, line
        assert "Owned" not in line or line.startswith(("|", "    loss = ")), line
        # Outside of its code spans.
        assert not re.search(r"(?<!\\)\[a|(?<!\\)\*e", re.sub("`[^`]*`", "", line)) or (
            line.startswith("    ")
        ), line


def test_deep_values_are_no_traceback(copy, capsys):
    """Where Python's recursion ends differs between versions; what is left is one line at most."""
    deep = '{"a": ' * 900 + "1" + "}" * 900
    for file in ("args.json", "align_uniform.json", "config.json"):
        edit(copy / file, "{", '{"deep": ' + deep + ", ")
        sum_again(copy)
        found = findings(copy, capsys)
        assert "Traceback" not in found and len(found) < 10_000


# ---- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("", "give CHECKPOINT and OUT"),
        ("missing.pth out", "no such file: missing.pth"),
        ("CHECKPOINT full", "not an empty folder"),
        ("CHECKPOINT nowhere/out", "no such folder"),
        ("CHECKPOINT out --lincls none.pth", "no such file: none.pth"),
        ("CHECKPOINT out --name v1.0", "--name must be"),
        ("--verify nowhere", "no such folder: nowhere"),
        ("--verify full CHECKPOINT", "nothing else"),
    ],
)
def test_what_can_be_refused_at_once(argv, said, run_of, capsys):
    Path("full").mkdir()
    Path("full/file").write_text("kept")
    words = [str(run_of / "run" / "checkpoint_0001.pth.tar") if w == "CHECKPOINT" else w
             for w in argv.split()]  # fmt: skip
    status, message = refusal(release, words, capsys)
    assert status == 2 and said in message
    assert [path.name for path in Path().iterdir()] == ["full"]


def test_nothing_is_written_of_what_does_not_belong_together(run_of, tmp_path, capsys):
    first, second = (run_of / "run" / f"checkpoint_000{i}.pth.tar" for i in (0, 1))
    probe = run_of / "probe" / "checkpoint.pth.tar"
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(probe, lone / "probe.pth.tar")
    (lone / "half.json").write_text('{"alignment": 0.1, "uniformity": -1.0, "t": null}')
    (lone / "k-nn").mkdir()
    shutil.copy(probe, lone / "k-nn")
    (lone / "k-nn" / "lincls.json").write_text('{"classes": 3, "top1": 1.0, "top5": 2.0}')
    for argv, said in (
        ([first, "out", "--lincls", probe], "not a probe of this encoder"),
        ([probe, "out"], "no pretraining checkpoint"),
        ([second, "out", "--lincls", second], "beside it"),
        ([second, "out", "--lincls", lone / "probe.pth.tar"], "beside it"),
        ([first, "out", "--metrics", run_of / "metrics.json"], "checkpoint_0001"),
        ([second, "out", "--metrics", run_of / "run" / "args.json"], "no alignment"),
        ([second, "out", "--metrics", lone / "half.json"], "no alignment"),
        ([second, "out", "--lincls", lone / "k-nn" / "checkpoint.pth.tar"], "no best and last"),
    ):
        status, message = refusal(release, argv, capsys)
        assert status == 1 and said in message, message
        assert [path.name for path in tmp_path.iterdir()] == ["lone"], said
