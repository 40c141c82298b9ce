"""A base as transformers builds it, without weights: its modules, its sizes, and what a checkpoint calls its tensors."""
