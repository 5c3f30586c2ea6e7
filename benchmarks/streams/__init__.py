"""Objects: mlstor against the clients of S3 and AIStore, and against a DataLoader and fio over small files."""
