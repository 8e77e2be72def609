"""Encoders in other formats, and releases."""
