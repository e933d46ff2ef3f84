"""The Llama 3 decoder: arguments, model, Hugging Face weights in and out, and its parallelisation."""
