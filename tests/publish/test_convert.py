"""scripts/convert.py: each file is loaded by the tool that it is for, with the same features.

timm, onnx and onnxruntime are the real ones; what upstream MoCo and detectron2 do with their files
is done again here in a few lines.
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import io
import json
import pickle
import pickletools
import re
import runpy
import shutil
import threading
import warnings
from pathlib import Path

import harness
import numpy as np
import pytest
import torch
import torchvision
from helpers import ROOT, refusal
from networks import seasoned, to_detectron2, under
from torch import Tensor, nn

from moco import encoders
from moco.checkpoint import load_encoder, write_checkpoint, write_safetensors

timm = pytest.importorskip("timm")
convert = runpy.run_path(str(ROOT / "scripts" / "convert.py"))["main"]

FORMATS = ("torchvision", "timm", "detectron2", "upstream-moco", "huggingface", "onnx")
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def write_pretrained(path: Path, arch: str, **kwargs: object) -> Path:
    """A checkpoint as main_moco.py writes it, but for the queue, and its query encoder with the
    MLP head."""
    torch.manual_seed(0)
    encoder = encoders.build_encoder(arch, 16, **kwargs)
    encoders.add_mlp_head(encoder)
    state = under("module.encoder_q.", seasoned(encoder).state_dict())
    state["module.encoder_k.fc.0.weight"] = torch.zeros(16, 16)
    args = {"image_size": 64, "mean": MEAN, "std": STD, "objective": "1 * uniform(t=2)",
            "data": "/home/someone/images"}  # fmt: skip
    content = {"version": 1, "arch": arch, "epoch": 200, "state_dict": state, "args": args}
    write_checkpoint(path, content)
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    return write_pretrained(folder / "checkpoint_0199.pth.tar", "resnet18")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> tuple[Path, nn.Module]:
    """A plain torchvision state dict with a linear layer of 7 classes."""
    network = seasoned(torchvision.models.resnet18(num_classes=7))
    path = tmp_path_factory.mktemp("classifier") / "classifier.pth"
    torch.save(network.state_dict(), path)
    return path, network


@pytest.fixture(scope="module")
def features(pretrained) -> Tensor:
    return features_of(pretrained)


@torch.no_grad()
def features_of(path: Path) -> Tensor:
    return load_encoder(path)[0](IMAGES)


@torch.no_grad()
def onnx_features(path: Path, images: Tensor = IMAGES) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = [value.name for value in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def weights(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


def run(*argv: object) -> None:
    convert([str(word) for word in argv])


def printed_model(out: str) -> nn.Module:
    """What the lines that the converter says to load the file by, the indented ones, make."""
    namespace: dict = {}
    exec("\n".join(line[4:] for line in out.splitlines() if line.startswith("    ")), namespace)
    return namespace["model"]


def nothing_but(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


# ---- Round trips ---------------------------------------------------------------------------------


@pytest.mark.long
def test_features_survive_each_format_after_the_other(pretrained, features, tmp_path, capfd):
    """Every one is made of another, and read by the next; ONNX in the end, which takes any batch
    and size, and says no more than it should."""
    source = pretrained
    for to, name in (
        ("timm", "a.pth"),
        ("detectron2", "a.pkl"),
        ("upstream-moco", "a.pth.tar"),
        ("huggingface", "a"),
        ("torchvision", "a.safetensors"),
    ):
        run(source, "--to", to, name)
        source = weights(tmp_path / name)
        assert torch.equal(features_of(source), features), to
    onnx = pytest.importorskip("onnx")
    (tmp_path / "onnx").mkdir()
    capfd.readouterr()
    run(source, "onnx/a.onnx", "--to", "onnx")
    out, err = capfd.readouterr()
    assert "torch.onnx" not in out + err and len(out.splitlines()) == 7 and not err, out + err
    assert nothing_but(tmp_path / "onnx", "a.onnx"), "no data beside the file"
    model = onnx.load("onnx/a.onnx", load_external_data=False)
    onnx.checker.check_model(model)
    assert [v.name for v in model.graph.input] == ["images"]
    assert [v.name for v in model.graph.output] == ["features"]
    encoder = load_encoder(pretrained)[0]
    for shape in ((1, 3, 64, 64), (3, 3, 64, 64), (2, 3, 97, 70)):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(
                onnx_features(Path("onnx/a.onnx"), images), encoder(images), rtol=1e-4, atol=1e-4
            )


@pytest.mark.long
def test_resnet50_in_detectron2(tmp_path):
    """Blocks with three convolutions; timm has the same names as torchvision, see below."""
    torch.save(torchvision.models.resnet50(num_classes=2).state_dict(), "r50.pth")
    run("r50.pth", "--to", "detectron2")
    model = pickle.loads((tmp_path / "r50-detectron2.pkl").read_bytes())["model"]
    ours = load_encoder("r50.pth")[0].state_dict()
    assert model.keys() == {to_detectron2(n) for n in ours if "num_batches" not in n}
    assert "res2.0.conv3.norm.running_var" in model and len(model) == 265


# ---- Each format ---------------------------------------------------------------------------------


def test_torchvision_without_classifier_lacks_fc_alone_and_says_so(pretrained, tmp_path, capsys):
    run(pretrained, tmp_path / "a.pth", "--to", "torchvision")
    out = capsys.readouterr().out
    assert "left out: its projection head" in out and "has no fc" in out
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    missing, unexpected = torchvision.models.resnet18().load_state_dict(state, strict=False)
    assert (sorted(missing), unexpected) == (["fc.bias", "fc.weight"], [])


@pytest.mark.parametrize(("to", "name"), [("torchvision", "a.pth"), ("timm", "a.safetensors")])
def test_a_trained_classifier_is_kept(to, name, classifier, capsys):
    source, network = classifier
    run(source, name, "--to", to)
    out = capsys.readouterr().out
    with torch.no_grad():
        assert torch.equal(printed_model(out)(IMAGES), network(IMAGES))
    assert "7 classes" in out
    if name == "a.pth":  # nothing but the tensors, which is what strict loading needs
        torchvision.models.resnet18(num_classes=7).load_state_dict(
            torch.load(name, weights_only=True), strict=True
        )


def test_safetensors_keep_how_images_are_to_be_seen_but_no_paths(pretrained):
    run(pretrained, "a.safetensors", "--to", "torchvision")
    info = load_encoder("a.safetensors")[1]
    assert (info["arch"], info["epoch"], info["objective"]) == ("resnet18", 200, "1 * uniform(t=2)")
    assert (info["args"]["mean"], info["args"]["data"]) == (MEAN, "images")
    assert b"someone" not in Path("a.safetensors").read_bytes()


def test_torchvision_takes_other_networks_with_their_own_last_layer(tmp_path, capsys):
    network = seasoned(torchvision.models.mobilenet_v3_small(num_classes=3))
    state = {k: t for k, t in network.state_dict().items() if not k.startswith("classifier.3.")}
    torch.save({"arch": "mobilenet_v3_small", "state_dict": state}, "in.pth")
    run("in.pth", "--to", "torchvision")
    model = printed_model(capsys.readouterr().out)
    network.classifier[3] = nn.Identity()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), network(IMAGES))
    status, message = refusal(convert, ["in.pth", "--to", "timm"], capsys)
    assert status == 1 and "ResNets" in message and "mobilenet_v3_small" in message


def test_timm_knows_every_resnet_by_the_same_names():
    """So what holds for the two networks above holds for the others."""
    for arch in encoders.arch_names():
        if "resne" in arch and arch in torchvision.models.list_models(module=torchvision.models):
            with torch.device("meta"):
                theirs, ours = timm.create_model(arch), torchvision.models.get_model(arch)
            shapes = [{k: t.shape for k, t in m.state_dict().items()} for m in (theirs, ours)]
            assert shapes[0] == shapes[1], arch


def test_detectron2_pickle_needs_nothing_but_arrays_of_any_numpy(pretrained, features):
    with warnings.catch_warnings(action="error"):  # no word about the unfinished file
        run(pretrained, "a.pkl", "--to", "detectron2")
    data = Path("a.pkl").read_bytes()
    asked_for = [arg for op, arg, _ in pickletools.genops(data) if op.name == "GLOBAL"]
    assert asked_for == ["numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"]
    assert not [op.name for op, _, _ in pickletools.genops(data) if op.name == "STACK_GLOBAL"]
    content = pickle.load(io.BytesIO(data), encoding="latin1")  # as detectron2 loads it
    assert content["matching_heuristics"] is True and isinstance(content["__author__"], str)
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    model = content["model"]
    ours = load_encoder(pretrained)[0].state_dict()
    ours = {to_detectron2(n): t.numpy() for n, t in ours.items() if "num_batches" not in n}
    assert model.keys() == ours.keys()
    for name, array in model.items():
        assert type(array) is np.ndarray and np.array_equal(array, ours[name]), name
    assert torch.equal(features_of(Path("a.pkl")), features)


def test_upstream_mocos_linear_evaluation_takes_the_file(pretrained, features):
    """Its main_lincls.py keeps what begins with module.encoder_q but is not fc, takes the prefix
    off, loads with strict=False and demands that fc alone is missing."""
    run(pretrained, "a.pth.tar", "--to", "upstream-moco")
    content = torch.load("a.pth.tar", weights_only=True)
    assert (content["arch"], content["epoch"]) == ("resnet18", 200)
    prefix = "module.encoder_q"
    assert any(name.startswith(f"{prefix}.fc") for name in content["state_dict"]), "and drops fc"
    kept = {
        name[len(prefix) + 1 :]: tensor
        for name, tensor in content["state_dict"].items()
        if name.startswith(prefix) and not name.startswith(f"{prefix}.fc")
    }
    network = torchvision.models.resnet18()
    message = network.load_state_dict(kept, strict=False)
    assert set(message.missing_keys) == {"fc.weight", "fc.bias"} and not message.unexpected_keys
    network.fc = nn.Identity()
    with torch.no_grad():
        assert torch.equal(network.eval()(IMAGES), features)
    head = load_encoder("a.pth.tar", head="projection")[0]
    wanted = load_encoder(pretrained, head="projection")[0]
    with torch.no_grad():
        assert torch.equal(head(IMAGES), wanted(IMAGES)), "the projection head is kept"


@pytest.mark.parametrize("classes", [0, 7])
def test_huggingface_folder_is_one_that_timm_writes(classes, pretrained, classifier, tmp_path):
    from timm.data import resolve_model_data_config
    from timm.models._hub import save_config_for_hf

    source, network = classifier if classes else (pretrained, load_encoder(pretrained)[0])
    run(source, "encoder", "--to", "huggingface")
    assert nothing_but(tmp_path / "encoder", "config.json", "model.safetensors")
    model = timm.create_model("local-dir:encoder", pretrained=True).eval()
    assert model.num_classes == classes
    with torch.no_grad():
        assert torch.equal(model(IMAGES), network(IMAGES))
    config = json.loads(Path("encoder/config.json").read_text())
    save_config_for_hf(model, "theirs.json")
    theirs = json.loads(Path("theirs.json").read_text())
    for name in ("architecture", "num_classes", "num_features", "global_pool"):
        assert config[name] == theirs[name], name
    for name, value in config["pretrained_cfg"].items():
        assert theirs["pretrained_cfg"][name] == value, name
    data = resolve_model_data_config(model)
    assert list(data["mean"]) == ([0.485, 0.456, 0.406] if classes else MEAN)
    assert list(data["input_size"]) == ([3, 224, 224] if classes else [3, 64, 64])
    assert data["interpolation"] == "bilinear"
    assert data["crop_pct"] == (0.875 if classes else 1.0)  # as main_lincls.py crops


@pytest.mark.long
def test_networks_that_others_lack_go_to_onnx_alone(tmp_path, capsys):
    """Here with the projection head."""
    write_pretrained(tmp_path / "small.pth.tar", "resnet18", small_stem=True)
    write_pretrained(tmp_path / "tiny.pth.tar", "resnet8")
    for name, what in (("small", "small stem"), ("tiny", "resnet8")):
        for to in FORMATS[:-1]:
            status, message = refusal(convert, [f"{name}.pth.tar", "--to", to], capsys)
            assert status == 1 and what in message and "onnx" in message, message
    assert nothing_but(tmp_path, "small.pth.tar", "tiny.pth.tar")
    argv = ["tiny.pth.tar", "b.onnx", "--to", "onnx", "--head", "linear"]
    status, message = refusal(convert, argv, capsys)
    assert status == 1 and "linear" in message and not Path("b.onnx").exists()
    run("tiny.pth.tar", "--to", "onnx", "--head", "projection")
    wanted = load_encoder("tiny.pth.tar", head="projection")[0]
    model = pytest.importorskip("onnx").load("tiny-projection.onnx")
    assert json.loads({p.key: p.value for p in model.metadata_props}["mean"]) == MEAN
    with torch.no_grad():
        found = onnx_features(Path("tiny-projection.onnx"))
        torch.testing.assert_close(found, wanted(IMAGES), rtol=1e-4, atol=1e-4)


# ---- Command line, and what is left behind -------------------------------------------------------


def test_default_names_are_beside_the_source_and_never_overwrite(pretrained, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    source = shutil.copy(pretrained, tmp_path / "run" / pretrained.name)
    for to in ("timm", "huggingface"):
        run(source, "--to", to)
        status, message = refusal(convert, [source, "--to", to], capsys)
        assert status == 2 and "exists" in message
    made = source.with_name("checkpoint_0199-timm.pth")
    assert nothing_but(source.parent, source.name, made.name, "checkpoint_0199-huggingface")
    made.write_bytes(b"older")
    run(source, "--to", "timm", "--overwrite")
    assert made.stat().st_size > 1e6


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("missing.pth --to timm", "no such checkpoint: missing.pth"),
        ("in.pth", "--to"),
        ("in.pth --to keras", "keras"),
        ("in.pth a.pth --to detectron2", "must end in .pkl, got a.pth; .pth goes with --to torch"),
        ("in.pth a.pkl --to torchvision", "must end in .pth or .pt or .safetensors, got a.pkl; .pkl"
         " goes with --to detectron2"),
        ("in.pth a.onnx --to timm", "goes with --to onnx"),
        ("in.pth a --to onnx", "must end in .onnx, got a"),
        ("in.pth a.safetensors --to huggingface", "is a folder, got a.safetensors; .safetensors "),
        ("in.pth in.pth/new/a.pth --to timm", "in.pth is a file, so there can be no in.pth/new"),
        ("in.pth in.pth --to timm --overwrite", "OUT is IN"),
        ("in.pth folder --to huggingface --overwrite", "folder that exists"),
        ("in.pth a.pth --to timm --head linear", "--head is for --to onnx"),
        ("no\x1b[2J\nsuch.pth --to timm", r"no such checkpoint: no\x1b[2J\nsuch.pth"),
    ],
)  # fmt: skip
def test_what_can_be_refused_at_once(argv, said, tmp_path, capsys):
    Path("in.pth").write_bytes(b"whatever")
    Path("folder").mkdir()
    status, message = refusal(convert, argv.split(" "), capsys)
    assert status == 2 and said in message
    assert nothing_but(tmp_path, "in.pth", "folder")
    assert Path("in.pth").read_bytes() == b"whatever"


def test_packages_that_onnx_needs_are_named_before_any_work(monkeypatch, capsys):
    found = importlib.util.find_spec
    lacking = ("onnx", "onnxscript")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in lacking else found(name)
    )
    Path("in.pth").write_bytes(b"not looked at")
    status, message = refusal(convert, ["in.pth", "--to", "onnx"], capsys)
    assert status == 2 and "needs onnx, onnxscript: pip install onnx onnxscript" in message


def test_help_says_how_the_file_of_each_format_ends(capsys):
    with pytest.raises(SystemExit):
        convert(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for said in ("timm: .pth or .pt or .safetensors", "detectron2: .pkl", "huggingface: none, a"):
        assert said in text


@pytest.mark.parametrize("name", ["new/er/est/a", "folder/new/a.pkl", "./x/../y/a.pth"])
def test_folders_of_out_are_made_when_it_is(name, pretrained, tmp_path, capsys):
    Path("folder").mkdir()
    to = {".pth": "timm", ".pkl": "detectron2"}.get(Path(name).suffix, "huggingface")
    Path("in.pth").write_bytes(b"<html>not found</html>")
    status, message = refusal(convert, ["in.pth", name, "--to", to], capsys)
    assert status == 1 and "web page" in message
    assert nothing_but(tmp_path, "folder", "in.pth") and nothing_but(tmp_path / "folder")
    run(pretrained, name, "--to", to)
    assert Path(name).exists() and nothing_but(tmp_path / "folder", *["new"] * ("folder" in name))


def test_what_a_file_says_is_shown_in_one_line(tmp_path, capsys):
    text = "\x1b[2J\x1b]0;title\x07a\nwrote /etc/passwd \u202etxt\udce9" + "x" * 100_000
    state = torchvision.models.resnet18().state_dict()
    content = {"arch": "resnet18", "epoch": text, "state_dict": state, "args": {"objective": text}}
    torch.save(content, tmp_path / "in\x1b[1m.pth")
    run("in\x1b[1m.pth", "--to", "timm")
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert not err and all(line.isprintable() and len(line) < 2000 for line in lines)
    assert len(lines) == 6 and [line[:5] for line in lines[:3]] == ["found", "wrote", "load "]


@pytest.mark.parametrize("to", ["timm", "detectron2", "huggingface"])
def test_nothing_is_left_when_the_disk_is_full(to, pretrained, tmp_path):
    """A limit on the size of files stands in for the disk: the write fails half-way."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, 2**22))"
    script = str(ROOT / "scripts" / "convert.py")
    (work := tmp_path / "work").mkdir()
    (work / "x.pth.tar").symlink_to(pretrained)
    process = harness.Processes(
        tmp_path / "out", work / "x.pth.tar", "--to", to, before=limit,
        code=f"import runpy; runpy.run_path({script!r}, run_name='__main__')",
    )  # fmt: skip
    assert process.wait() == [1]
    last = process.output().strip().splitlines()[-1]
    assert "error:" in last and "File too large" in last, process.output()
    assert nothing_but(work, "x.pth.tar")


def test_nothing_is_left_of_an_export_that_fails(tmp_path, capsys):
    state = torchvision.models.densenet121(num_classes=2).state_dict()
    write_safetensors("in.safetensors", state, {"arch": "densenet121", "args": {"image_size": 8}})
    status, message = refusal(convert, ["in.safetensors", "--to", "onnx"], capsys)
    assert status == 1 and "images of 8 pixels do not fit" in message
    assert nothing_but(tmp_path, "in.safetensors")


def test_a_checkpoint_that_says_nonsense_of_its_images_is_refused(tmp_path, capsys):
    state = torchvision.models.resnet18().state_dict()
    for args in ({"mean": [1, 2]}, {"std": [1, 0, 1]}, {"image_size": "big"}, {"mean": "abc"}):
        write_safetensors("in.safetensors", state, {"arch": "resnet18", "args": args})
        status, message = refusal(convert, ["in.safetensors", "--to", "huggingface"], capsys)
        assert status == 1 and re.search("mean|std|image size", message)
        assert nothing_but(tmp_path, "in.safetensors")


def test_an_address_is_converted_into_the_current_folder(
    pretrained, features, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=pretrained.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run(f"http://127.0.0.1:{server.server_port}/{pretrained.name}?raw=1", "--to", "timm")
        server.shutdown()
    assert nothing_but(tmp_path, "cache", "checkpoint_0199-timm.pth")
    assert torch.equal(features_of(Path("checkpoint_0199-timm.pth")), features)
