"""What a run gives away: `atoll audit`."""
