"""Object streams: every object once per epoch, in a random order that all ranks share."""
