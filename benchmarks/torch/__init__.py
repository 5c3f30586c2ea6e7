"""PyTorch: checkpoints and data sets of mlstor against torch, DCP, safetensors, its streamers, and s3torchconnector."""
