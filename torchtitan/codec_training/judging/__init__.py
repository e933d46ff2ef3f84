"""How good a codec is: what is left of words and voices in its codes, and how the codes are used.

clips     clips of the assets and of any data set, spoken words
hearing   levels, intelligibility, pitch, classifiers of words and voices
codes     use of a codebook, information in codes
judge     the five measures
measure   the whole judgement and its tables
"""
