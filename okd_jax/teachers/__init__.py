"""Teachers: loaded, stored, computed once."""
