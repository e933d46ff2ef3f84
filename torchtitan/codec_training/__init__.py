"""Training a small Mimi from scratch; judging/ says how good it is.

options       the manual, and the checks that need neither data nor codec
voices        synthetic speech
spectra       mel spectra, spectral loss, discriminators
codebooks     k-means, and codebooks fitted to latents
data          recordings, the semantic teacher, the batch of a step
autoencoder   the codec in its two halves, its precision and its folder
optimizer     stages and learning rates, Muon and AdamW
work_folder   checkpoints and log of a run
training      the run, from top to bottom
"""
