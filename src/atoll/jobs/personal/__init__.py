"""Personal results: after the last round, each edge trains a copy of its own, which is scored on its own held-out rows."""
