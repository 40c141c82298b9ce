"""What rows of this world look like."""
