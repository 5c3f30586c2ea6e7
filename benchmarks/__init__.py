"""mlstor beside fio, torch, safetensors, DCP and plain loops on one file system; see README.md here."""
