"""What a training run would cost: tokens, memory, operations and hours, before it is started."""
