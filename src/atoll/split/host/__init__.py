"""The host's side: a server, a session for each device, and the middle blocks that all of them share."""
