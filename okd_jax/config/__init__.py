"""What users write, read and checked."""
