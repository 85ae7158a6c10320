"""Text from models, and the files that keep it."""
