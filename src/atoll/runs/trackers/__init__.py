"""Trackers that ship, each by the library of its name, which is opened when a run begins."""
