"""Settings of a training run: the manual, the keys and their values, and the rules between them."""
