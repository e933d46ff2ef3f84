"""Turn a data set into shards of codes, once, so that training need not encode it.

    python scripts/tokenize_dataset.py --dataset peoples_speech --output data/peoples_speech_codes

A data set is a built-in name, a local folder or file, or a hub id. All CPU cores or GPUs of the machine work at it;
under torchrun, each rank is one process and does its share of the shards. A run that was stopped continues when the
same command is given again. Rows that cannot be used are listed in bad_rows.tsv.
"""

import tyro

from torchtitan.tokenization.run import tokenize
from torchtitan.tokenization.spec import Options
from torchtitan.tools.errors import run_command

if __name__ == "__main__":
    run_command(lambda: print(tokenize(tyro.cli(Options, description=__doc__, use_underscores=True))))
