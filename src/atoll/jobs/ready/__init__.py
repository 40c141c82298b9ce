"""What a run starts from: its first adapter, and, for who asks whether it would start, its base without weights."""
