"""Comparisons with the libraries that people use, measured side by side; README.md says how."""
