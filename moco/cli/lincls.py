"""The command line of main_lincls.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moco.checkpoint import is_url, without_secrets
from moco.cli.folders import check_data_folder, check_run_folder, new_folder, pretrained_file
from moco.cli.options import make_parts, parser_of, refusals, settle
from moco.config import FINETUNE_DEFAULTS, FINETUNE_RATES, STL10_DEFAULTS, LinclsConfig
from moco.run_files import LINCLS_LATEST


def lincls_config(argv: Sequence[str] | None = None) -> LinclsConfig:
    """The config that a command line of main_lincls.py describes; else exit status 2."""
    parser = parser_of(LinclsConfig)
    options = parser.parse_args(argv)
    if options.finetune:  # again, with the defaults of fine-tuning
        lr, lr_backbone = FINETUNE_RATES["1 %" if options.labels == 1 else "10 %"]
        parser.set_defaults(**FINETUNE_DEFAULTS, lr=(lr,), lr_backbone=lr_backbone)
        options = parser.parse_args(argv)
    elif options.probe == "stl10":
        parser.set_defaults(**STL10_DEFAULTS)
        options = parser.parse_args(argv)
    with refusals(parser):
        parts = settle(make_parts(options, LinclsConfig))
        saving, source = parts["saving"], parts["source"]
        check_run_folder(parser, saving.save_dir, saving.resume, "lincls")
        if saving.resume == "auto":
            latest = saving.save_dir / LINCLS_LATEST
            parts["saving"] = replace(saving, resume=str(latest) if latest.is_file() else None)
        parts["source"] = replace(source, pretrained=pretrained_file(parser, source.pretrained))
        config = LinclsConfig(**parts)
    source = config.source.pretrained or config.saving.resume
    if source is None:
        parser.error("give the encoder to evaluate: --pretrained CHECKPOINT")
    for flag, path in (("resume", config.saving.resume), ("pretrained", config.source.pretrained)):
        address = flag == "pretrained" and path and is_url(path)
        if path and not address and not Path(path).is_file():
            parser.error(f"--{flag}: no such checkpoint: {path}")
    batch = config.optim.batch_size if config.trains else 1
    check_data_folder(parser, config.data, {"train": batch, "val": 1})
    if config.saving.save_dir is None:
        source = without_secrets(source).removesuffix("?...")
        stem = Path(source).name.removesuffix(".tar").removesuffix(".pth")
        name = f"lincls-{Path(source).resolve().parent.name}-{stem}"
        run = new_folder(name, config.optim.seed)
        config = replace(config, saving=replace(config.saving, save_dir=run))
    return config
