"""torch.hub's entry points, from a local clone, in a process that lies elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import ROOT, finish, start_python
from networks import IMAGES, features_of, seasoned, under

from moco import encoders
from moco.errors import CheckpointError


def load(name: str, **options: object) -> torch.nn.Module:
    return torch.hub.load(str(ROOT), name, source="local", **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.nn.Module]]:
    """moco_align_uniform's two files, and the networks in them."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    network, probe = (torchvision.models.resnet50(num_classes=count) for count in (128, 10))
    encoders.add_mlp_head(network)
    for name, prefix, net in (("pretrained", "module.encoder_q.", network),
                              ("probe", "module.", probe)):  # fmt: skip
        state = under(prefix, seasoned(net).state_dict())
        content = {"epoch": 200, "arch": "resnet50", "state_dict": state}
        torch.save(content, folder / f"{name}.pth.tar")
    return folder, {"pretrained": network, "probe": probe}


@torch.no_grad()
def test_each_head(files) -> None:
    folder, networks = files
    pretrained, probe = folder / "pretrained.pth.tar", folder / "probe.pth.tar"
    encoder = load("resnet50_encoder", weights=str(pretrained))
    assert not encoder.training and encoder(IMAGES).shape == (2, 2048)
    assert torch.equal(encoder(IMAGES), features_of(networks["pretrained"]))
    encoder = load("resnet50_encoder", weights=str(probe), head="linear")
    assert torch.equal(encoder(IMAGES), networks["probe"](IMAGES))
    with pytest.raises(CheckpointError, match="has a projection head, linear was asked for"):
        load("resnet50_encoder", weights=str(pretrained), head="linear")


@pytest.mark.long
@torch.no_grad()
def test_the_reference_repositorys_entry_point(files) -> None:
    """Its outputs: logits, or the projection scaled to unit length. Its arguments, by position."""
    folder, networks = files
    entry = "imagenet_resnet50_encoder"
    encoder = torch.hub.load(str(ROOT), entry, True, str(folder / "probe.pth.tar"), source="local")
    assert torch.equal(encoder(IMAGES), networks["probe"](IMAGES))
    encoder = load(entry, weights=str(folder / "pretrained.pth.tar"))
    wanted = networks["pretrained"](IMAGES)
    torch.testing.assert_close(encoder(IMAGES), wanted / wanted.norm(dim=1, keepdim=True))
    encoder = load(entry, weights=str(folder / "probe.pth.tar"))  # it has no projection
    assert torch.equal(encoder(IMAGES), features_of(networks["probe"]))
    with pytest.raises(ValueError, match="with_linear_clf must be True or False, got 'a.pth'"):
        torch.hub.load(str(ROOT), entry, "a.pth", source="local")


@pytest.mark.parametrize("with_linear_clf", [False, True])
def test_nothing_is_downloaded_unasked(
    with_linear_clf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError) as caught:
        load("imagenet_resnet50_encoder", with_linear_clf=with_linear_clf)
    message = str(caught.value)
    name = "imagenet_align_uniform" + with_linear_clf * "_with_linear_clf"
    assert f"releases/download/v1.0-checkpoints/{name}.pth.tar " in message
    assert "CC-BY-NC 4.0" in message and "weights=" in message and "\n" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", ["resnet50_encoder", "imagenet_resnet50_encoder"])
def test_another_architecture_is_named(entry: str, tmp_path: Path) -> None:
    torch.save(encoders.build_encoder("resnet8", 3).state_dict(), path := tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        load(entry, weights=str(path))
    assert f"{path} is a resnet8, expected a resnet50" in str(caught.value)
    assert f"moco.checkpoint.load_encoder('{path}'" in str(caught.value)


PROGRAM = """
import json, os, sys, torch
repo, weights = sys.argv[1:]
torch.hub.set_dir("hub")
os.makedirs("hub")
os.symlink(repo, "hub/me_repo_main")  # as if torch.hub had fetched it
options = {"trust_repo": True, "skip_validation": True}
said = {"names": torch.hub.list("me/repo:main", **options)}
for name in said["names"]:
    said[name] = torch.hub.help("me/repo:main", name, **options)
encoder = torch.hub.load(repo, "resnet50_encoder", source="local", weights=weights)
said["shape"] = list(encoder(torch.zeros(1, 3, 32, 32)).shape)
said["tensorboard"] = any(name.startswith(("tensorboard", "matplotlib")) for name in sys.modules)
print(json.dumps(said))
"""


@pytest.mark.long
def test_a_process_elsewhere(files, tmp_path: Path) -> None:
    """It knows neither this folder nor its packages, and has another `moco` beside it; torch and
    torchvision are all that is needed, as hubconf.py says."""
    (tmp_path / "moco").mkdir()
    (tmp_path / "moco" / "__init__.py").write_text("raise ImportError('another moco')")
    (tmp_path / "program.py").write_text(PROGRAM)
    process = start_python(
        "-c", "import os, sys; sys.path = [p for p in sys.path if p != os.environ['PYTHONPATH']]; "
        f"sys.argv[1:] = [{str(ROOT)!r}, {str(files[0] / 'probe.pth.tar')!r}]; "
        "exec(open('program.py').read())", cwd=tmp_path,
    )  # fmt: skip
    status, out, err = finish(process)
    assert status == 0, err
    said = json.loads(out.splitlines()[-1])
    assert said["names"] == [
        "cifar10_align_uniform", "cifar10_infonce", "imagenet_resnet50_encoder", "resnet50_encoder",
    ]  # fmt: skip
    assert "CC-BY-NC 4.0" in said["imagenet_resnet50_encoder"]
    assert 'features (N, 2048); "projection"' in " ".join(said["resnet50_encoder"].split())
    assert said["shape"] == [1, 2048] and not said["tensorboard"]
