"""Predictions from configurations alone: operations, bytes, money."""
