"""How a model is asked: by generation, or by the likelihood of candidates."""
