"""Ranks that talk: the Communicator and its runtimes."""
