"""The parts of a training run, one file each."""
