"""Judging a speech language model on pairs of clips: of a sound and a spoilt one, which does it find likelier?

The way of the data, a module a step:

    data        pairs of audio files from a hub id or a local folder
    scoring     ids to the negative log-likelihood of every target
    metrics     these, through a benchmark's rule, to accuracies
    results     accuracy.json, results.json and samples.parquet
    benchmark   SALMon, sLM21 and StoryCloze, and the run of one from start to end

The samples table, a row a clip, stands between scoring and metrics: every figure is computed from it, so that what was
written once can be judged again without the model.
"""
