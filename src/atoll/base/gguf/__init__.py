"""A model in one GGUF file, as llama.cpp keeps it, made a model folder: what its blocks dequantize to, by transformers' own reader."""
