"""Data sets of speech, from files to batches of ids."""
