"""The stages of the line, one a file."""
