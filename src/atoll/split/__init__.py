"""The base in a host, data and adapters on the device: where the cut is, what crosses it, and over what."""
