"""slimlab: how language models are built, spread over many processors and slimmed down."""

__version__ = "0.1.0"
