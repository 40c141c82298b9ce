"""The device's side: the placeholder for the blocks that it does not have, and the way to the host that has them."""
