"""Configuration of both mains: frozen dataclasses, nested by concern. Needs no torch.

A field is declared once, with its default, flags and resume class, and its help in the docstring:

    LEARNS  a run under another value learns something else: to resume is refused
    ROUNDS  the same is learned, but sums run in another order: to resume is not bit for bit
    FREE    may change in mid-run: no part of what is learned, or its effect is kept elsewhere

`moco.cli` makes the command line from these fields, and a config from the command line. Values
that do not fit raise ValueError, of one part by its flag. Nothing writes to a config afterwards;
`dataclasses.replace` makes another one. Functions take the part that
they need. `to_flat` gives the names under which args.json and checkpoints keep the values.
"""

from moco.config.in_batch import (
    DATASET_DEFAULTS,
    IN_BATCH_DEFAULTS,
    InBatchConfig,
    InBatchData,
    InBatchEncoder,
    InBatchObjective,
    InBatchOptim,
    InBatchViews,
    auto_rate,
)
from moco.config.lincls import (
    FINETUNE_DEFAULTS,
    FINETUNE_RATES,
    PROBE_DEFAULTS,
    STL10_DEFAULTS,
    Knn,
    LinclsConfig,
    Pretrained,
    ProbeOptim,
    Protocol,
)
from moco.config.option import (
    FREE,
    LEARNS,
    ROUNDS,
    Part,
    flat_values,
    from_flat,
    help_of,
    option,
    option_fields,
    parts_of,
    plain,
)
from moco.config.parts import (
    DATASETS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Data,
    Folder,
    Launch,
    Optim,
    Placement,
    Schedule,
    check_image_statistics,
)
from moco.config.preset import CHOSEN, Preset, small_preset
from moco.config.pretrain import (
    Encoder,
    Objective,
    PretrainConfig,
    PretrainData,
    PretrainOptim,
    PretrainSchedule,
    Saving,
    Speed,
    Views,
    Watching,
    objective_formula,
    objective_slug,
)
from moco.config.resume import (
    SAMPLE_ORDER,
    config_of,
    learned_names,
    learned_values,
    learning_changes,
    rounding_changes,
)
from moco.config.sentences import SentenceConfig
