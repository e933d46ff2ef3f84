"""Turn a data set into shards of codes, once, before training.

A shard contains consecutive rows of the data set in their own order. So its content depends on the data set and on
``rows_per_shard`` alone. The worker processes, or the ranks of torchrun, share the shards. Each ``PART_ROWS`` rows of a
shard are written as a part. A run that was stopped or killed continues after its last part, with any number of
processes, and gives the same bytes. The codes are those of ``Codec.encode`` for the whole recording alone. On a GPU,
where a recording in another batch may rarely get another code, the batches depend on the places of the rows alone.

Bad rows are named in their shard and in ``bad_rows.tsv``. A single bad row never ends the run.
"""
