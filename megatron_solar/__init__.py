"""The model: depth up-scaling, conversion and training. The only code that imports torch or megatron."""
