"""The config: every field is classified and described, nothing writes to it, old names stay."""

from __future__ import annotations

import ast
import dataclasses
import json
import re

import pytest
from helpers import ROOT

from moco import distributed, handshake
from moco.config import (
    FREE,
    LEARNS,
    ROUNDS,
    Data,
    InBatchConfig,
    InBatchOptim,
    LinclsConfig,
    Objective,
    Part,
    PretrainConfig,
    PretrainData,
    PretrainOptim,
    ProbeOptim,
    SentenceConfig,
    help_of,
    learning_changes,
    option,
    option_fields,
    parts_of,
    rounding_changes,
)
from moco.config.in_batch import InBatchObjective
from moco.config.sentences import SentenceObjective
from moco.errors import TrainingError

CONFIGS = pytest.mark.parametrize(
    "config", [PretrainConfig, LinclsConfig, InBatchConfig, SentenceConfig]
)


@pytest.fixture
def config() -> PretrainConfig:
    return PretrainConfig(data=PretrainData(data="DIR"))


@CONFIGS
def test_fields_have_a_resume_class_a_name_of_their_own_and_flags_a_description(config) -> None:
    described = {"mean", "std"}  # their metavar says it: R G B
    fields = list(option_fields(config))
    for part in parts_of(config).values():
        assert issubclass(part, Part)
        described |= help_of(part).keys()
    assert {field.metadata["resume"] for field in fields} <= {LEARNS, ROUNDS, FREE}
    assert {field.name for field in fields if field.metadata["flags"]} <= described
    names = [field.name for field in fields]
    flags = [flag for field in fields for flag in field.metadata["flags"]]
    assert len(set(names)) == len(names) and len(set(flags)) == len(flags)


def test_a_field_without_a_class_cannot_be_made() -> None:
    message = "resume must be 'learns', 'rounds' or 'free', got 'maybe'"
    with pytest.raises(ValueError, match=message):
        option(1, "--flag", "maybe")


def test_a_config_cannot_be_written_to(config) -> None:
    for target, name in ((config, "data"), (config.optim, "lr"), (config.objective, "align_w")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, name, None)


def test_no_file_writes_to_a_config_or_to_parsed_options() -> None:
    """`config.x = `, `options.x = `, setattr and object.__setattr__ on them, in the library."""
    found = []
    for path in [*ROOT.glob("*.py"), *(ROOT / "moco").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
                for target in targets:
                    text = ast.unparse(target)
                    if re.match(r"(self\.)?(config|options|cfg|args)\.\w", text):
                        found.append(f"{path.name}: {text}")
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("__setattr__"):
                found.append(f"{path.name}: {ast.unparse(node)}")
    assert found == []


def test_the_names_of_old_files_are_still_written(config) -> None:
    """The fixtures were written before there was a config."""
    probe = LinclsConfig(data=Data(data="DIR"))
    for folder, names in (("pretrain", config.to_flat()), ("lincls", probe.to_flat())):
        old = json.loads((ROOT / "tests/fixtures" / folder / "args.json").read_text())
        found_in_data = {"images", "images_digest", "labels_digest", "provenance"}
        assert old.keys() - names.keys() <= found_in_data


# ---- What decides whether a run can be resumed ---------------------------------------------------


def changed(config: PretrainConfig, **parts: dict) -> dict:
    """Flat values of the config with other values in some of its parts."""
    others = {
        name: dataclasses.replace(getattr(config, name), **values) for name, values in parts.items()
    }
    return dataclasses.replace(config, **others).to_flat()


def test_every_learning_field_is_compared(config) -> None:
    """By its name, whatever its type: a value that no command line gives is another one."""
    flat = config.to_flat()
    assert learning_changes(flat, flat) == [] == rounding_changes(flat, flat)
    assert learning_changes({}, flat) == [] == rounding_changes({}, flat)
    terms = {"contr_w", "contr_tau", "align_w", "align_alpha", "unif_w", "unif_t", "intra_batch"}
    for field in option_fields(PretrainConfig):
        name = field.name
        other = {**flat, name: ["another"]}
        if field.metadata["resume"] == LEARNS and name not in terms:
            assert any(c.startswith(f"{name}: ") for c in learning_changes(other, flat)), name
        if field.metadata["resume"] == ROUNDS:
            (line,) = rounding_changes(other, flat)
            assert line.startswith(f"{name}: ")
        if field.metadata["resume"] == FREE:
            assert learning_changes(other, flat) == []


LEARNING = {  # what makes another run; other numbers of the objective are below
    PretrainConfig: "dataset images_per_class arch small_stem moco_dim moco_k moco_m mlp contr_w "
    "contr_tau align_w align_alpha unif_w unif_t intra_batch symmetric aug_plus image_size "
    "crop_scale blur views mean std batch_size momentum seed lr weight_decay amp "
    "init_from epochs schedule schedule_factor cos warmup_epochs",
    LinclsConfig: "dataset images_per_class image_size mean std amp batch_size momentum seed lr "
    "weight_decay epochs schedule schedule_factor folds cached cached_views labels_digest finetune "
    "lr_backbone",
    InBatchConfig: "dataset images_per_class drop_last arch small_stem dim contr_w contr_tau "
    "align_w align_alpha unif_w unif_t supervised image_size crop_scale views mean std batch_size "
    "momentum seed lr weight_decay amp init_from epochs schedule schedule_factor cos warmup_epochs",
    SentenceConfig: "val_sentences vocab case_sensitive length across_documents arch emb hidden "
    "contr_w contr_tau align_w align_alpha align_pairs unif_w unif_t normalize batch_size lr clip "
    "seed amp init_from epochs schedule schedule_factor cos warmup_epochs",
}


@CONFIGS
def test_what_makes_another_run(config) -> None:
    fields = {field.name for field in option_fields(config) if field.metadata["resume"] == LEARNS}
    assert fields >= set(LEARNING[config].split())


def test_ranks_must_agree_in_all_that_is_learned(config, monkeypatch) -> None:
    monkeypatch.setattr(handshake, "provenance", dict)
    for field in option_fields(PretrainConfig):
        if field.metadata["resume"] == LEARNS:
            other = {field.name: "another"}
            monkeypatch.setattr(
                distributed, "gather_objects", lambda mine, other=other: [mine, {**mine, **other}]
            )
            with pytest.raises(TrainingError, match=f"rank 1 has {field.name} 'another'"):
                handshake.refuse_other_arguments(config)


def test_the_numbers_of_the_objective_decide_and_not_its_sentence(config) -> None:
    now = config.to_flat()
    assert learning_changes({**now, "objective": "as another version put it"}, now) == []
    before = changed(config, objective={"unif_t": 2.0})
    (line,) = learning_changes(before, now)
    assert "uniform(t=2" in line and "uniform(t=3" in line and line.startswith("objective: ")
    close = changed(config, objective={"unif_t": 3.00000001})  # "t=3" in the formula, too
    assert learning_changes(close, now) == ["unif_t: 3.00000001 before, 3.0 now"]
    # Parameters of terms without weight may be anything.
    assert learning_changes(changed(config, objective={"contr_tau": 9.0}), now) == []
    infonce = {"contr_w": 1.0, "align_w": 0.0, "unif_w": 0.0}
    one, other = ({**infonce, **unused} for unused in ({"unif_t": 9.0}, {"intra_batch": False}))
    assert learning_changes(*(changed(config, objective=o) for o in (one, other))) == []


def test_files_from_before_a_field_existed_had_its_old_value(config) -> None:
    flat = config.to_flat()
    old = {name: value for name, value in flat.items() if name != "views"}
    assert learning_changes(old, flat) == []
    assert learning_changes(old, {**flat, "views": "device"}) == [
        "views: 'cpu' before, 'device' now"
    ]
    two = changed(config, optim={"accumulate": 2})
    assert learning_changes(old, two) == []
    assert "accumulate: 1 before, 2 now" in rounding_changes(old, two)


def test_groups_of_files_from_before_group_size_are_worked_out(config) -> None:
    """The loss saw all images of a device's part, and keys were shuffled within a part."""
    flat = changed(config, optim={"batch_size": 64, "accumulate": 2})
    old = {n: v for n, v in flat.items() if n not in ("loss_group_size", "shuffled_images")}
    assert learning_changes({**old, "bn_groups": 1, "bn_group_size": 32}, flat) == [
        "shuffled_images: 32 before, 64 now"
    ]
    changes = learning_changes({**old, "bn_groups": 2, "bn_group_size": 16}, flat)
    assert "bn_group_size: 16 before, 32 now" in changes
    assert learning_changes({**old, "bn_groups": 4, "bn_group_size": 32}, flat) == [
        "loss_group_size: 128 before, 32 now", "shuffled_images: 32 before, 64 now"
    ]  # fmt: skip


def test_a_slope_that_no_weight_asks_for_may_be_infinite() -> None:
    for objective in (Objective, InBatchObjective):
        assert objective(align_w=0, align_alpha=0.5).align_alpha == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PretrainOptim(lr=-1), "--lr must be a number of at least 0, got -1"),
        (lambda: PretrainOptim(lr=float("nan")), "--lr must be a number of at least 0, got nan"),
        (lambda: PretrainOptim(accumulate=0), "--accumulate must be at least 1, got 0"),
        (lambda: Objective(align_alpha=0.5), "--moco-align-alpha must be at least 1"),
        (lambda: Objective(unif_t=float("inf")), "--moco-unif-t must be positive, got inf"),
        (lambda: SentenceObjective(unif_t=0), "--unif-t must be positive, got 0"),  # of any weight
        (lambda: Objective(align_w=0, unif_w=0), "all loss weights are zero"),
        (lambda: Objective(unif_w=float("inf")), "--moco-unif-w must be a number of at least 0"),
        (lambda: InBatchOptim(momentum=1.5), "--momentum must be in [0, 1), got 1.5"),
        (lambda: PretrainOptim(momentum=1), "--momentum must be in [0, 1), got 1"),
        (lambda: ProbeOptim(momentum=-0.1), "--momentum must be in [0, 1), got -0.1"),
    ],
)
def test_parts_refuse_by_the_name_of_the_flag(make, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
