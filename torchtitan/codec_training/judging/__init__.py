"""How good a codec is: what is left of words and voices in its codes, and how the codes are used.

speech        clips of the assets and of any data set
words         spoken words
waveforms     levels, distances, intelligibility, pitch
codes         use of a codebook, and what codes say
classifiers   what hears words and voices
judge         the five measures
report        their tables
measure       the judgement, from top to bottom
"""
