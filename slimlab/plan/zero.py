"""What ZeRO keeps and sends. Chapter 09 predicts with it."""


def shard_size(num_elements: int, world_size: int) -> int:
    """Elements of a rank's shard."""
    return -(-num_elements // world_size)
