"""What each tenant of a host may have: written down, read, and kept account of."""
