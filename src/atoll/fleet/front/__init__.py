"""What edges call: TLS with certificates on both sides, and nothing of SuperLink but what an edge needs."""
