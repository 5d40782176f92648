"""Model references, the folder of safetensors behind each, and language models loaded from it."""
