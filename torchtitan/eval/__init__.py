"""Evaluate a speech language model on pairs of clips: is the correct clip more likely than the spoilt one?

The data flow through these modules:

    data        pairs of audio files from a hub id or a local folder
    scoring     ids to the negative log-likelihood of every target
    metrics     negative log-likelihoods to accuracies, by the rule of a benchmark
    results     accuracy.json, results.json and samples.parquet
    benchmark   a run of SALMon, sLM21 or StoryCloze from start to end

The samples table, with a row per clip, is between scoring and metrics. All figures are computed from it, so it can be
evaluated again by another rule without the model.
"""
