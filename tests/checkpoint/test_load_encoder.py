"""load_encoder: encoders of this project's, of upstream's and of plain files, with their heads."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from networks import IMAGES, OLD, assert_gives, make_moco, projector, resnet8, seasoned, under

from moco.batch_norm import SplitBatchNorm2d
from moco.builder import MoCo
from moco.checkpoint import load_encoder, write_checkpoint, write_safetensors
from moco.encoders import add_mlp_head, build_encoder

small_resnet = functools.partial(build_encoder, "resnet8")


# ---- Pretraining and linear evaluation -----------------------------------------------------------


@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "mlp"])
def test_our_pretraining_checkpoint(tmp_path, save, mlp):
    """The query encoder, not the key encoder, and what the file says about itself."""
    moco = make_moco(small_resnet, mlp)
    path = tmp_path / "checkpoint_0006.pth.tar"
    args = {"objective": "3 * align(alpha=2)", "image_size": 32}
    content = {
        "version": 1, "arch": "resnet8", "epoch": 7, "step": 70, "step_in_epoch": 0,
        "state_dict": under("module.", moco.state_dict()),
        "optimizer": torch.optim.SGD(moco.parameters(), 0.1, momentum=0.9).state_dict(),
        "scaler": None, "shuffle_generator": moco.shuffle_generator.get_state(),
        "rng": torch.get_rng_state().unsqueeze(0), "args": args,
    }  # fmt: skip
    write_checkpoint(path, content)
    about = {"arch": "resnet8", "layout": "moco", "head": "mlp" if mlp else "linear"}
    said = {"epoch": 7, "objective": args["objective"], "args": args}
    assert_gives(path, moco.encoder_q, "projection", **about, **said)
    # Its state dict alone, without `module.`.
    unsaid = {"epoch": None, "objective": None, "args": {}}
    assert_gives(save(moco.state_dict()), moco.encoder_q, "projection", **about, **unsaid)


@pytest.mark.filterwarnings("ignore:.*old format")
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "legacy"])
@pytest.mark.parametrize("mlp", [False, True], ids=["v1", "v2"])
def test_upstreams_pretraining_checkpoint(save, mlp, options):
    """No version, no args; names under module.encoder_q, with queue; also in torch's old format,
    and with the scalar_label of moco_align_uniform."""
    moco = make_moco(torchvision.models.resnet18, mlp)
    state = under("module.", moco.state_dict())
    state["module.scalar_label"] = torch.zeros((), dtype=torch.int64)
    optimizer = torch.optim.SGD(moco.parameters(), 0.1).state_dict()
    content = {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": optimizer}
    assert_gives(
        save(content, "a.pth.tar", **options), moco.encoder_q, "projection", arch="resnet18",
        small_stem=False, epoch=200, layout="moco", args={}, objective=None,
        head="mlp" if mlp else "linear",
    )  # fmt: skip


def test_a_linear_evaluation_and_torchvisions_state_dict(save):
    """Backbone and classifier under module., as upstream's main_lincls and ours write them; of
    plain names and shapes the architecture is found."""
    network = seasoned(torchvision.models.resnet18(num_classes=9))
    plain = network.state_dict()
    content = {"epoch": 100, "arch": "resnet18", "state_dict": under("module.", plain),
               "best_acc1": torch.tensor(67.7), "optimizer": {}}  # fmt: skip
    about = {"arch": "resnet18", "head": "linear", "small_stem": False, "objective": None}
    assert_gives(save(content), network, "linear", layout="lincls", epoch=100, **about)
    assert_gives(save(plain), network, "linear", layout="plain", epoch=None, **about)


def test_an_encoder_trained_with_batch_norm_in_groups_becomes_a_plain_one(save):
    torch.manual_seed(0)
    moco = MoCo(functools.partial(small_resnet, bn_splits=2), 12, 16, align_alpha=2)
    assert any(isinstance(m, SplitBatchNorm2d) for m in moco.modules())
    moco(IMAGES.repeat(2, 1, 1, 1), IMAGES.repeat(2, 1, 1, 1).flip(3))
    path = save({"arch": "resnet8", "state_dict": under("module.", moco.state_dict())})
    encoder, _ = load_encoder(path, head="projection")
    assert not any(isinstance(m, SplitBatchNorm2d) for m in encoder.modules())
    torch.testing.assert_close(encoder(IMAGES), moco.encoder_q.eval()(IMAGES))


# ---- Architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "small_stem", "mlp", "named"),
    [
        ("resnet18", True, False, True),
        ("resnet18", True, False, False),
        *((arch, False, mlp, True) for mlp in (False, True)
          for arch in ("resnet8x4", "mobilenet_v3_small", "mnasnet0_5")),
    ],
)  # fmt: skip
def test_stems_and_architectures_of_all_sorts(save, arch, small_stem, mlp, named):
    """Heads in `fc` and in `classifier.N`."""
    moco = make_moco(functools.partial(build_encoder, arch, small_stem=small_stem), mlp)
    content = {"state_dict": under("module.", moco.state_dict())} | (
        {"arch": arch} if named else {}
    )
    assert_gives(save(content), moco.encoder_q, "projection", arch=arch, small_stem=small_stem)


@pytest.mark.long
def test_a_last_layer_without_bias(save):
    torch.manual_seed(0)
    network = build_encoder("maxvit_t", 7).eval()
    path = save({"arch": "maxvit_t", "state_dict": network.state_dict()})
    encoder, info = load_encoder(path, head="linear")
    assert info["arch"] == "maxvit_t" and info["ignored"] == []
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(encoder(images), network(images))


NAME = "layer2.0.conv1.weight"


@pytest.mark.parametrize("arch", ["resnet8", "unheard_of"])
@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (lambda state: state.pop(NAME), f"1 missing ({NAME})"),
        # It may take part in the features.
        (lambda state: state.update({"norm.weight": torch.ones(64)}), "1 unexpected (norm.weight)"),
        (lambda state: state.update({NAME: state[NAME].transpose(0, 1)}),
         f"1 of another shape ({NAME} is (16, 32, 3, 3), expected"),
    ],
    ids=["missing", "unexpected", "transposed"],
)  # fmt: skip
def test_names_and_shapes_that_do_not_fit_are_named(alter, said, arch, not_loaded, state) -> None:
    alter(state)
    message = not_loaded({"arch": arch, "state_dict": state})
    assert said in message and "Against resnet8:" in message
    assert f"; it says arch {arch!r}" in message


def test_tensors_of_no_known_network_are_refused_at_once(not_loaded, monkeypatch) -> None:
    build = "moco.checkpoint.architectures.build_encoder"
    monkeypatch.setattr(build, lambda *_, **__: pytest.fail("it was tried"))
    message = not_loaded({"model": {"blocks.0.weight": torch.ones(1)}})
    assert "no known architecture" in message and "first blocks.0.weight)" in message
    assert "; expected torchvision's names" in message and "behind one and the same p" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no tensors by name, only an empty dict; expected an encoder's state dict"),
        ({"state_dict": {}}, "holds no tensors by name"),
        ({"epoch": 3, "arch": "resnet18"}, "holds no tensors by name"),
        ({"state_dict": [1, 2]}, "state_dict is a list, expected a dict"),
    ],
)
def test_a_checkpoint_without_an_encoder_is_refused_by_name(content, message, not_loaded):
    assert message in not_loaded(content)


# ---- Heads ---------------------------------------------------------------------------------------


def test_a_head_of_the_wrong_kind_is_refused(not_loaded, save):
    """A projection is no classifier, though both may be one linear layer."""
    network = resnet8()
    moco = {"state_dict": under("module.encoder_q.", network.state_dict())}
    assert "has a projection head, linear was asked" in not_loaded(moco, "linear")
    plain = save(network.state_dict())
    assert "has a linear head, projection was asked" in not_loaded(plain, "projection")
    with pytest.raises(ValueError, match='"none", "projection" or "linear", got \'fc\''):
        load_encoder(plain, head="fc")


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({"weight": torch.ones(10), "bias": torch.ones(10)}, "fc, weight is (10,), expected"),
        ({"weight": torch.ones(10, 3), "bias": torch.ones(10)}, "fc, weight is (10, 3), expected"),
        ({"weight": torch.ones(10, 64), "bias": torch.ones(9)}, "fc.bias is (9,), expected (10,)"),
        ({"weight": torch.ones(10, 64)}, "has no head, linear was asked for"),
        ({"0.weight": torch.ones(40, 9)}, "0.weight is (40, 9), expected (outputs, 64)"),
        ({"3.weight": torch.ones(24)}, "3.weight is (24,), expected (outputs, 40)"),
        ({"1.running_mean": torch.ones(39)}, "fc.1.running_mean is (39,), expected (40,)"),
        ({"9.weight": torch.ones(3, 24)}, "layer 9 follows layer 4"),
        ({"999.weight": torch.ones(3, 24)}, "layer 999 follows layer 4"),
    ],
)
def test_heads_that_do_not_fit_are_named(head: dict, said: str, not_loaded, save, state) -> None:
    mlp = "weight" not in head
    backbone = {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}
    other = projector(64, 40, 24, bias=False).state_dict() if mlp else {}
    path = save(backbone | under("fc.", other | head))
    assert load_encoder(path)[1]["head"] == (  # features need no head
        "mlp" if mlp else "linear" if "bias" in head else "none"
    )
    assert said in not_loaded(path, "projection" if mlp else "linear")


@pytest.mark.parametrize("prefix", ["", "module.", "module.encoder_q."])
def test_a_head_alone_is_no_encoder(prefix: str, not_loaded) -> None:
    for state in ({"fc.weight": torch.ones(5, 64), "fc.bias": torch.ones(5)},
                  {"classifier.0.weight": torch.ones(2, 3)}):  # fmt: skip
        message = not_loaded({"state_dict": under(prefix, state)})
        assert "holds a head only (" in message and "no backbone; expected the state" in message


def test_a_projection_of_a_state_dict_alone(save) -> None:
    """As a release file has it: torchvision's names, fc.0 and fc.2."""
    torch.manual_seed(0)
    add_mlp_head(network := small_resnet(12))
    path = save(seasoned(network).state_dict())
    assert_gives(path, network, "projection", head="mlp", layout="plain")


# ---- Names and number formats --------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module.model._orig_mod."])
def test_wrappers_in_names_are_passed_over(prefix: str, save) -> None:
    network = resnet8()
    state = under(prefix, network.state_dict())
    for content in (state, {"state_dict": state}, {"model": state, "epoch": 4, "lr": 0.1}):
        layout = "lincls" if "state_dict" in content else "plain"
        assert_gives(save(content), network, "linear", arch="resnet8", layout=layout,
                     epoch=content.get("epoch"))  # fmt: skip
    moco = under(prefix, under("encoder_q._orig_mod.", network.state_dict()))
    path = save({"state_dict": moco})
    assert_gives(path, network, "projection", layout="moco", encoder="encoder_q")


def test_a_name_with_and_without_prefix_is_refused(state: dict, not_loaded) -> None:
    state["module.conv1.weight"] = torch.zeros_like(state["conv1.weight"])
    assert "holds conv1.weight twice" in not_loaded(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_precision_becomes_float32_of_the_same_values(
    dtype, suffix, state: dict, save, tmp_path: Path
) -> None:
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    path = save(state)
    if suffix == ".safetensors":
        write_safetensors(path := tmp_path / "a.safetensors", state, {})
    encoder, _ = load_encoder(path, head="linear")
    for name, tensor in encoder.state_dict().items():
        assert tensor.dtype == (torch.float32 if state[name].is_floating_point() else torch.int64)
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name


@pytest.mark.parametrize("dtype", [torch.int16, torch.bool, torch.complex64])
def test_numbers_of_another_sort_are_refused(dtype: torch.dtype, state: dict, not_loaded) -> None:
    state["conv1.weight"] = state["conv1.weight"].to(dtype)
    assert f"conv1.weight holds {dtype}, expected torch.float32" in not_loaded(state)


def test_what_a_folder_stands_for(tmp_path: Path, not_loaded) -> None:
    """Its newest checkpoint, the encoder of a release, Hugging Face's model.safetensors."""
    fixtures = Path(__file__).parent.parent / "fixtures"
    encoder, info = load_encoder(fixtures / "release")
    assert info["head"] == "none"
    same, _ = load_encoder(next((fixtures / "release").glob("toy-backbone-*.pth")))
    assert all(map(torch.equal, encoder.state_dict().values(), same.state_dict().values()))
    run = shutil.copytree(fixtures / "pretrain", tmp_path / "run")
    assert load_encoder(run, "projection")[1]["head"] != "none"
    (run / "step_00000002.pth.tar").touch()  # an older one is not looked at
    assert load_encoder(run)[1]["arch"] == info["arch"]
    (folder := tmp_path / "several").mkdir()
    assert "has 0 files of weights; name one: " in not_loaded(folder)
    for name in ("a.pth", "b.pth"):
        (folder / name).touch()
    assert "has 2 files of weights (a.pth, b.pth)" in not_loaded(folder)
    write_safetensors(folder / "model.safetensors", (network := resnet8()).state_dict(), {})
    assert_gives(folder, network, "linear", arch="resnet8")


def test_a_part_of_a_checkpoint_is_named_as_one(tmp_path, state, not_loaded):
    path = tmp_path / "model-00001-of-00002.safetensors"
    write_safetensors(path, state, {})
    assert "is one of 2 parts of a checkpoint" in not_loaded(path)
    whole = path.rename(tmp_path / "model-00001-of-00001.safetensors")
    assert load_encoder(whole)[1]["arch"] == "resnet8"


def test_what_a_file_says_of_itself_is_one_line_of_text(tmp_path, state):
    """It reaches terminals, reports and logs."""
    state["conv1.weight"] *= 1e9
    args = {"objective": "align\nerror: \x1b[31m\u202e", "task": "moco\n# heading"}
    content = {"state_dict": under("a\x1b[31m.", state), "epoch": "1\n2", "args": args}
    write_checkpoint(tmp_path / "a.pth.tar", content)
    with pytest.warns(UserWarning, match="absurdly large") as warned:
        info = load_encoder(tmp_path / "a.pth.tar")[1]
    said = [info[name] for name in ("objective", "task", "epoch", "encoder")]
    assert all(text.isprintable() for text in (*said, *(str(w.message) for w in warned)))
    assert info["objective"] == r"align\nerror: \x1b[31m\u202e"
