"""A blob is a file or an object: pieces of memory become one durable whole, or are filled from it. Knows no torch."""
