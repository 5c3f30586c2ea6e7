"""How files of tensors are laid out: torch's zip, safetensors, and sums beside them. No torch in here."""
