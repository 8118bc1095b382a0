"""Change what lies in a folder of a model, to see what is said of it."""

import json

from safetensors.torch import load_file, save_file


def edit_config(folder, **changes):
    """Change keys of config.json; ... removes one."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: one for key, one in content.items() if one is not ...}))


def edit_tensors(folder, change):
    """Rewrite model.safetensors after `change` has worked on its dict of tensors."""
    tensors = {name: one.clone() for name, one in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
