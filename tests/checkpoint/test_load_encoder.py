"""load_encoder: encoders of this project's, of upstream's and of plain files, with their heads."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from networks import IMAGES, OLD, assert_gives, features_of, make_moco, resnet8, seasoned, under

from moco import encoders
from moco.batch_norm import SplitBatchNorm2d
from moco.builder import MoCo
from moco.checkpoint import load_encoder, write_checkpoint, write_safetensors
from moco.encoders import build_encoder
from moco.errors import CheckpointError

small_resnet = functools.partial(build_encoder, "resnet8")


# ---- Pretraining and linear evaluation -----------------------------------------------------------


@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "mlp"])
def test_our_pretraining_checkpoint(tmp_path, mlp):
    """The query encoder, not the key encoder, and what the file says about itself."""
    moco = make_moco(small_resnet, mlp)
    path = tmp_path / "checkpoint_0006.pth.tar"
    optimizer = torch.optim.SGD(moco.parameters(), 0.1, momentum=0.9)
    args = {"objective": "3 * align(alpha=2)", "image_size": 32}
    content = {
        "version": 1, "arch": "resnet8", "epoch": 7, "step": 70, "step_in_epoch": 0,
        "state_dict": under("module.", moco.state_dict()), "optimizer": optimizer.state_dict(),
        "scaler": None, "shuffle_generator": moco.shuffle_generator.get_state(),
        "rng": torch.get_rng_state().unsqueeze(0), "args": args,
    }  # fmt: skip
    write_checkpoint(path, content)
    about = {"arch": "resnet8", "epoch": 7, "layout": "moco", "args": args}
    about |= {"objective": "3 * align(alpha=2)", "head": "mlp" if mlp else "linear"}
    assert_gives(path, moco.encoder_q, "projection", **about)


@pytest.mark.filterwarnings("ignore:.*old format")
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "legacy"])
@pytest.mark.parametrize("mlp", [False, True], ids=["v1", "v2"])
def test_upstreams_pretraining_checkpoint(tmp_path, mlp, options):
    """No version, no args; names under module.encoder_q, with queue; also in torch's old format,
    and with the scalar_label of moco_align_uniform."""
    moco = make_moco(torchvision.models.resnet18, mlp)
    state = under("module.", moco.state_dict())
    state["module.scalar_label"] = torch.zeros((), dtype=torch.int64)
    content = {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": state,
        "optimizer": torch.optim.SGD(moco.parameters(), 0.1).state_dict(),
    }
    torch.save(content, path := tmp_path / "a.pth.tar", **options)
    about = {"arch": "resnet18", "small_stem": False, "epoch": 200, "layout": "moco", "args": {}}
    about |= {"objective": None, "head": "mlp" if mlp else "linear"}
    assert_gives(path, moco.encoder_q, "projection", **about)


def test_a_pretraining_state_dict_alone(tmp_path):
    """Without `module.` and without anything around it."""
    moco = make_moco(small_resnet, mlp=True)
    torch.save(moco.state_dict(), path := tmp_path / "a.pth.tar")
    assert_gives(path, moco.encoder_q, "projection", arch="resnet8", layout="moco", epoch=None)


def test_linear_evaluations_checkpoint(tmp_path):
    """Backbone and classifier under module., as upstream's main_lincls and ours write them."""
    network = seasoned(torchvision.models.resnet18(num_classes=9))
    content = {
        "epoch": 100,
        "arch": "resnet18",
        "state_dict": under("module.", network.state_dict()),
        "best_acc1": torch.tensor(67.7),
        "optimizer": {},
    }
    torch.save(content, path := tmp_path / "a.pth.tar")
    assert_gives(
        path, network, "linear", arch="resnet18", layout="lincls", head="linear", epoch=100
    )


def test_torchvisions_state_dict(tmp_path):
    """The architecture is found from names and shapes."""
    network = seasoned(torchvision.models.resnet18(num_classes=9))
    torch.save(network.state_dict(), path := tmp_path / "a.pth.tar")
    assert_gives(path, network, "linear", arch="resnet18", small_stem=False, layout="plain",
                 head="linear", epoch=None, objective=None)  # fmt: skip


def test_torchvisions_state_dict_from_before_batches_were_counted(tmp_path):
    """Files from before torch 0.4.1 have no num_batches_tracked; torch itself takes them."""
    network = resnet8(9)
    state = {n: t for n, t in network.state_dict().items() if "num_batches_tracked" not in n}
    resnet8(9).load_state_dict(state)
    torch.save({"arch": "resnet8", "state_dict": state}, path := tmp_path / "a.pth.tar")
    encoder, _ = load_encoder(path, head="linear")
    assert torch.equal(encoder(IMAGES), network(IMAGES))


def test_an_encoder_trained_with_batch_norm_in_groups_becomes_a_plain_one(tmp_path):
    torch.manual_seed(0)
    moco = MoCo(functools.partial(small_resnet, bn_splits=2), 12, 16, align_alpha=2)
    assert any(isinstance(m, SplitBatchNorm2d) for m in moco.modules())
    moco(IMAGES.repeat(2, 1, 1, 1), IMAGES.repeat(2, 1, 1, 1).flip(3))
    torch.save(
        {"arch": "resnet8", "state_dict": under("module.", moco.state_dict())},
        path := tmp_path / "a.pth.tar",
    )
    encoder, _ = load_encoder(path, head="projection")
    assert not any(isinstance(m, SplitBatchNorm2d) for m in encoder.modules())
    torch.testing.assert_close(encoder(IMAGES), moco.encoder_q.eval()(IMAGES))


# ---- Architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_a_small_stem_is_found_from_its_shape(tmp_path, named):
    moco = make_moco(functools.partial(build_encoder, "resnet18", small_stem=True), mlp=False)
    content = {"state_dict": under("module.", moco.state_dict())}
    if named:
        content["arch"] = "resnet18"
    torch.save(content, path := tmp_path / "a.pth.tar")
    assert_gives(path, moco.encoder_q, "projection", arch="resnet18", small_stem=True)


@pytest.mark.parametrize("arch", ["resnet8x4", "mobilenet_v3_small", "mnasnet0_5"])
@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "mlp"])
def test_other_architectures(tmp_path, arch, mlp):
    """Heads in `fc` and in `classifier.N`."""
    moco = make_moco(functools.partial(build_encoder, arch), mlp)
    torch.save(
        {"arch": arch, "state_dict": under("module.", moco.state_dict())},
        path := tmp_path / "a.pth.tar",
    )
    assert_gives(path, moco.encoder_q, "projection", arch=arch, small_stem=False)


@pytest.mark.long
def test_a_last_layer_without_bias(tmp_path):
    arch = "maxvit_t"
    torch.manual_seed(0)
    network = build_encoder(arch, 7).eval()
    torch.save({"arch": arch, "state_dict": network.state_dict()}, path := tmp_path / "a.pth.tar")
    encoder, info = load_encoder(path, head="linear")
    assert info["arch"] == arch and info["ignored"] == []
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(encoder(images), network(images))


def test_a_name_that_does_not_fit_the_tensors_is_not_believed(tmp_path):
    network = resnet8(9)
    torch.save(
        {"arch": "resnet50", "state_dict": network.state_dict()}, path := tmp_path / "a.pth.tar"
    )
    assert_gives(path, network, "linear", arch="resnet8")


def altered(state: dict, how: str) -> dict:
    new = dict(state)
    name = "layer2.0.conv1.weight"
    if how == "missing":
        del new[name]
    elif how == "unexpected":
        new["layer9.weight"] = torch.ones(1)
    elif how == "renamed":
        new["layer2.0.convolution.weight"] = new.pop(name)
    elif how == "transposed":
        new[name] = new[name].transpose(0, 1)
    return new


@pytest.mark.parametrize("arch", ["resnet8", "unheard_of"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "1 missing (layer2.0.conv1.weight)"),
        ("unexpected", "1 unexpected (layer9.weight)"),
        ("renamed", "1 unexpected (layer2.0.convolution.weight)"),
        ("transposed", "1 of another shape (layer2.0.conv1.weight is (16, 32, 3, 3), expected"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_named(
    how: str, said: str, arch: str | None, tmp_path: Path, state: dict
) -> None:
    torch.save({"arch": arch, "state_dict": altered(state, how)}, path := tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path)
    message = str(caught.value)
    assert said in message and "Against resnet8:" in message
    assert f"; it says arch {arch!r}" in message


def test_tensors_of_no_known_network_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = "moco.checkpoint.architectures.build_encoder"
    monkeypatch.setattr(build, lambda *_, **__: pytest.fail("it was tried"))
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "nested.pth")
    torch.save({"blocks.0.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no known architecture.*first a.*"):
        load_encoder(tmp_path / "nested.pth")
    remedy = "first blocks.0.weight.; expected torchvision's names.*behind one and the same prefix"
    with pytest.raises(CheckpointError, match=f"no known architecture.*{remedy}"):
        load_encoder(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no tensors by name"),
        ({"state_dict": {}}, "holds no tensors by name"),
        ({"epoch": 3, "arch": "resnet18"}, "holds no tensors by name"),
        ({"state_dict": [1, 2]}, "state_dict is a list, expected a dict"),
    ],
)
def test_a_checkpoint_without_an_encoder_is_refused_by_name(tmp_path, content, message):
    torch.save(content, path := tmp_path / "a.pth.tar")
    with pytest.raises(CheckpointError, match=f"{path}.*{message}"):
        load_encoder(path)


# ---- Heads ---------------------------------------------------------------------------------------


def test_a_backbone_without_head_gives_features_only(tmp_path):
    network = resnet8(9)
    state = {n: t for n, t in network.state_dict().items() if not n.startswith("fc.")}
    torch.save({"arch": "resnet8", "state_dict": state}, path := tmp_path / "a.pth.tar")
    encoder, info = load_encoder(path)
    assert torch.equal(encoder(IMAGES), features_of(network))
    assert info["head"] == "none" and info["ignored"] == []
    for head in ("linear", "projection"):
        with pytest.raises(CheckpointError, match=f"{path} has no head, {head} was asked for"):
            load_encoder(path, head=head)


def test_a_head_of_the_wrong_kind_is_refused(tmp_path):
    """A projection is no classifier, though both may be one linear layer."""
    moco = make_moco(small_resnet, mlp=False)
    torch.save({"state_dict": under("module.", moco.state_dict())}, path := tmp_path / "a.pth.tar")
    with pytest.raises(CheckpointError, match=f"{path} has a projection head, linear was asked"):
        load_encoder(path, head="linear")
    torch.save(resnet8(9).state_dict(), path := tmp_path / "a.pth.tar")
    with pytest.raises(CheckpointError, match=f"{path} has a linear head, projection was asked"):
        load_encoder(path, head="projection")
    with pytest.raises(
        ValueError, match='head must be "none", "projection" or "linear", got \'fc\''
    ):
        load_encoder(path, head="fc")


@pytest.mark.parametrize(
    "head",
    [{"fc.weight": torch.ones(10), "fc.bias": torch.ones(10)},
     {"fc.weight": torch.ones(10, 3), "fc.bias": torch.ones(10)},
     {"fc.weight": torch.ones(10, 64), "fc.bias": torch.ones(9)},
     {"fc.weight": torch.ones(10, 64)}],
)  # fmt: skip
def test_heads_that_do_not_fit_are_refused(head: dict, tmp_path: Path, state: dict) -> None:
    without = {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}
    torch.save({**without, **head}, path := tmp_path / "a.pth")
    load_encoder(path)  # features need no head
    with pytest.raises(CheckpointError, match="fc.*expected|no head"):
        load_encoder(path, head="linear")


@pytest.mark.parametrize("prefix", ["", "module.", "module.encoder_q."])
def test_a_head_alone_is_no_encoder(prefix: str, tmp_path: Path) -> None:
    for state in ({"fc.weight": torch.ones(5, 64), "fc.bias": torch.ones(5)},
                  {"classifier.0.weight": torch.ones(2, 3)}):  # fmt: skip
        torch.save({"state_dict": under(prefix, state)}, path := tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match=f"{path} holds a head only .*no backbone") as e:
            load_encoder(path)
        assert "expected the state dict of a whole network" in str(e.value)


def test_a_projection_of_a_state_dict_alone(tmp_path: Path) -> None:
    """As a release file has it: torchvision's names, fc.0 and fc.2."""
    torch.manual_seed(0)
    network = encoders.build_encoder("resnet8", 12)
    encoders.add_mlp_head(network)
    seasoned(network)
    torch.save(network.state_dict(), path := tmp_path / "a.pth")
    assert_gives(path, network, "projection", head="mlp", layout="plain")


# ---- Names and number formats --------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module.model._orig_mod."])
def test_wrappers_in_names_are_passed_over(prefix: str, tmp_path: Path) -> None:
    network = resnet8()
    state = under(prefix, network.state_dict())
    for content in (state, {"state_dict": state}, {"model": state, "epoch": 4, "lr": 0.1}):
        torch.save(content, path := tmp_path / "a.pth")
        layout = "lincls" if "state_dict" in content else "plain"
        assert_gives(path, network, "linear", arch="resnet8", layout=layout,
                     epoch=content.get("epoch"))  # fmt: skip
    moco = under(prefix, under("encoder_q._orig_mod.", network.state_dict()))
    torch.save({"state_dict": moco}, path)
    assert_gives(path, network, "projection", layout="moco", encoder="encoder_q")


def test_a_name_with_and_without_prefix_is_refused(tmp_path: Path, state: dict) -> None:
    twice = {**state, "module.conv1.weight": torch.zeros_like(state["conv1.weight"])}
    torch.save(twice, path := tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds conv1.weight twice"):
        load_encoder(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_precision_becomes_float32_of_the_same_values(dtype, suffix, tmp_path: Path) -> None:
    state = {
        n: t.to(dtype) if t.is_floating_point() else t for n, t in resnet8().state_dict().items()
    }
    path = tmp_path / f"a{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        write_safetensors(path, state, {})
    encoder, _ = load_encoder(path, head="linear")
    for name, tensor in encoder.state_dict().items():
        assert tensor.dtype == (torch.float32 if state[name].is_floating_point() else torch.int64)
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name


@pytest.mark.parametrize("dtype", [torch.int16, torch.bool, torch.complex64])
def test_numbers_of_another_sort_are_refused(dtype: torch.dtype, tmp_path: Path, state) -> None:
    new = {**state, "conv1.weight": state["conv1.weight"].to(dtype)}
    torch.save(new, path := tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=f"conv1.weight holds {dtype}, expected torch.float32"
    ):
        load_encoder(path)


def test_a_folder_of_hugging_face_is_its_model_safetensors(tmp_path: Path) -> None:
    network = resnet8()
    with pytest.raises(CheckpointError, match="has 0 files of weights; name one: .*/FILE"):
        load_encoder(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", network.state_dict(), {})
    assert_gives(tmp_path, network, "linear", arch="resnet8")


def test_a_folder_is_its_newest_checkpoint_or_the_encoder_of_a_release(tmp_path: Path) -> None:
    fixtures = Path(__file__).parent.parent / "fixtures"
    encoder, info = load_encoder(fixtures / "release")
    assert info["head"] == "none"
    same, _ = load_encoder(next((fixtures / "release").glob("toy-backbone-*.pth")))
    assert all(map(torch.equal, encoder.state_dict().values(), same.state_dict().values()))
    run = shutil.copytree(fixtures / "pretrain", tmp_path / "run")
    assert load_encoder(run, "projection")[1]["head"] != "none"
    (run / "step_00000002.pth.tar").touch()  # an older one is not looked at
    assert load_encoder(run)[1]["arch"] == info["arch"]
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"has 2 files of weights \(a.pth, b.pth\)"):
        load_encoder(tmp_path)


def test_tensors_beside_the_encoder_are_listed(tmp_path: Path) -> None:
    network = resnet8()
    state = {
        **under("module.encoder_q.", network.state_dict()),
        "module.queue": torch.ones(5, 8),
        "module.scalar_label": torch.tensor(0),
    }
    torch.save({"state_dict": state}, path := tmp_path / "a.pth")
    _, info = load_encoder(path)
    assert info["beside"] == ["queue", "scalar_label"]
    assert info["ignored"] == ["fc.bias", "fc.weight"]


def test_a_part_of_a_checkpoint_is_named_as_one(tmp_path):
    path = tmp_path / "model-00001-of-00002.safetensors"
    write_safetensors(path, small_resnet(10).state_dict(), {})
    with pytest.raises(CheckpointError, match="is one of 2 parts of a checkpoint"):
        load_encoder(path)
    whole = path.rename(tmp_path / "model-00001-of-00001.safetensors")
    assert load_encoder(whole)[1]["arch"] == "resnet8"


def test_what_a_file_says_of_itself_is_one_line_of_text(tmp_path):
    """It reaches terminals, reports and logs."""
    state = under("a\x1b[31m.", small_resnet(10).state_dict())
    state["a\x1b[31m.conv1.weight"] *= 1e9
    args = {"objective": "align\nerror: \x1b[31m\u202e", "task": "moco\n# heading"}
    content = {"state_dict": state, "epoch": "1\n2", "arch": "resnet8", "args": args}
    write_checkpoint(tmp_path / "a.pth.tar", content)
    with pytest.warns(UserWarning, match="absurdly large") as warned:
        info = load_encoder(tmp_path / "a.pth.tar")[1]
    said = [info[name] for name in ("objective", "task", "epoch", "encoder")]
    assert all(text.isprintable() for text in (*said, *(str(w.message) for w in warned)))
    assert info["objective"] == r"align\nerror: \x1b[31m\u202e"
