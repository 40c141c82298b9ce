"""The device's side: the stand-in for the blocks that it does not have, and the way to the host that has them."""
