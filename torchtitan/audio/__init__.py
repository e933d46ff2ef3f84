"""Speech in and out: waveforms, the Mimi codec, and the token stream between codes and ids."""
