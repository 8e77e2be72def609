"""The command lines: flags made from the config's fields, configs made from flags.

Flags are spelled as upstream MoCo spells them. What can be known at parse time is refused here, in
one line with exit status 2. Other commands use the parser and the argument types.
"""

from moco.cli.folders import check_run_folder, pretrained_file
from moco.cli.in_batch import in_batch_config
from moco.cli.lincls import lincls_config
from moco.cli.options import make_parts, parser_of
from moco.cli.parser import (
    KINDS,
    Parser,
    count,
    folder,
    new_file,
    non_empty,
    numbers,
    positive,
    positives,
    seed,
)
from moco.cli.pretrain import pretrain_config
from moco.cli.sentences import sentence_config
