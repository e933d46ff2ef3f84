"""Training a small Mimi from scratch; judging/ says how good it is.

options       the manual, and what is checked first
voices        synthetic speech
spectra       mel spectra, spectral loss, discriminators
codebooks     clusters of points, entries from latents
data          recordings, the semantic teacher, the stretches of a step
autoencoder   the codec in its two halves, its precision and its folder
optimizer     stages and learning rates, Muon and AdamW
stages        a step of each stage, and the end of encoder and codebooks
training      the run, from top to bottom
"""
