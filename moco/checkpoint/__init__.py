"""Checkpoint files, the checkpoints of a run folder, and encoders from files of any origin."""

from moco.checkpoint.content import (
    checksum,
    largest_sane,
    require_keys,
    same_tensors,
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
    write_torch,
)
from moco.checkpoint.formats import fingerprint, map_checkpoint
from moco.checkpoint.run_folder import (
    Retention,
    epoch_path,
    newest_valid,
    remove_unfinished,
    run_checkpoints,
    step_path,
)
from moco.checkpoint.sentences import load_sentence_encoders
from moco.errors import CheckpointError
