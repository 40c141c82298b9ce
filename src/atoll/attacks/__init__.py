"""What an honest but curious host or coordinator can read out of what a run would send to it."""
