"""An authority of one's own: what it signs, what it has signed, and what is to be believed no more."""
