"""Llama-Mimi: train, run and judge flat speech language models."""

__version__ = "0.1.0"
