"""Exercises: checks, hints, scores, grading of a class."""
