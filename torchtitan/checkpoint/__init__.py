"""Checkpoints: written, read, judged for damage, and from and to the Hugging Face format."""
