"""Model folders: from other formats, and written whole or not at all."""
