"""The Llama model, its weights' file format, its adapters and its sampler."""
