"""How split mode travels: messages, frames, tensor codecs, handshake, and the dialogue as a state machine without I/O."""
