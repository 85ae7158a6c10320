"""What is measured of a model, on tokens and on the answers it gives."""
