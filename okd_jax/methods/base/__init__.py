"""What all methods are made of."""
