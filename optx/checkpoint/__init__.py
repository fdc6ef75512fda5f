"""Files in, files out: Hugging Face directories, GGUF, optx exports."""
