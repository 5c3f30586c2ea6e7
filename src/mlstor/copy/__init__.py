"""``mlstor copy``: moves objects between directories, S3 and AIStore, verified, resumable, and measured."""
