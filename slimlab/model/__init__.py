"""The model: attention first. Nothing here knows a rank."""
