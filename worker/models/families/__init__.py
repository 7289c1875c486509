"""The families of dense decoders: a file each says what its models have that others do not."""
