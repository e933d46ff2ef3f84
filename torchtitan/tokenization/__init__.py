"""Turn a data set into shards of codes, once, ahead of training.

The unit of work is a shard: a run of consecutive rows in the source's own order, so that what a shard holds depends on
the source and ``rows_per_shard`` alone. Shards are shared out among worker processes, or among the ranks of torchrun.
Within a shard, every ``PART_ROWS`` rows are written as a part; a run that is stopped or killed, wherever that is,
continues after its last part, with any number of processes, and ends with the same bytes. Codes are those of a lone
``Codec.encode`` of the whole recording; on a GPU, where equal clips in other batches may differ in a rare code,
batches are a function of the rows' places too.

A recording that cannot be used is named in its shard and in ``bad_rows.tsv``, and never ends the run.
"""
