"""Inputs that somebody else made, and what becomes of them: see run.py."""
