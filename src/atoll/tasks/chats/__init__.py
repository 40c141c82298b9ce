"""How a conversation becomes text: the page that a chat template writes, and which of it the assistant says."""
