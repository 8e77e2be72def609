"""Checkpoint files, the checkpoints of a run folder, and encoders from files of any origin."""

from moco.checkpoint.content import (
    checksum,
    largest_sane,
    require_keys,
    saved_args,
    to_host,
)
from moco.checkpoint.download import is_url, read_url, without_secrets
from moco.checkpoint.encoder import load_encoder
from moco.checkpoint.files import (
    FORMAT_VERSION,
    read_checkpoint,
    write_atomically,
    write_checkpoint,
    write_safetensors,
)
from moco.checkpoint.mapped import fingerprint, map_checkpoint
from moco.checkpoint.run_folder import (
    Retention,
    epoch_path,
    newest_valid,
    remove_unfinished,
    run_checkpoints,
    step_path,
)
from moco.errors import CheckpointError

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "Retention",
    "checksum",
    "epoch_path",
    "fingerprint",
    "is_url",
    "largest_sane",
    "load_encoder",
    "load_sentence_encoders",
    "map_checkpoint",
    "newest_valid",
    "read_checkpoint",
    "read_url",
    "remove_unfinished",
    "require_keys",
    "run_checkpoints",
    "saved_args",
    "step_path",
    "to_host",
    "without_secrets",
    "write_atomically",
    "write_checkpoint",
    "write_safetensors",
]
from moco.checkpoint.sentences import load_sentence_encoders
