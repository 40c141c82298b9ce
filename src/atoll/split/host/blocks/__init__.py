"""What a session computes: the middle blocks of the shared base, with the adapters of its device reached through it, lent or killed."""
