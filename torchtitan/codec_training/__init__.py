"""Training a small Mimi from scratch; judging/ says how good it is.

options       the manual, and what is checked first
voices        synthetic speech
speech        recordings to one decoded file
mel           mel spectra
clusters      k-means
teacher       what the first codebook learns to predict
losses        spectra and discriminators
autoencoder   the codec in its two halves
precision     where bfloat16 is right
codebooks     entries from latents
optimizer     Muon and AdamW
schedule      stages and learning rates
work_folder   options, checkpoint and log of a run
stages        a step of each stage
final_codes   the end of encoder and codebooks
export        the codec's folder
training      the run, from top to bottom
"""
