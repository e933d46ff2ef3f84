"""How good a codec is: what is left of words and voices in its codes, and how the codes are used.

clips     clips of the assets, of any data set, and spoken words
hearing   levels, intelligibility, pitch, classifiers of words and voices
codes     use of a codebook, and what codes say
judge     the five measures
measure   the judgement, from top to bottom, and its tables
"""
