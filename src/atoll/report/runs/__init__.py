"""Finished runs for people: in a list, one alone, and side by side."""
