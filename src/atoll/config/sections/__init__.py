"""Sections of run.toml that take a file of their own."""
